"""The command line, interrupted at a system call of one's choice: killed there, or told that the disk is full or bad.

A filter (seccomp_unotify(2)) asks this process before each call that changes a file of the store, whichever process of
the command makes it, whatever environment and namespace that has. So the calls are those that the kernel sees, and
they are counted as they come.

``Commands`` is what tests use. It talks to one process that has imported the command line and forks for each command:
otherwise most of the time would go into imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
KILL = "kill"
FAULTS = (KILL, "ENOSPC", "EIO")

_AT_FDCWD = -100
#: Calls that name what they change: where the folder's descriptor and the name stand, and whether they take space.
_BY_NAME = {
    "open": ((None, 0), True), "openat": ((0, 1), True), "creat": ((None, 0), True),
    "mkdir": ((None, 0), True), "mkdirat": ((0, 1), True), "mknod": ((None, 0), True), "mknodat": ((0, 1), True),
    "rename": ((None, 1), True), "renameat": ((2, 3), True), "renameat2": ((2, 3), True),
    "link": ((None, 1), True), "linkat": ((2, 3), True), "symlink": ((None, 1), True), "symlinkat": ((1, 2), True),
    "rmdir": ((None, 0), False), "unlink": ((None, 0), False), "unlinkat": ((0, 1), False),
    "chmod": ((None, 0), False), "fchmodat": ((0, 1), False), "truncate": ((None, 0), False),
    "chown": ((None, 0), False), "lchown": ((None, 0), False), "fchownat": ((0, 1), False),
    "setxattr": ((None, 0), True), "lsetxattr": ((None, 0), True), "removexattr": ((None, 0), False),
    "utimensat": ((0, 1), False),
}  # fmt: skip
#: Calls on an open file: which argument it is.
_BY_DESCRIPTOR = {
    "write": (0, True), "pwrite64": (0, True), "writev": (0, True), "copy_file_range": (2, True),
    "sendfile": (0, True), "fallocate": (0, True), "fsync": (0, True), "fdatasync": (0, True), "syncfs": (0, True),
    "fsetxattr": (0, True), "ftruncate": (0, False), "fchmod": (0, False), "fchown": (0, False),
    "fremovexattr": (0, False),
}  # fmt: skip
#: Where the flags of a call stand that changes nothing without O_CREAT.
_FLAGS = {"open": 1, "openat": 2}


@dataclass(frozen=True)
class Done:
    """A command that has ended. code: negative for a signal; calls: what it changed, as text; at: the call that was
    interrupted, as text; peak: bytes of memory of its largest process."""

    code: int
    out: str
    err: str
    calls: list[str]
    at: str
    peak: int


class Commands:
    """Commands over one ``home``; ``places``: what is below these counts."""

    def __init__(self, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP,
            env=os.environ | env | {"PYTHONPATH": str(TOP)},
        )  # fmt: skip
        # While it is just being executed its environment reads as empty, so that nobody could tell whose it is.
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def run(
        self, *words: str, number: int = 0, fault: str = "", places: tuple[str, ...] = (), cwd: str = "/", **env: str
    ) -> Done:  # fmt: skip
        """Run one. number: the call that is interrupted, from 1; 0 for none; fault: one of FAULTS."""
        request = {"words": words, "number": number, "fault": fault, "places": places, "cwd": cwd, "env": env}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=20)


@contextlib.contextmanager
def commands(**env: str) -> Iterator[Commands]:
    """Them, ended at the end."""
    made = Commands(**env)
    try:
        yield made
    finally:
        made.close()


def every(total: int, wanted: int) -> list[int]:
    """``wanted`` numbers from 1 to ``total``, evenly spread; all where WORKBENCH_TEST_POINTS is ``all``."""
    if os.environ.get("WORKBENCH_TEST_POINTS") == "all" or wanted >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(step * (total - 1) / (wanted - 1)) for step in range(wanted)})


# --- the process that forks ----------------------------------------------------------------------------------


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp (seccomp_rule_add(3))."""

    _fields_ = (("index", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


_ALLOW, _NOTIFY, _NNP, _MASKED_EQ = 0x7FFF0000, 0x7FC00000, 3, 7
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # linux/seccomp.h
_NOTIFICATION = struct.Struct("QIIiIQ6Q")  # struct seccomp_notif


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison)
    ]  # fmt: skip
    return library


def _filter(library: ctypes.CDLL) -> int:
    """Put this process under it; the descriptor on which it asks."""
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if os.geteuid() == 0:  # newuidmap of an ordinary user would not work with no_new_privs, which they need for it
        library.seccomp_attr_set(context, _NNP, 0)
    for name in (*_BY_NAME, *_BY_DESCRIPTOR):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # not on this machine
            continue
        at = _FLAGS.get(name)
        asked = None if at is None else (_Comparison * 1)(_Comparison(at, _MASKED_EQ, os.O_CREAT, os.O_CREAT))
        if library.seccomp_rule_add_array(context, _NOTIFY, number, 0 if asked is None else 1, asked):
            raise OSError(f"no rule for {name}")
    if error := library.seccomp_load(context):
        raise OSError(-error, "load a filter")
    return int(library.seccomp_notify_fd(context))


