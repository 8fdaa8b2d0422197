"""Each default of a container, asked for from inside."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.containers.inside import PYTHON, probe, run
from workbench.containers import spec, state
from workbench.linux import cgroup, userns
from workbench.model import Conflict, InvalidInput, LaunchFailed, Limits, Mount, NotFound

ROOT = userns.host_ids().kind == "root"


def test_seven_namespaces_are_its_own(workbench, image):
    names = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"]
    inside = probe(
        workbench, image, f"import os, json; print(json.dumps([os.readlink(f'/proc/self/ns/{{n}}') for n in {names}]))"
    )
    outside = [os.readlink(f"/proc/self/ns/{name}") for name in names]
    assert all(i != o for i, o in zip(inside, outside, strict=True)), inside


def test_rights_are_podmans_eleven_and_cannot_grow(workbench, image):
    status = run(workbench, image, ["cat", "/proc/self/status"]).text
    seen = dict(re.findall(r"^(\w+):\s*(\S+)$", status, re.MULTILINE))
    wanted = sum(1 << spec.sc.CAPABILITIES.index(name) for name in spec.CAPABILITIES)
    assert len(spec.CAPABILITIES) == 11
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(seen[name], 16) == wanted, name
    for name in ("CapInh", "CapAmb"):
        assert int(seen[name], 16) == 0, name
    assert seen["NoNewPrivs"] == "1"
    assert seen["Seccomp"] == "2"


def test_devices_are_the_few(workbench, image):
    names = probe(workbench, image, "import os, json; print(json.dumps(sorted(os.listdir('/dev'))))")
    assert set(names) == {
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "mqueue", "fd", "stdin", "stdout",
        "stderr", "core",
    }  # fmt: skip
    random = probe(
        workbench,
        image,
        "import json; print(json.dumps([len(open('/dev/' + n, 'rb').read(16)) for n in ('urandom', 'zero')]))",
    )
    assert random == [16, 16]


def test_parts_of_proc_and_sys_are_hidden_or_read_only(workbench, image):
    result = probe(
        workbench, image, f"""
        import json, os, stat
        hidden, read_only = {list(spec.HIDDEN)!r}, {list(spec.READ_ONLY)!r}
        seen = {{}}
        for path in hidden:
            if os.path.isdir(path): seen[path] = os.listdir(path) == []
            elif os.path.exists(path): seen[path] = open(path, 'rb').read(1) == b''
        def writable(path):
            try:
                os.close(os.open(path, os.O_WRONLY)); return True
            except OSError: return False
        print(json.dumps([seen, [p for p in ('/proc/sysrq-trigger', '/proc/sys/kernel/hostname',
            '/proc/sys/kernel/core_pattern', '/sys/kernel/profiling', '/proc/irq/default_smp_affinity') if writable(p)],
            [line.split()[5].split(',')[0] for line in open('/proc/self/mountinfo') if line.split()[4] in read_only]]))
        """,
    )  # fmt: skip
    assert all(result[0].values()), result[0]
    assert "/proc/keys" in result[0]
    assert result[1] == []
    assert set(result[2]) == {"ro"}


def test_environment_is_what_was_meant(workbench, image, monkeypatch):
    monkeypatch.setenv("WORKBENCH_TEST_SECRET", "s3cret")
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    env = probe(workbench, image, "import os, json; print(json.dumps(dict(os.environ)))", env={"MINE": "1"})
    assert env["MINE"] == "1"
    assert env["HOME"] == "/root"
    assert not {"WORKBENCH_TEST_SECRET", "JPY_PARENT_PID", "WORKBENCH_HOME"} & env.keys()
    assert "s3cret" not in json.dumps(env)


def test_no_descriptor_but_the_standard_streams_crosses(workbench, image):
    with open("/etc/passwd") as file:
        os.set_inheritable(file.fileno(), True)
        fds = probe(
            workbench, image, "import os, json; names = os.listdir('/proc/self/fd'); "
            "print(json.dumps([n for n in names if os.path.exists('/proc/self/fd/' + n)]))",
        )  # fmt: skip
    assert sorted(fds) == ["0", "1", "2"]
    assert run(workbench, image, ["sh", "-c", "ls /proc/1/fd | sort -n | tr '\\n' ' '"]).text.split() == ["0", "1", "2"]


def test_mountinfo_and_init_tell_nothing_of_the_host(workbench, image, tmp_path):
    text = run(workbench, image, ["sh", "-c", "cat /proc/self/mountinfo; readlink /proc/1/exe"], cwd=str(tmp_path)).text
    assert workbench.home not in text
    assert "containers/" not in text
    assert text.strip().endswith("\n/init")
    assert "python" not in text.replace(str(tmp_path), "")


def test_host_name_resolver_and_hosts_are_ours(workbench, image):
    outcome = run(workbench, image, ["sh", "-c", "hostname; cat /etc/hostname; grep -c nameserver /etc/resolv.conf"])
    name, file, nameservers = outcome.text.split()
    assert name == file == outcome.id
    assert int(nameservers) >= 1
    assert not outcome.kept


def test_limits_of_core_dumps_and_processes(workbench, image):
    outcome = run(
        workbench, image, ["sh", "-c", "ulimit -c; for i in $(seq 40); do sleep 1 & done; wait"],
        limits=Limits(processes=20),
    )  # fmt: skip
    assert outcome.text.splitlines()[0] == "0"
    assert "Cannot fork" in outcome.text or "Resource temporarily unavailable" in outcome.text


def test_memory_limit_ends_it_and_says_so(workbench, image):
    outcome = run(
        workbench, image, [PYTHON, "-c", "x = bytearray(600 << 20); x[::4096] = b'1' * len(x[::4096]); print('alive')"],
        limits=Limits(memory=200 << 20),
    )  # fmt: skip
    assert "alive" not in outcome.text
    if "memory" in cgroup.available()[1]:
        assert outcome.end.limit == "memory"
        assert "memory limit of 200.0 MiB" in outcome.end.reason
    else:  # no control group for this user here: the allocation fails instead
        assert "MemoryError" in outcome.text


@pytest.mark.skipif(not ROOT, reason="only root may give files to others; the user's own case is the next test")
def test_files_in_mounted_folders_keep_their_owners(workbench, image, tmp_path):
    for uid in (0, 1000, 1001):
        (tmp_path / f"host-{uid}").write_text("x")
        os.chown(tmp_path / f"host-{uid}", uid, uid)
    inside = probe(
        workbench, image, """
        import json, os
        seen = {n: os.stat(n).st_uid for n in os.listdir('.')}
        for uid in (0, 1000, 1001):
            pid = os.fork()
            if pid == 0:
                os.chown('.', uid, uid) if uid == 0 else None
                open(f'made-{uid}', 'w').close(); os.chown(f'made-{uid}', uid, uid); os._exit(0)
            os.waitpid(pid, 0)
        print(json.dumps(seen))
        """, cwd=str(tmp_path),
    )  # fmt: skip
    assert inside == {f"host-{uid}": uid for uid in (0, 1000, 1001)}
    assert {p.name: p.stat().st_uid for p in tmp_path.glob("made-*")} == {f"made-{u}": u for u in (0, 1000, 1001)}


def test_what_root_makes_in_the_working_folder_is_the_users(workbench, image, tmp_path):
    (tmp_path / "given").write_text("from outside")
    text = run(
        workbench, image, ["sh", "-c", "pwd; cat given; echo inside >made; chmod 640 made"], cwd=str(tmp_path)
    ).text
    assert text == f"{tmp_path}\nfrom outside"
    made = tmp_path / "made"
    assert (made.read_text(), made.stat().st_uid, stat.S_IMODE(made.stat().st_mode)) == ("inside\n", os.getuid(), 0o640)


def test_nothing_above_the_working_folder_is_seen(workbench, image, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "secret").write_text("no")
    text = run(
        workbench, image, ["sh", "-c", f"ls -a {tmp_path}; ls -a {tmp_path.parent}"], cwd=str(tmp_path / "work")
    ).text
    assert "secret" not in text
    assert set(text.split()) == {".", "..", "work", tmp_path.name}


def test_dot_files_of_a_home_are_covered(workbench, image, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_rsa").write_text("key")
    (home / ".netrc").write_text("password")
    (home / "notes").write_text("fine")
    monkeypatch.setenv("HOME", str(home))
    text = run(workbench, image, ["sh", "-c", "ls .ssh; cat .netrc notes; echo x >.ssh/y"], cwd=str(home)).text
    assert "id_rsa" not in text and "password" not in text
    assert "fine" in text
    assert os.listdir(home / ".ssh") == ["id_rsa"]


def test_the_store_cannot_be_the_working_folder(workbench, image):
    with pytest.raises(InvalidInput, match="work in another folder"):
        workbench.create(image, argv=["true"], cwd=workbench.home)


def test_mounts_are_read_only_when_asked(workbench, image, tmp_path):
    (tmp_path / "data").write_text("1")
    mounts = [Mount(str(tmp_path), "/data", read_only=True)]
    text = run(workbench, image, ["sh", "-c", "cat /data/data; echo 2 >/data/data"], mounts=mounts).text
    assert text.startswith("1")
    assert "Read-only file system" in text


@pytest.mark.parametrize("text", ["", "relative:x", "/nowhere-at-all", "/tmp:/etc", "/:/host", "a:b:c:d"])
def test_mounts_that_cannot_be_meant(text):
    with pytest.raises(InvalidInput):
        spec.parse_mount(text)


def test_a_command_that_is_not_there(workbench, image):
    with pytest.raises(LaunchFailed, match="'nope': no such program") as raised:
        run(workbench, image, ["nope"])
    assert raised.value.exit_code == 127
    assert workbench.ps(every=True) == []


def test_an_image_that_is_not_there(workbench):
    with pytest.raises(NotFound):
        workbench.create("nowhere", argv=["true"], cwd=None)


def test_changes_stay_and_unchanged_ones_go(workbench, image):
    assert not run(
        workbench, image, ["sh", "-c", "echo x >/tmp/x; mkdir -p /root/.cache/a; echo y >/root/.cache/a/y"]
    ).kept
    outcome = run(workbench, image, ["sh", "-c", "echo x >/opt/mine"])
    assert outcome.kept
    assert [row["id"] for row in workbench.ps(every=True)] == [outcome.id]
    assert workbench.ps() == []
    workbench.remove(outcome.id[:6], force=True)
    assert workbench.ps(every=True) == []


def test_deletions_and_new_folders_are_changes(workbench, image):
    for command in ("rm /etc/debian_version", "mkdir /opt/empty", "chmod 700 /etc/debian_version", "ln -s a /opt/b"):
        outcome = run(workbench, image, ["sh", "-c", command])
        assert outcome.kept, command
        workbench.remove(outcome.id, force=True)


def test_starting_anew_keeps_the_writable_layer(workbench, image):
    container = workbench.create(image, argv=["sh", "-c", "echo x >>/opt/count; exit $(wc -l </opt/count)"], cwd=None)
    for expected in (1, 2, 3):
        container.start().result(timeout=30)
        assert container.exited.result(timeout=30).code == expected
    assert container.settle()
    workbench.remove(container.id, force=True)


def test_signals_reach_the_group(workbench, image):
    container = workbench.create(image, argv=["sh", "-c", "trap 'echo got it; exit 7' INT; sleep 100 & wait"], cwd=None)
    reading, writing = os.pipe()
    container.start((0, writing, writing)).result(timeout=30)
    os.close(writing)
    time.sleep(0.3)
    container.signal(signal.SIGINT)
    assert container.exited.result(timeout=5).code == 7
    with os.fdopen(reading) as file:
        assert file.read() == "got it\n"
    container.settle()


def test_stop_from_another_process(workbench, image):
    container = workbench.create(image, argv=["sleep", "1000"], cwd=None)
    container.start().result(timeout=30)
    code = f"from workbench.workbench import Workbench; Workbench(home={workbench.home!r}).stop({container.id!r}, 2)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert container.exited.result(timeout=5).code == 143
    assert not container.settle()


def test_a_terminal_is_the_containers_own(workbench, image):
    container = workbench.create(
        image, argv=["sh", "-c", "tty; stty size; read line; echo got $line"], cwd=None, terminal=True
    )
    container.start((0, 1, 2)).result(timeout=30)
    os.write(container.terminal, b"hello\n")
    text = b""
    while True:
        try:
            piece = os.read(container.terminal, 1024)
        except OSError:
            break
        if not piece or b"got hello" in text + piece:
            text += piece
            break
        text += piece
    assert container.exited.result(timeout=10).code == 0
    container.settle()
    assert b"/dev/pts/0" in text
    assert b"got hello" in text


LAUNCH = """
import sys, time
from workbench.workbench import Workbench
wb = Workbench()
c = wb.create({image!r}, argv=["sh", "-c", {command!r}], cwd=None)
{start}.result()
print(c.id, c.pid, wb.containers.helper._process.pid, flush=True)
time.sleep(1000)
"""


def launch_elsewhere(image: str, command: str, start: str = "c.start()") -> tuple[subprocess.Popen[str], str, int, int]:
    code = LAUNCH.format(image=image, command=command, start=start)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    name, pid, helper = process.stdout.readline().split()
    return process, name, int(pid), int(helper)


def gone(pid: int, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_client_takes_its_containers_along(workbench, image, number):
    process, _, pid, helper = launch_elsewhere(image, "sleep 1000")
    process.send_signal(number)
    process.wait()
    assert gone(pid) and gone(helper)
    assert workbench.ps(every=True) == []


def test_a_killed_client_keeps_what_was_changed(workbench, image):
    process, name, pid, helper = launch_elsewhere(image, "echo x >/opt/mine; sleep 1000")
    until = time.monotonic() + 5
    while not (Path(workbench.home) / "containers" / name / "writable/upper/opt/mine").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert gone(pid) and gone(helper)
    (row,) = workbench.ps(every=True)
    assert (row["id"], row["exit"]["reason"]) == (name, "its launcher ended")
    workbench.remove(name, force=True)


@pytest.mark.parametrize("start", ["c.start()", 'wb.containers.helper.request("warm")'], ids=["started", "laid out"])
def test_a_killed_client_leaves_no_run_folder(workbench, image, start):
    """Also where the container's folder went before the helper got to it (staging is swept), or it knows of none."""
    process, name, pid, helper = launch_elsewhere(image, "sleep 1000", start)
    folder = Path(workbench.home) / "containers" / name
    run_dir = Path(json.loads((folder / "state.json").read_text())["run_dir"])
    assert run_dir.is_dir()
    os.kill(helper, signal.SIGSTOP)
    process.kill()
    process.wait()
    userns.call("workbench.linux.trees:remove", str(folder))
    os.kill(helper, signal.SIGCONT)
    assert gone(helper) and gone(pid)
    assert not run_dir.exists()


