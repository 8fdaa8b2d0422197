"""Makes TCP ports on a container's loopback reachable as Unix sockets of its run folder; nothing else of it is.

For kernels that cannot speak over Unix sockets. A process of the helper's sits in the container's network
namespace and in no other of its namespaces, so nothing inside can see or signal it, and no port opens on the host.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterable

from workbench.containers.relay import Relay, port
from workbench.linux import syscalls as sc
from workbench.linux.sockets import bind_private

#: Seconds that clients have to take what a kernel said before its end.
PATIENCE = 0.5


class Forward:
    """Runs from ``start`` to ``stop``."""

    def __init__(self, pid: int, end: int) -> None:
        self._pid, self._end = pid, end

    @classmethod
    def start(cls, target: int, run_dir: str, names: Iterable[tuple[str, int]]) -> Forward:
        """Listen for a container. target: a pidfd of its init; names: of each socket, and its port. Raises OSError."""
        channels = [(_listen(os.path.join(run_dir, name)), str(number)) for name, number in names]
        reading, writing = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                _serve(parent, target, channels, reading, writing)
        except OSError:
            os.close(writing)
            raise
        finally:
            for listener, _ in channels:
                listener.close()
            os.close(reading)
        return cls(pid, writing)

    def stop(self) -> None:
        """The container has ended: what it said still reaches those who take it within ``PATIENCE``."""
        os.close(self._end)
        until = time.monotonic() + PATIENCE + 0.2
        while time.monotonic() < until:
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                return
            time.sleep(0.002)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bind_private(listener, path)
    listener.listen(128)
    return listener


def _serve(parent: int, target: int, channels: list[tuple[socket.socket, str]], end: int, other: int) -> None:
    """The forked process; does not return."""
    code = 1
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        os.close(other)
        sc.setns(target, sc.CLONE_NEWNET)
        sc.close_all_but(end, *(listener.fileno() for listener, _ in channels))
        relay = Relay(channels, port)
        over = False

        def ended(_events: int) -> None:
            nonlocal over
            over = True

        relay.watch(end, ended, select.EPOLLIN | select.EPOLLHUP)
        while not over:
            relay.step(None)
        relay.unwatch(end)
        relay.kernel_gone()
        until = time.monotonic() + PATIENCE
        while relay.links and time.monotonic() < until:
            relay.step(0.02)
        code = 0
    finally:
        os._exit(code)
