"""A hostile program in a container tries to get more than it was given (DESIGN, threats); each attempt fails."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.inside import PYTHON, run
from workbench.containers import spec
from workbench.linux import seccomp
from workbench.workbench import Workbench

SCRIPT = (Path(__file__).parent / "attacks.py").read_text()

#: Not one of them may do anything, whatever the arguments.
REFUSED = [
    "acct", "add_key", "bpf", "clock_settime", "create_module", "delete_module", "fanotify_init", "finit_module",
    "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "init_module", "io_uring_enter", "io_uring_register",
    "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "listmount",
    "lookup_dcookie", "lsm_list_modules", "migrate_pages", "mount", "mount_setattr", "move_mount", "move_pages",
    "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "pivot_root", "process_madvise", "query_module",
    "quotactl", "quotactl_fd", "reboot", "request_key", "set_mempolicy_home_node", "setdomainname", "sethostname",
    "setns", "settimeofday", "statmount", "swapoff", "swapon", "sysfs", "_sysctl", "syslog", "umount2", "unshare",
    "uselib", "userfaultfd", "ustat", "vhangup",
]  # fmt: skip
#: Allowed for harmless arguments; the script knows which are not.
SPECIAL = ("capset", "clock_adjtime", "clone", "ioctl", "personality", "prctl", "ptrace", "socket")


@pytest.fixture(scope="module", params=["usual", "single", "host"])
def found(request: pytest.FixtureRequest, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What came of all attempts, in one container: as usual, with a single id, with the host's network."""
    library = seccomp._library()
    numbers = {name: library.seccomp_syscall_resolve_name(name.encode()) for name in (*REFUSED, *SPECIAL)}
    numbers |= {"listmount": 458, "statmount": 457, "lsm_list_modules": 461}
    abstract = f"wb-test-{secrets.token_hex(8)}"
    given = {
        "numbers": {name: number for name, number in numbers.items() if number >= 0},
        "special": SPECIAL, "host_pid": os.getpid(), "abstract": abstract,
    }  # fmt: skip
    patch = pytest.MonkeyPatch()
    if request.param == "single":
        patch.setenv("WORKBENCH_SINGLE_ID", "1")
    patch.setenv("SECRET_OF_THE_HOST", "not for guests")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + abstract)
        listener.listen()
        workbench = Workbench()
        try:
            outcome = run(
                workbench, image, [PYTHON, "-c", SCRIPT, json.dumps(given)],
                cwd=str(tmp_path_factory.mktemp("work")), network="host" if request.param == "host" else "none",
            )  # fmt: skip
            result = outcome.json | {"kind": request.param, "id": outcome.id, "home": workbench.home}
            if outcome.kept:
                workbench.remove(outcome.id, force=True)
            yield result
        finally:
            workbench.close()
            patch.undo()


def test_system_calls_are_refused(found):
    assert len(found["refused_calls"]) > 90
    assert {name: end for name, end in found["refused_calls"].items() if end != "EPERM"} == {}


def test_newer_system_calls_are_not_there(found):
    assert set(found["missing_calls"].values()) == {"ENOSYS"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the foreign ABIs of x86_64")
def test_foreign_abis_end_the_process(found):
    assert found["foreign_abis"] == dict.fromkeys(("int 0x80", "x32"), f"signal {signal.SIGSYS.value}")


def test_rights_cannot_grow(found):
    rights = found["rights"]
    assert rights["before"] == rights["after"]
    wanted = sum(1 << spec.sc.CAPABILITIES.index(name) for name in spec.CAPABILITIES)
    assert int(rights["after"]["CapPrm"], 16) == int(rights["after"]["CapBnd"], 16) == wanted
    assert set(rights["attempts"].values()) - {"worked"} <= {"EPERM", "EINVAL"}
    assert {k for k, v in rights["attempts"].items() if v == "worked"} <= {"file capabilities"}  # of no use, see below
    programs = rights["programs"]
    if found["kind"] != "single":  # where everybody is root
        assert re.search(r"Uid:\s+1000\s+1000\s+1000", programs["setuid"])
        assert "CapEff:\t0000000000000000" in programs["plain"]
    assert programs["plain"] == programs["setuid"]
    # The kernel does not even start what should get more than the bounding set has.
    assert programs["capable"] in ("", programs["plain"])


def test_no_device_can_be_made(found):
    assert found["devices"] == {"opened": [], "terminals": ["ptmx"], "tty": "ENXIO", "disks": []}


def test_settings_of_the_kernel_are_read_only(found):
    parts = found["proc_and_sys"]
    assert parts["seen"] > 500
    # To be told of pressure is anybody's right.
    assert [path for path in parts["opened"] if not path.startswith("/proc/pressure/")] == []
    assert "worked" not in parts["maps"].values(), parts["maps"]
    if found["kind"] != "host":
        assert parts["cgroups"] == []
    assert all(" ro," in line.partition(" - ")[0] for line in parts["cgroups"])


def test_no_process_of_the_host_is_in_reach(found):
    processes = found["processes"]
    assert processes["outside"] == []
    assert set(processes["pids"]) <= {"1", "2", "3"}
    assert processes["group"] == 1
    for name, end in processes.items():
        if name.endswith(" host"):
            assert end == "ESRCH", name


def test_the_init_is_nobodys_to_change(found):
    processes = found["processes"]
    assert processes["init exe"] == "/init"
    attempts = {name: end for name, end in processes.items() if name.startswith("init ") and name != "init exe"}
    assert len(attempts) == 6
    if found["kind"] == "single":  # where giving away seems to work and does nothing
        assert attempts.pop("init chown") == "worked"
    assert set(attempts.values()) <= {"EROFS", "EPERM", "EACCES", "ETXTBSY"}, attempts


def test_nothing_of_the_host_is_told(found):
    processes = found["processes"]
    assert set(processes["descriptors"]) == {"0", "1", "2"}
    assert "SECRET_OF_THE_HOST" not in processes["environ"]
    told = processes["mountinfo"] + processes["cgroup"] + " ".join(processes["descriptors"].values())
    assert found["home"] not in told
    assert "containers/" not in told


def test_a_chroot_inside_leads_nowhere(found):
    assert found["escape_by_chroot"]["hostname"] == found["escape_by_chroot"]["own"] == found["id"]


def test_the_network_is_not_the_containers_to_change(found):
    attempts = found["network_rights"]
    abstract = attempts.pop("abstract")
    # With the host's network its abstract sockets come along; that is what was asked for.
    assert abstract == ("worked" if found["kind"] == "host" else "ECONNREFUSED")
    assert set(attempts.values()) <= {"EPERM", "EACCES"}, attempts


def test_time_keys_and_dumps(found):
    part = found["time_and_keys"]
    assert part.pop("keys seen") == ""
    assert part.pop("core limit") == [0, 0]
    assert set(part.values()) <= {"EPERM", "EACCES", "EROFS", "EINVAL", "ENOENT"}, part