@pytest.mark.parametrize("taken", ["link", "open to all"])
def test_nothing_is_swept_where_somebody_else_has_taken_the_name(tmp_path, taken):
    """Below /tmp anybody can: a link would lead the sweep to folders of the user's own."""
    mine = tmp_path / "mine"
    (mine / "my-documents").mkdir(parents=True, mode=0o700)  # as long a name as a container's
    if taken == "link":
        (tmp_path / "base").symlink_to(mine)
    else:
        mine.rename(tmp_path / "base").chmod(0o777)
    with pytest.raises(Conflict, match="is not this user's own"):
        state.sweep_run_dirs(str(tmp_path / "base"))
    assert (tmp_path / "base" / "my-documents").is_dir()


def test_a_killed_helper_is_noticed_and_swept(workbench, image):
    process, name, pid, helper = launch_elsewhere(image, "echo x >/opt/mine; sleep 1000")
    time.sleep(0.3)
    os.kill(helper, signal.SIGKILL)
    assert gone(pid), "the kernel kills the init with its helper"
    process.kill()
    process.wait()
    assert workbench.sweep() == [name]
    (row,) = workbench.ps(every=True)
    assert row["status"] == "exited"
    workbench.remove(name, force=True)
    assert workbench.sweep() == []


def test_a_container_over_many_layers(workbench, image, tmp_path):
    layers = []
    for number in range(120):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / f"file{number}").write_text("x")
        layers.append(str(folder))
    base = workbench.store.image(workbench.refs.resolve(image))
    below = [str(workbench.store.layer(d)) for d in reversed(base.diff_ids)]
    wanted = spec.ContainerSpec(
        id="0123456789ab", argv=("sh", "-c", "ls / | grep -c ^file"), env=(("PATH", spec.DEFAULT_PATH),), cwd="/",
        layers=(*layers, *below), hostname="many", network="none",
    )  # fmt: skip
    container = workbench.containers.create(wanted, image=base.id)
    reading, writing = os.pipe()
    container.start((0, writing, writing)).result(timeout=30)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "120\n"
    container.exited.result(timeout=10)
    assert not container.settle()


