"""User namespaces: whose ids a container may use, and code that runs where those ids mean something.

The namespace *B* of the design: the host's own when its user is real root, else one in which uid 0 is the
user and 1… are the sub-ids of /etc/subuid (subuid(5), newuidmap(1), user_namespaces(7)).
"""

from __future__ import annotations

import importlib
import json
import os
import pwd
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from workbench.linux import syscalls as sc
from workbench.model import HostLacks, LaunchFailed, WorkbenchError

#: Ids of one container as people expect them: root, the system's, the users', nobody's (65534).
IDS = 65536
#: Where real root takes the containers' own ranges from, one slot of IDS each (above every usual account
#: and below the 2**31 that some tools cannot read).
ROOT_BASE = 0x40000000


#: Milliseconds between two looks at who waits for a process apart.
_OFTEN = 100


@dataclass(frozen=True, slots=True)
class HostIds:
    """What ids this process may hand to a container.

    kind: ``root`` (any id), ``range`` (own id and a sub-id range), ``single`` (own id only);
    sub_uids, sub_gids: first id and number of the range, (0, 0) where there is none.
    """

    kind: Literal["root", "range", "single"]
    uid: int
    gid: int
    sub_uids: tuple[int, int] = (0, 0)
    sub_gids: tuple[int, int] = (0, 0)

    def base_map(self) -> tuple[str, str]:
        """uid_map and gid_map of B as seen from the host."""
        if self.kind == "root":
            whole = "0 0 4294967295"
            return whole, whole
        return _map(self.uid, self.sub_uids), _map(self.gid, self.sub_gids)

    def container_map(self, slot: int) -> str:
        """uid_map (and gid_map) of a container as seen from B; ``slot`` is its number among the running."""
        if self.kind == "root":
            return f"0 {ROOT_BASE + slot * IDS} {IDS}"
        if self.kind == "single":
            return "0 0 1"
        # Two extents, since B's map has two: an extent has to lie within one of the parent's.
        return f"0 0 1\n1 1 {min(self.sub_uids[1], self.sub_gids[1], IDS - 1)}"

    def container_root(self, slot: int) -> int:
        """The host's uid of a container's root."""
        return ROOT_BASE + slot * IDS if self.kind == "root" else self.uid


def _map(own: int, sub: tuple[int, int]) -> str:
    return f"0 {own} 1" + (f" 1 {sub[0]} {min(sub[1], IDS - 1)}" if sub[1] else "")


def in_initial_namespace() -> bool:
    """Whether this process lives in the host's own user namespace, judged by its whole id map."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def host_ids() -> HostIds:
    """The ids of this process, from the kernel and /etc/subuid, /etc/subgid (read anew: admins edit them).

    ``WORKBENCH_SINGLE_ID=1`` in the environment leaves a range aside, to see what a host without one sees.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and in_initial_namespace() and not os.environ.get("WORKBENCH_SINGLE_ID"):
        return HostIds("root", uid, gid)
    from shutil import which  # as subprocess below: 4 ms of each process inside, where neither is needed

    sub_uids, sub_gids = _sub_ids("/etc/subuid", uid), _sub_ids("/etc/subgid", uid)
    tools = which("newuidmap") and which("newgidmap")
    if os.environ.get("WORKBENCH_SINGLE_ID") or not (tools and sub_uids[1] and sub_gids[1]):
        return HostIds("single", uid, gid)
    return HostIds("range", uid, gid, sub_uids, sub_gids)


