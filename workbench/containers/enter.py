"""What runs on the way into the new namespaces; everything here is between clone and exec.

Two processes, both forks of the helper: the *child*, which becomes the container's init, waits and at the end
gives up its rights; the *worker* joins the child's namespaces and lays its root out. The child never mounts, so
that it could as well be a process that has lived for a while (a warm start).
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import stat
import termios
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from workbench.linux import mounts, seccomp
from workbench.linux import syscalls as sc

#: The namespaces that a container is born into; ``host`` networking leaves one out. The seventh, of control groups,
#: it makes itself: what is its root there is decided by where the maker is.
NAMESPACES = (
    sc.CLONE_NEWUSER | sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWNET | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS
)  # fmt: skip

COMMAND_NOT_FOUND = 127


def in_child(
    barrier: socket.socket,
    *,
    init_fd: int,
    argv: Sequence[str],
    env: dict[str, str],
    cwd: str,
    stdio: Sequence[int],
    terminal: bool,
    capabilities: frozenset[str],
    filter_program: bytes,
    rlimits: Iterable[tuple[int, int, int]],
    set_groups: bool,
) -> NoReturn:
    """The child's way from clone to exec: wait for "go", take on root's ids inside, drop rights, become the init.

    barrier: one byte "g" comes in when the namespaces are ready; a line of text goes out when something failed,
    and end of file when exec took place (the socket closes on exec). stdio: three descriptors, ignored with a
    ``terminal``. init_fd: the static init program. Never returns.
    """
    what = "wait for the helper"
    code = 126
    out = barrier.fileno()
    try:
        if barrier.recv(1) != b"g":
            os._exit(code)
        what = "make the control group namespace"
        sc.unshare(sc.CLONE_NEWCGROUP)
        what = "take on the ids of root inside"
        os.setsid()
        sc.new_session_keyring()
        if set_groups:
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.umask(0o022)
        what = "set the limits"
        for kind, soft, hard in rlimits:
            resource.setrlimit(kind, (soft, hard))
        what = "open the standard streams"
        _standard_streams(stdio, terminal)
        what = f"enter the folder {cwd}"
        os.chdir(cwd)
        what = f"find the command {argv[0]!r}"
        _find(argv[0], env.get("PATH", ""))
        what = "drop rights"
        # What the helper or Python ignores would stay ignored through exec.
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        # The barrier becomes fd 3 and the init fd 4, both closing on exec; nothing else crosses.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (out, init_fd)]
        os.dup2(high[0], 3, inheritable=False)
        os.dup2(high[1], 4, inheritable=False)
        out = 3
        sc.close_range(5)
        sc.set_capabilities(capabilities)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
        # After the change of ids, which clears it; the helper is the parent for as long as this socket is open.
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        sc.prctl(sc.PR_SET_DUMPABLE, 1)
        what = "load the system call filter"
        if filter_program:
            seccomp.load(filter_program)
        what = "start the init"
        os.execve(4, ["init", "-g", "--", *argv], env)
    except BaseException as error:
        if isinstance(error, FileNotFoundError) and what.startswith("find"):
            code = COMMAND_NOT_FOUND
        text = error.strerror if isinstance(error, OSError) else str(error)
        with suppress(OSError):
            os.write(out, f"{code} {what}: {text}".encode(errors="backslashreplace"))
    finally:  # whatever goes wrong up there, this process is never a second helper
        os._exit(code)


def _standard_streams(stdio: Sequence[int], terminal: bool) -> None:
    if terminal:
        fd = os.open("/dev/pts/0", os.O_RDWR)
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
        stdio = (fd, fd, fd)
    # Move them out of the way first: one of them may be 0, 1 or 2 itself.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in stdio]
    for number, fd in enumerate(high):
        os.dup2(fd, number)


def _find(command: str, path: str) -> None:
    candidates = [command] if "/" in command else [os.path.join(p, command) for p in path.split(":") if p]
    found = False
    for candidate in candidates:
        with suppress(OSError):
            if stat.S_ISREG(os.stat(candidate).st_mode):
                if os.access(candidate, os.X_OK):
                    return
                found = True
    if found:
        raise PermissionError(13, "it is no program")
    raise FileNotFoundError(2, "no such program in the container")


def in_worker(
    report: socket.socket,
    child: int,
    steps: Sequence[mounts.Mount],
    *,
    sources: dict[str, int],
    contents: dict[str, bytes],
    hostname: str,
    terminal: bool,
    loopback_up: Callable[[], None] | None,
    kept: str = "",
) -> NoReturn:
    """The worker, born into the child's pid namespace: join its others and lay the root out.

    child: a pidfd; sources: host paths already opened as detached trees; contents: host files already read;
    loopback_up: None where the network is the host's; kept: a file of the new root that is to be changed from outside.
    Reports ``ok`` (with descriptors of the terminal's master and of that file, where they were asked for), else what
    failed. Never returns.
    """
    what = "join the namespaces"
    try:
        # Ids first: what is not mapped may not make a file (EOVERFLOW), and nobody may look into us meanwhile.
        sc.prctl(sc.PR_SET_DUMPABLE, 0)
        kinds = NAMESPACES & ~sc.CLONE_NEWPID
        if loopback_up is None:
            kinds &= ~sc.CLONE_NEWNET
        sc.setns(child, kinds)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.umask(0o022)
        what = "set the host name"
        socket.sethostname(hostname)
        if loopback_up:
            what = "bring up the loopback interface"
            loopback_up()
        what = "begin the mount namespace"
        root = mounts.begin()
        root.sources, root.contents = sources, contents
        for step in steps:
            what = step.describe()
            step.execute(root)
        fds = []
        if terminal:
            what = "open a terminal"
            fds.append(sc.openat2(root.fd, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY))
            fcntl.ioctl(fds[0], termios.TIOCSPTLCK if hasattr(termios, "TIOCSPTLCK") else 0x40045431, b"\0\0\0\0")
        if kept:
            what = f"open {kept}"
            fds.append(sc.openat2(root.fd, kept, os.O_RDWR))
        what = "change the root"
        mounts.finish(root)
        socket.send_fds(report, [b"ok"], fds)
        os._exit(0)
    except BaseException as error:
        text = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.filename else str(error)
        with suppress(OSError):
            report.send(f"{what}: {text}".encode(errors="backslashreplace"))
    finally:
        os._exit(1)