def test_a_hostile_image_cannot_lead_the_mounts_outside(workbench, image, tmp_path):
    evil = tmp_path / "evil"
    (evil / "etc").mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.mkdir()
    os.symlink(f"{victim}/resolv", evil / "etc" / "resolv.conf")
    os.symlink(str(victim), evil / "srv")
    base = workbench.store.image(workbench.refs.resolve(image))
    below = [str(workbench.store.layer(d)) for d in reversed(base.diff_ids)]
    wanted = spec.ContainerSpec(
        id="0123456789ac", argv=("sh", "-c", "echo >>/etc/resolv.conf; echo >/srv/x; cat /srv/data/file"),
        env=(("PATH", spec.DEFAULT_PATH),), cwd="/", layers=(str(evil), *below), hostname="evil", network="none",
        mounts=(Mount(str(tmp_path / "data"), "/srv/data"),),
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("mounted")
    container = workbench.containers.create(wanted, image=base.id)
    reading, writing = os.pipe()
    container.start((0, writing, writing)).result(timeout=30)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert "mounted" in file.read()
    container.exited.result(timeout=10)
    container.settle()
    assert os.listdir(victim) == []
    assert list(workbench.containers) == []


def test_plan_is_readable(workbench, image, tmp_path):
    container = workbench.create(image, argv=["true"], cwd=str(tmp_path))
    text = workbench.describe(container)
    assert "overlay / of" in text and f"bind {tmp_path}" in text and "seccomp" in text
    container.remove()


def test_state_is_never_half_written(tmp_path):
    folder = str(tmp_path / "c")
    os.mkdir(folder)
    state.save(folder, {"id": "c", "a": 1})
    state.save(folder, {"id": "c", "a": 2}, durable=True)
    assert state.load(folder) == {"id": "c", "a": 2}
    assert os.listdir(folder) == ["state.json"]