def _sub_ids(path: str, uid: int) -> tuple[int, int]:
    """The largest range that a file grants to a user, by name or by number."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    best = (0, 0)
    try:
        with open(path) as file:
            for line in file:
                fields = line.strip().split(":")
                granted = len(fields) == 3 and fields[0] in (name, str(uid)) and fields[2].isdigit()
                if granted and int(fields[2]) > best[1]:
                    best = (int(fields[1]), int(fields[2]))
    except FileNotFoundError:
        pass
    return best


# What a fresh interpreter does first: find the package, enter B if there is one, call the function.
# -I -S keep the environment, the user's site and site-packages' start-up code out; packages are added by path.
_BOOTSTRAP = (
    "import sys; sys.path[:0] = sys.argv[1].split(':'); from workbench.linux import userns; userns._main(*sys.argv[2:])"
)


def _python_path(target: str) -> list[str]:
    """Where a bare interpreter finds this package, that of ``target``, and what they are installed beside."""
    packages = [importlib.import_module(name.partition(":")[0].partition(".")[0]) for name in (__name__, target)]
    tops = [os.path.dirname(os.path.dirname(os.path.abspath(str(package.__file__)))) for package in packages]
    sites = (path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages")))
    return list(dict.fromkeys([*tops, *sites]))


class Process(Protocol):
    """What is needed of a process: ``subprocess.Popen`` has it, and ``Forked``."""

    pid: int

    @property
    def returncode(self) -> int | Any:
        """The exit code once it was waited for, negative for a signal."""

    def wait(self) -> int:
        """Until it has ended; the exit code."""

    def kill(self) -> None:
        """SIGKILL."""


class Forked:
    """A child that was forked, not executed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._reaping = threading.Lock()

    def wait(self) -> int:
        """Until it has ended; the exit code, negative for a signal."""
        with self._reaping:  # from several threads, but once
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, unless it was waited for already."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def _fork(keep: tuple[int, ...], arguments: list[str]) -> Forked:
    """``_main(*arguments)`` in a copy of this process that keeps no more of it than a fresh one would have."""
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sc.close_all_but(*keep)
        environment = _environment()
        os.environ.clear()
        os.environ.update(environment)
        _main(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def spawn(
    target: str, fds: tuple[int, ...], arguments: list[str], *, fork: bool = False, found_by: str = "",
    inside: bool = True,
) -> Process:  # fmt: skip
    """Start ``module:function(*arguments)`` in a fresh Python inside B, as root there, with ``fds`` kept open.

    fork: a copy of this process instead, which saves 50 ms; only while it has one thread. found_by: a module of
    another package that must be found there, too. inside: False for one that stays outside, as the user: such a
    process has rights over each B of the user's (user_namespaces(7)), where one B has none over another. Returns once
    the namespace stands. Raises HostLacks when it cannot be made.
    """
    import subprocess

    ids = host_ids()
    enter = inside and ids.kind != "root"
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    try:
        words = [ids.kind if enter else "root", str(ready_w), str(go_r), target, *arguments]
        process: Process
        if fork:
            process = _fork((*fds, ready_w, go_r), words)
        else:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, ":".join(_python_path(found_by or target)), *words],
                pass_fds=(*fds, ready_w, go_r), stdin=subprocess.DEVNULL, start_new_session=True,
                env=_environment(), cwd="/",
            )  # fmt: skip
        os.close(ready_w)
        os.close(go_r)
        ready_w = go_r = -1
        if enter:
            try:
                if os.read(ready_r, 1) != b"1":
                    raise HostLacks(
                        "make a user namespace",
                        "the kernel refuses them to this user",
                        "run `jupyter workbench doctor`, it names the setting",
                    )
                _write_maps(process.pid, ids)
            except BaseException:
                process.kill()
                process.wait()
                raise
        os.write(go_w, b"1")
        return process
    finally:
        for fd in (ready_r, ready_w, go_r, go_w):
            if fd >= 0:
                os.close(fd)


def _environment() -> dict[str, str]:
    keep = ("PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "WORKBENCH_SINGLE_ID", "TZ")
    env = {name: os.environ[name] for name in keep if name in os.environ}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env, "LC_ALL": "C.UTF-8"}


