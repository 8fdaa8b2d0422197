"""A container that takes all it can get, or leaves behind what is hard to remove, hurts nobody else."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.containers.inside import PYTHON, run
from workbench.containers import state
from workbench.containers.container import Container
from workbench.jupyter import connection
from workbench.linux import cgroup
from workbench.model import Limits
from workbench.workbench import Workbench

GROUPS = cgroup.find().kind != "none"


def begin(workbench: Workbench, image: str, code: str, limits: Limits | None = None) -> Container:
    """Start Python inside and wait until it says "ready"."""
    container = workbench.create(image, argv=[PYTHON, "-uc", code], cwd=None, network="none", limits=limits)
    container.start().result(timeout=30)
    until = time.monotonic() + 20
    while "ready" not in Path(container.log).read_text(errors="replace"):
        assert time.monotonic() < until and not container.exited.done(), Path(container.log).read_text()
        time.sleep(0.01)
    return container


def end(workbench: Workbench, container: Container, seconds: float = 10.0) -> None:
    """Kill and remove it; both are quick whatever it did."""
    begin = time.monotonic()
    container.kill()
    container.exited.result(timeout=seconds)
    if container.settle():
        workbench.remove(container.id, force=True)
    assert time.monotonic() - begin < seconds
    assert not os.path.exists(container.folder)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends and is reaped in time."""
    until = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{pid}")


BOMB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
told = False
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        if not told:
            print("ready"); told = True
        time.sleep(0.01)
"""


def test_a_fork_bomb_is_contained_and_others_go_on(workbench, image):
    bomb = begin(workbench, image, BOMB, Limits(processes=64))
    assert run(workbench, image, ["sh", "-c", "sleep 0 & wait"], network="none").end.code == 0
    end(workbench, bomb)


@pytest.mark.skipif(not GROUPS, reason="without control groups the kernel has no limit for a container's memory files")
@pytest.mark.parametrize("place", ["/dev/shm/x", "/run/x", "/tmp/x", "memfd", "mqueue"])
def test_memory_that_hides_in_files_counts(workbench, image, place):
    code = f"""
import os
fd = os.memfd_create("x") if {place!r} == "memfd" else os.open({place!r}, os.O_CREAT | os.O_RDWR)
for _ in range(400):
    os.write(fd, b"x" * (1 << 20))
print("wrote it all")
"""
    if place == "mqueue":
        code = """
import ctypes, itertools
rt = ctypes.CDLL("librt.so.1", use_errno=True)
for n in itertools.count():
    q = rt.mq_open(b"/q%d" % n, 0o102, 0o600, None)
    if q < 0 or n > 10000:
        print("refused at", n); break
    for _ in range(10):
        rt.mq_send(q, b"x" * 8192, 8192, 0)
"""
    outcome = run(workbench, image, [PYTHON, "-c", code], limits=Limits(memory=100 << 20), network="none")
    if place == "mqueue":
        assert "refused" in outcome.text or outcome.end.limit == "memory"
    elif place == "/tmp/x":  # the disk's
        assert outcome.end.code == 0
    else:
        assert "wrote it all" not in outcome.text
        assert outcome.end.limit == "memory" or "No space left" in outcome.text


TREES = {
    "deep": """
import os
os.chdir("/opt")
for n in range(1500):
    os.mkdir("d" * 20); os.chdir("d" * 20)
open("bottom", "w").close()
""",
    "deep in /tmp": """
import os
open("/opt/x", "w").close()
os.chdir("/tmp")
for n in range(1500):
    os.mkdir("d" * 20); os.chdir("d" * 20)
""",
    "deep and closed": """
import os
os.chdir("/opt")
for n in range(300):
    os.mkdir("d"); os.chmod("d", 0o700); os.chdir("d")
for n in range(300):
    os.chdir(".."); os.chmod("d", 0)
""",
    "many": """
import os
os.makedirs("/opt/many")
os.chdir("/opt/many")
for n in range(20000):
    os.close(os.open(str(n), os.O_CREAT))
""",
    "odd names": r"""
import os
os.chdir("/opt")
for n in range(1, 256):
    if n != 47:
        os.mkdir(bytes([n]) * 200)
        open(bytes([n]) * 200 + b"/" + bytes([n]) * 255, "w").close()
for name in ("..x", "-rf", ".deep-0", ".gone-x", "new\nline", "...", " "):
    os.mkdir(name)
""",
    "sparse": """
import os
fd = os.open("/opt/sparse", os.O_CREAT | os.O_RDWR)
for size in (1 << 50, 1 << 43, 1 << 40, 1 << 35):
    try:
        os.ftruncate(fd, size); break
    except OSError:
        pass
""",
    "kinds": """
import os, socket
os.mkfifo("/opt/fifo"); os.symlink("/", "/opt/root"); os.symlink("x" * 4000, "/opt/long")
socket.socket(socket.AF_UNIX).bind("/opt/socket")
os.mkdir("/opt/closed", 0o000); os.link("/opt/fifo", "/opt/linked")
os.setxattr("/opt", "user.x", b"y" * 1000)
for path in ("/opt/closed", "/opt/fifo"):
    os.chown(path, 65534, 65534)
""",
    "the layer's own marks": """
import os
for name, value in {"opaque": b"y", "redirect": b"/../../../../etc", "metacopy": b""}.items():
    os.makedirs("/opt/marked", exist_ok=True)
    try: os.setxattr("/opt/marked", "user.overlay." + name, value)
    except OSError: pass
