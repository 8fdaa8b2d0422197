"""The doctor on machines that lack something: really lacking, in a mount namespace of the test's own (unshare(1))."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys

import pytest

ROOT = os.geteuid() == 0
#: The test's own machine: the host's with some mounts over it.
ELSEWHERE = ["unshare", "--mount"] if ROOT else ["unshare", "--mount", "--map-root-user"]
MAIN = shlex.join([sys.executable, "-m", "workbench"])


def examine(preparation: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The doctor's exit code and checks after shell commands in a mount namespace of their own."""
    done = subprocess.run(
        [*ELSEWHERE, "sh", "-euc", f"{preparation}\nexec {MAIN} doctor --json"],
        capture_output=True, text=True, env=os.environ | env, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def hide(path: str) -> str:
    return f"mount --bind /dev/null {shlex.quote(os.path.realpath(path))}"


def test_this_machine_is_ready(cli):
    done = cli("doctor", "--json")
    assert done.code == 0, done.out
    assert {check["state"] for check in done.json} <= {"ok", "note"}


@pytest.mark.parametrize(
    ("program", "check", "package"),
    [("tini-static", "init", "tini"), ("mmdebstrap", "Debian bases", "mmdebstrap")]
    + ([] if ROOT else [("pasta", "network", "passt")]),
)
def test_a_missing_program_is_named_with_its_package(program, check, package):
    code, checks = examine(hide(f"/usr/bin/{program}"))  # what cannot be executed is not there
    assert code == 1
    assert checks[check]["state"] == "missing" and f"apt-get install {package}" in checks[check]["remedy"]


def test_without_libseccomp(image):
    library = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    path = next(line.split("=> ")[1] for line in library.splitlines() if "libseccomp.so.2" in line)
    code, checks = examine(hide(path))
    assert code == 1 and checks["system call filter"]["state"] == "missing"
    assert "libseccomp2" in checks["system call filter"]["remedy"]
    if not ROOT:  # unshare made us root of a namespace without sub-ids: a launch has other reasons to fail there
        return
    done = subprocess.run(
        [*ELSEWHERE, "sh", "-euc", f"{hide(path)}\nexec {MAIN} run --network none python true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "libseccomp" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_system_that_cannot_hold_layers(tmp_path):
    code, checks = examine(f"mount -t ramfs none {tmp_path}", WORKBENCH_HOME=str(tmp_path / "w"))
    assert code == 1 and checks["overlay"]["state"] == "missing" and "WORKBENCH_HOME" in checks["overlay"]["remedy"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
    code, checks = examine(f"mount -t tmpfs -o size=32m none {tmp_path}", WORKBENCH_HOME=str(tmp_path / "w"))
    assert code == 1 and checks["free space"]["state"] == "missing" and "gc" in checks["free space"]["remedy"]
    assert checks["overlay"]["state"] == "ok"


def test_without_user_namespaces():
    code, checks = examine("echo 0 > /proc/sys/user/max_user_namespaces") if not ROOT else _no_namespaces()
    assert code == 1 and checks["user namespaces"]["state"] == "missing"
    assert "sysctl -w user.max_user_namespaces=" in checks["user namespaces"]["remedy"]


def _no_namespaces() -> tuple[int, dict[str, dict[str, str]]]:
    # the limit belongs to a user namespace: not the host's own, but one for the test
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-euc",
         f"echo 0 > /proc/sys/user/max_user_namespaces\nexec {MAIN} doctor --json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def test_a_single_id_is_a_note_with_its_cost(cli):
    done = cli("doctor", "--json", WORKBENCH_SINGLE_ID="1")
    (check,) = [check for check in done.json if check["name"] == "id range"]
    assert done.code == 0 and check["state"] == "note" and "usermod --add-subuids" in check["remedy"]


def test_a_store_that_is_not_there_yet_is_not_made(cli, tmp_path):
    done = cli("doctor", "--json", WORKBENCH_HOME=str(tmp_path / "deep" / "store"))
    assert done.code == 0 and not list(tmp_path.iterdir())


def test_a_wrong_certificate_file(cli):
    done = cli("doctor", "--json", SSL_CERT_FILE="/no/such/file")
    (check,) = [check for check in done.json if check["name"] == "certificates"]
    assert done.code == 1 and check["state"] == "missing" and "/no/such/file" in check["found"]


def test_an_old_kernel(cli):
    """What uname(2) tells of itself with the personality that some programs of old want (setarch(8))."""
    done = subprocess.run(
        ["setarch", "--uname-2.6", "--", sys.executable, "-m", "workbench", "doctor", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "kernel"]
    assert done.returncode == 1 and check["state"] == "missing"
    assert check["found"].startswith("Linux 2.6") and "boot Linux 5." in check["remedy"]


@pytest.mark.skipif(ROOT, reason="root needs no range of ids")
def test_without_the_tools_for_id_ranges(cli, tmp_path):
    tools = ["newuidmap", "newgidmap"]
    hidden = "\n".join(hide(f"/usr/bin/{tool}") for tool in tools)
    _, checks = examine(hidden)
    assert checks["id range"]["state"] == "note" and "apt-get install uidmap" in checks["id range"]["remedy"]
    # and copies of them that have no rights
    for tool in tools:
        shutil.copyfile(f"/usr/bin/{tool}", tmp_path / tool)
        (tmp_path / tool).chmod(0o755)
    done = cli("doctor", "--json", PATH=f"{tmp_path}:{os.environ['PATH']}")
    (check,) = [check for check in done.json if check["name"] == "id range"]
    assert (done.code, check["state"]) == (1, "missing") and f"chmod u+s {tmp_path}" in check["remedy"]


def test_a_store_of_somebody_else(cli):
    there = "/etc" if not ROOT else "/var/mail"  # nobody's own
    if ROOT:
        code, checks = examine("mount -t tmpfs -o uid=1 none /mnt", WORKBENCH_HOME="/mnt")
        found = checks["store"]
    else:
        done = cli("doctor", "--json", WORKBENCH_HOME=there)
        code, (found,) = done.code, [check for check in done.json if check["name"] == "store"]
    assert code == 1 and found["state"] == "missing" and "WORKBENCH_HOME" in found["remedy"]
    assert "belongs to uid" in found["found"]


def test_a_store_that_cannot_be_written(tmp_path):
    code, checks = examine(f"mount -t tmpfs -o ro none {tmp_path}", WORKBENCH_HOME=str(tmp_path / "w"))
    assert code == 1 and checks["store"]["state"] == "missing" and "cannot be written" in checks["store"]["found"]
    assert "WORKBENCH_HOME" in checks["store"]["remedy"]


def test_without_control_groups():
    code, checks = examine("mount -t tmpfs -o ro none /sys/fs/cgroup")
    assert code == 0 and checks["limits"]["state"] == "note"
    assert "rlimits" in checks["limits"]["found"] and "Delegate=yes" in checks["limits"]["remedy"]


@pytest.mark.skipif(not ROOT, reason="the bridge is root's")
def test_without_rights_over_the_network():
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--",
         sys.executable, "-m", "workbench", "doctor", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "network"]
    assert done.returncode == 1 and check["state"] == "missing" and "CAP_NET_ADMIN" in check["remedy"]


def test_without_a_tap_device():
    code, checks = examine("mount -t tmpfs none /dev/net")
    assert "modprobe tun" in checks["network"]["remedy"]
    if ROOT:  # whose network takes none, but for named ones
        assert (code, checks["network"]["state"]) == (0, "note") and "lan:NAME" in checks["network"]["found"]
    else:
        assert (code, checks["network"]["state"]) == (1, "missing")


@pytest.mark.skipif(ROOT, reason="root's network takes no tap device")
def test_a_tap_device_that_cannot_be_opened():
    code, checks = examine(
        "mount --bind /dev/net/tun /dev/net/tun\nmount -o remount,bind,nodev,nosuid,noexec /dev/net/tun"
    )
    assert code == 1 and checks["network"]["state"] == "missing" and "/dev/net/tun" in checks["network"]["remedy"]


def test_without_certificates():
    bundles = {"/etc/ssl/certs/ca-certificates.crt", ssl.get_default_verify_paths().cafile or ""}
    hidden = "\n".join(
        f"mount -t tmpfs none {os.path.dirname(path)}" for path in sorted(bundles) if os.path.exists(path)
    )
    code, checks = examine(hidden, SSL_CERT_FILE="")
    assert code == 0 and checks["certificates"]["state"] == "note"
    assert "apt-get install ca-certificates" in checks["certificates"]["remedy"]