def _write_maps(pid: int, ids: HostIds) -> None:
    if ids.kind == "single":
        for name, text in (("setgroups", "deny"), ("uid_map", ids.base_map()[0]), ("gid_map", ids.base_map()[1])):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(text)
        return
    import subprocess

    for tool, text in zip(("newuidmap", "newgidmap"), ids.base_map(), strict=True):
        done = subprocess.run([tool, str(pid), *text.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostLacks(
                f"map the user's id range with {tool}",
                done.stderr.strip() or f"exit code {done.returncode}",
                "check /etc/subuid and /etc/subgid with `jupyter workbench doctor`",
            )


def _main(kind: str, ready: str, go: str, target: str, *arguments: str) -> None:
    """The fresh interpreter's side of ``spawn``."""
    ready_fd, go_fd = int(ready), int(go)
    if kind != "root":
        try:
            sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
        except OSError:
            os.write(ready_fd, b"0")
            sys.exit(1)
        try:
            os.write(ready_fd, b"1")
        except BrokenPipeError:  # who asked was killed
            sys.exit(1)
    if os.read(go_fd, 1) != b"1":
        sys.exit(1)
    if kind != "root":
        os.setresgid(0, 0, 0)
        if kind == "range":
            os.setgroups([])
        os.setresuid(0, 0, 0)
    os.close(ready_fd)
    os.close(go_fd)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(*arguments)


def call(
    target: str, *args: Any, fds: tuple[int, ...] = (), apart: bool = False,
    meanwhile: Callable[[], None] | None = None, memory: int | None = None,
) -> Any:  # fmt: skip
    """``module:function(*args)`` where the user's container ids can be read, written and given away.

    As real root that is here and now; otherwise, or if it is to be ``apart`` (it forks, and here may be threads), in a
    fresh Python inside B. Arguments and result are JSON; ``fds`` keep their numbers. WorkbenchErrors and OSErrors
    cross over. meanwhile: called some ten times a second while that Python works; what it raises ends it. memory: bytes
    that it may have in memory, looked at as often; with more it is ended, and MemoryError raised. Raises HostLacks when
    B cannot be made.
    """
    if host_ids().kind == "root" and not apart:
        module, function = target.split(":")
        return getattr(importlib.import_module(module), function)(*args)
    with os.fdopen(os.memfd_create("workbench-call"), "w+b") as exchange:
        exchange.write(json.dumps({"target": target, "args": args}).encode())
        exchange.flush()
        number = exchange.fileno()
        process = spawn("workbench.linux.userns:_serve_call", (number, *fds), [str(number)], found_by=target)
        try:
            if meanwhile is not None or memory is not None:
                _attend(process.pid, meanwhile, memory)
            process.wait()
        except BaseException:  # Ctrl-C: nothing goes on behind the user's back
            process.kill()
            process.wait()
            raise
        exchange.seek(0)
        raw = exchange.read()
    try:
        answer = json.loads(raw)
    except ValueError:
        answer = {}
    if "value" in answer:
        return answer["value"]
    if "errno" in answer:
        raise OSError(answer["errno"], answer["strerror"], answer["filename"])
    if "error" in answer:
        raise WorkbenchError.from_dict(answer)
    raise LaunchFailed(f"run {target}", f"its process ended with {process.returncode}")


def _attend(pid: int, meanwhile: Callable[[], None] | None, memory: int | None) -> None:
    """Until a child has ended, with no delay at that. Its memory is looked at from here, and it is killed for it: a
    Python that is refused memory cannot even end in order."""
    from workbench.linux import processes  # needed by long work alone

    fd = os.pidfd_open(pid)
    try:
        ended = select.poll()  # a server may have more descriptors than select(2) takes
        ended.register(fd, select.POLLIN)
        while not ended.poll(_OFTEN):
            if meanwhile is not None:
                meanwhile()
            if memory is not None and processes.resident(pid) > memory:
                raise MemoryError(f"more than {memory} bytes")
    finally:
        os.close(fd)


def _serve_call(exchange: str) -> None:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)  # the thread that called waits for us; without it, stop
    fd = int(exchange)
    with os.fdopen(os.dup(fd), "r+b") as file:
        file.seek(0)
        request = json.loads(file.read())
        answer: dict[str, Any]
        try:
            module, function = request["target"].split(":")
            answer = {"value": getattr(importlib.import_module(module), function)(*request["args"])}
        except WorkbenchError as error:
            answer = error.as_dict()
        except OSError as error:
            name = error.filename.decode() if isinstance(error.filename, bytes) else error.filename
            answer = {"errno": error.errno, "strerror": error.strerror, "filename": name}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(answer).encode())