try: os.mknod("/opt/whiteout", 0o020000, 0)
except OSError: pass
""",
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "single"),
    # Many files take seconds, and nothing about them depends on ids.
    [(what, single) for what in TREES for single in (False, True) if not (single and what == "many")],
)
def test_whatever_is_left_can_be_kept_listed_and_removed(image, monkeypatch, what, single):
    if single:
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    workbench = Workbench()
    try:
        outcome = run(workbench, image, [PYTHON, "-c", TREES[what]], network="none")
        assert (outcome.end.code, outcome.text) == (0, "")
        assert outcome.kept
        assert outcome.id in {row["id"] for row in workbench.ps(every=True)}
        workbench.remove(outcome.id, force=True)
        assert outcome.id not in os.listdir(workbench.containers.folder)
        assert not [name for name in os.listdir(workbench.containers.folder) if outcome.id in name]
    finally:
        workbench.close()


def test_the_run_folder_may_hold_anything(workbench, image, tmp_path):
    """What a container leaves beside its sockets is removed, never followed, also at its next start."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("the host's")
    code = f"""
import os
os.chdir("/run/workbench")
for name in ("k-1", "k-2", "connection.json", ".connection.json.1", "folder"):
    if not os.path.lexists(name): os.symlink({str(victim / "file")!r}, name)
if not os.path.lexists("deep"):
    os.mkdir("deep"); os.chdir("deep")
    for n in range(300):
        os.mkdir("d" * 50); os.chdir("d" * 50)
    os.chmod(".", 0)
"""
    container = workbench.create(image, argv=[PYTHON, "-c", code], cwd=None, network="none")
    run_dir = container.run_dir
    for _ in range(2):
        container.start().result(timeout=20)
        container.exited.result(timeout=20)
        content = connection.guest_content(key="k", signature_scheme="hmac-sha256", kernel_name="x", curve=None)
        connection.clear_sockets(run_dir)
        connection.write_guest(run_dir, content)
    assert (victim / "file").read_text() == "the host's"
    assert not container.settle()
    assert not os.path.exists(run_dir)


# Talks the init out of ending with its helper: prctl(PR_SET_PDEATHSIG, 0), made by ptrace(2).
OUTLIVE = """
import ctypes, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
ATTACH, GETREGS, SETREGS, STEP, DETACH = 16, 12, 13, 9, 17
if libc.ptrace(ATTACH, 1, None, None):
    print("ready, refused"); time.sleep(1000)
os.waitpid(1, 0x40000000)
saved = (ctypes.c_ulonglong * 27)()
libc.ptrace(GETREGS, 1, None, saved)
regs = (ctypes.c_ulonglong * 27)(*saved)
regs[16] -= 2                      # rip: back to the syscall instruction that it waits in
regs[10] = 157                     # rax: prctl
regs[15] = 2**64 - 1               # orig_rax: not a call to be restarted
regs[14], regs[13] = 1, 0          # rdi, rsi: PR_SET_PDEATHSIG, none
libc.ptrace(SETREGS, 1, None, regs)
libc.ptrace(STEP, 1, None, None)
os.waitpid(1, 0x40000000)
libc.ptrace(GETREGS, 1, None, regs)
print("ready, worked" if regs[10] == 0 else f"ready, {regs[10]}")
libc.ptrace(SETREGS, 1, None, saved)
libc.ptrace(DETACH, 1, None, None)
open("/opt/x", "w").close()
while True:
    time.sleep(1)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the registers of x86_64")
def test_nothing_outlives_a_killed_helper(workbench, image):
    container = begin(workbench, image, OUTLIVE)
    text = Path(container.log).read_text()
    pid = container.pid
    os.kill(workbench.containers.helper._process.pid, signal.SIGKILL)
    assert container.exited.result(timeout=10).code == 137
    assert gone(pid), text
    workbench.containers.sweep()
    for row in workbench.ps(every=True):
        workbench.remove(row["id"], force=True)
    container._close()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the registers of x86_64")
def test_what_outlives_helper_and_client_is_swept(workbench, image):
    """As above, with a client that was killed as well: its own descriptor of the init is gone, too."""
    container = begin(workbench, image, OUTLIVE)
    pid, process = container.pid, workbench.containers.helper._process
    container.kill = lambda: None  # the client is not there to do it
    os.kill(process.pid, signal.SIGKILL)
    container.exited.result(timeout=10)
    if "ready, worked" in Path(container.log).read_text():
        assert os.path.exists(f"/proc/{pid}"), "the trick works: else this test proves nothing"
    known = state.load(container.folder)
    state.save(container.folder, known | {"maker": [known["maker"][0], 1]})
    assert workbench.containers.sweep() == [container.id]
    assert gone(pid)
    for row in workbench.ps(every=True):
        workbench.remove(row["id"], force=True)
    container._close()


def test_descriptors_of_the_helper_do_not_run_out(workbench, image):
    """Whatever ends well or badly gives its descriptors back."""
    run(workbench, image, ["true"], network="none")
    folder = f"/proc/{workbench.containers.helper._process.pid}/fd"
    before = len(os.listdir(folder))
    for command in (["true"], ["nope"], ["sh", "-c", "kill -9 $$"], ["/etc"], ["x" * 5000]) * 3:
        try:
            run(workbench, image, command, network="none")
        except Exception as error:
            assert "LaunchFailed" in type(error).__name__
    assert len(os.listdir(folder)) <= before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before


def test_a_stopped_or_deaf_container_is_killed(workbench, image):
    code = """
import os, signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.kill(1, signal.SIGSTOP)
print("ready")
os.kill(0, signal.SIGSTOP)
"""
    container = begin(workbench, image, code)
    container.signal(signal.SIGTERM)
    end(workbench, container, 5.0)