class _Supervisor:
    """Answers one command's filter."""

    def __init__(self, names: dict[int, str], request: dict[str, Any]) -> None:
        self.names, self.places = names, tuple(request["places"])
        self.number, self.fault = request["number"], request["fault"]
        self.calls: list[str] = []
        self.at = ""

    def serve(self, fd: int) -> None:
        """Until every process under the filter is gone."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            ((_, events),) = poll.poll(120_000) or (((), select.POLLHUP),)
            if not events & select.POLLIN:
                return
            asked = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(fd, _RECEIVE, asked)
            except OSError:  # whoever asked is gone
                continue
            notice, pid, _, call, _, _, *arguments = _NOTIFICATION.unpack(asked)
            error = self._answer(pid, self.names[call], arguments)
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, _SEND, struct.pack("QqiI", notice, 0, -error, 0 if error else _CONTINUE))

    def _answer(self, pid: int, call: str, arguments: list[int]) -> int:
        try:
            path = _path(pid, call, arguments)
        except OSError:  # gone, or a descriptor of nothing
            return 0
        if not path.startswith(self.places):
            return 0
        takes_space = (_BY_NAME.get(call) or _BY_DESCRIPTOR[call])[1]
        if self.fault == "ENOSPC" and not takes_space:
            return 0
        if self.fault not in ("", KILL) and path.startswith("/sys/"):
            return 0
        self.calls.append(f"{call} {path}")
        if len(self.calls) != self.number:
            return 0
        self.at = self.calls[-1]
        if self.fault == KILL:
            os.kill(pid, signal.SIGKILL)
            return errno.EINTR
        return int(getattr(errno, self.fault))


def _path(pid: int, call: str, arguments: list[int]) -> str:
    """What a call changes."""
    if call in _BY_DESCRIPTOR:
        return os.readlink(f"/proc/{pid}/fd/{arguments[_BY_DESCRIPTOR[call][0]] & 0xFFFFFFFF}")
    (folder, name), _ = _BY_NAME[call]
    path = _text(pid, arguments[name]) if arguments[name] else ""
    if path.startswith("/"):
        return os.path.normpath(path)
    at = _AT_FDCWD if folder is None else struct.unpack("i", struct.pack("I", arguments[folder] & 0xFFFFFFFF))[0]
    above = os.readlink(f"/proc/{pid}/cwd" if at == _AT_FDCWD else f"/proc/{pid}/fd/{at}")
    return os.path.normpath(os.path.join(above, path))


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < 4096:
            start = address + len(data)
            data += os.pread(memory.fileno(), min(256, 4096 - start % 4096), start)
    return os.fsdecode(data.partition(b"\0")[0])


def _command(request: dict[str, Any], library: ctypes.CDLL | None, channel: socket.socket, out: int, err: int) -> None:
    """The child's side: never returns."""
    from workbench.__main__ import main

    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv = ["workbench", *request["words"]]
    if library is not None:
        fd = _filter(library)
        socket.send_fds(channel, [b"f"], [fd])
        os.close(fd)
    channel.close()
    main()


def _serve(request: dict[str, Any], library: ctypes.CDLL, names: dict[int, str]) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    out, err = os.memfd_create("out"), os.memfd_create("err")
    supervisor = _Supervisor(names, request)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _command(request, library if request["places"] else None, theirs, out, err)
        finally:
            sys.stderr.flush()
            os._exit(99)
    theirs.close()
    if request["places"]:
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        for fd in fds:
            supervisor.serve(fd)
            os.close(fd)
    ours.close()
    _, status, usage = os.wait4(pid, 0)
    texts = []
    for fd in (out, err):
        texts.append(os.pread(fd, 1 << 20, 0).decode(errors="replace"))
        os.close(fd)
    return {
        "code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1], "calls": supervisor.calls,
        "at": supervisor.at, "peak": usage.ru_maxrss * 1024,
    }  # fmt: skip


def _main() -> None:
    import workbench.__main__
    import workbench.cli.app
    import workbench.cli.history
    import workbench.history.share
    import workbench.history.snapshot
    import workbench.images.check
    import workbench.jupyter.kernelspecs
    import workbench.workbench  # noqa: F401

    library = _library()
    names = {
        library.seccomp_syscall_resolve_name(name.encode()): name for name in (*_BY_NAME, *_BY_DESCRIPTOR)
    }  # fmt: skip
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line), library, names)), flush=True)


if __name__ == "__main__":
    _main()
