"""A container that stands still for a moment, and goes on whatever becomes of who wanted that.

By the freezer of its control group (cgroups(7)), else by SIGSTOP to each of its processes. A process of its own does
it, the *guard*, which wakes the container as soon as the other end of its socket is closed, by intent or by death;
when it is killed itself, who started it does so. It stays outside of the user's namespaces, since only from there it
has rights over all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from workbench.linux import processes, userns
from workbench.linux.cgroup import Cgroup
from workbench.model import Conflict, HostLacks

_TIMEOUT = 10.0  # seconds until every process stands still


@contextmanager
def guard(container_id: str, init: int) -> Iterator[int]:
    """A guard that waits; a descriptor for ``paused``, to be handed to whoever calls that. init: the init's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        arguments = [str(theirs.fileno()), container_id, str(init)]
        process = userns.spawn("workbench.containers.pause:main", (theirs.fileno(),), arguments, inside=False)
        theirs.close()
        try:
            yield ours.fileno()
        finally:
            ours.close()
            if process.wait() < 0:
                _let_go(container_id, init)


@contextmanager
def paused(fd: int) -> Iterator[None]:
    """Until the end of the block nothing in the container runs. fd: the guard's, for any number of times.

    Raises Conflict.
    """
    with socket.socket(fileno=os.dup(fd)) as guarded:
        try:
            guarded.send(b"pause")
            answer = guarded.recv(256)
            if answer != b"paused":
                said = answer.decode(errors="replace") or "its processes would not stand still"
                raise Conflict("pause a container", said, "try again")
            yield
            guarded.send(b"go on")
            guarded.recv(16)
        except (BrokenPipeError, ConnectionResetError):
            raise Conflict("pause a container", "the process that does it was killed", "try again") from None


def _let_go(container_id: str, init: int) -> None:
    """In place of a guard that was killed. What somebody else has stopped by a signal goes on as well."""
    with suppress(OSError, HostLacks):
        if group := Cgroup.of(container_id):
            group.thaw()
    with suppress(OSError):
        for pid in processes.members(init):
            if pid != init and processes.state(pid) in "tT":
                os.kill(pid, signal.SIGCONT)


def main(fd: str, container_id: str, init: str) -> None:
    """The guard's life (``userns.spawn``)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(fd)) as channel:
        while channel.recv(16):
            _pause(channel, container_id, int(init))


def _pause(channel: socket.socket, container_id: str, init: int) -> None:
    """Once, until the other end says something or is closed."""
    group = Cgroup.of(container_id)
    stopped: set[int] = set()
    try:
        try:
            if group is None:
                raise HostLacks("freeze a container", "there is no control group")
            group.freeze(_TIMEOUT)
        except (HostLacks, PermissionError):
            group = None
            _stop_all(init, stopped)
        channel.send(b"paused")
        channel.recv(16)
    except OSError as error:
        with suppress(OSError):
            channel.send(str(error.strerror or error).encode()[:200])
    finally:
        if group is not None:
            group.thaw()
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        with suppress(OSError):
            channel.send(b"going on")


def _stop_all(init: int, stopped: set[int]) -> None:
    """SIGSTOP to all but the init, again and again until there is none left that runs: they may fork meanwhile."""
    until = time.monotonic() + _TIMEOUT
    while True:
        restless = 0
        for pid in processes.members(init):
            if pid == init or (state := processes.state(pid)) in "ZX" or (state in "tT" and pid in stopped):
                continue
            restless += 1
            if state not in "tT":  # what somebody else has stopped stays so
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.add(pid)
            else:
                restless -= 1
        if not restless:
            return
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.001)
