"""The network of a container whose user is not root: passt's pasta(1), one process for each container.

It makes a tap device inside and carries what goes out over ordinary sockets of the user. The gateway is not mapped to
the host and no port is forwarded, so the host's loopback stays out of reach.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time

from workbench.containers import links, resolver
from workbench.linux import syscalls as sc
from workbench.model import HostLacks

_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT = 15.0
_F_ADD_SEALS, _F_SEAL_GROW = 1033, 4


class Pasta:
    """A running pasta; it ends with ``stop``, with its container or with the process that made it."""

    #: Whether one has come up completely: then its sandbox works on this host.
    _proved = False

    def __init__(self, pid: int) -> None:
        """Connect the network namespace of the process ``pid``, in a user namespace below ours.

        Returns when addresses and routes are there. Raises HostLacks.
        """
        program = find()
        _reap()
        self.pid = self._ready = -1
        self._messages = os.memfd_create("pasta", os.MFD_ALLOW_SEALING)
        os.ftruncate(self._messages, 4096)
        fcntl.fcntl(self._messages, _F_ADD_SEALS, _F_SEAL_GROW)  # so that no guest fills it
        # Read or not, the pipe stays open: pasta would end by SIGPIPE.
        self._ready, written = os.pipe()
        try:
            parent = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                self._become(program, pid, written, parent)
            os.close(written)
            written = -1
            self._wait(pid)
        except BaseException:
            self.stop()
            raise
        finally:
            if written >= 0:
                os.close(written)
            os.close(self._messages)

    def _become(self, program: str, target: int, written: int, parent: int) -> None:
        """In the forked child: turn into pasta."""
        try:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            null = os.open("/dev/null", os.O_RDWR)
            # Out of the way first: one of them may be 0 to 3 itself.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (null, null, self._messages, written)]
            for number, fd in enumerate(high):
                os.dup2(fd, number, inheritable=True)
            sc.close_range(4)
            # pasta takes an ignored SIGPIPE, which it inherits from Python, for an error.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.execv(program, [program, *arguments(target, "/dev/fd/3")])
        except BaseException as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(1)

    def _wait(self, target: int) -> None:
        """Until the default route is there; the first time until pasta has also shut itself in (40 ms more).

        It writes its pid then; the end of the pipe is its death.
        """
        poll = select.poll()
        poll.register(self._ready, select.POLLIN)
        deadline = time.monotonic() + _TIMEOUT
        while not (Pasta._proved and links.has_default_route(target)):
            if poll.poll(1 if Pasta._proved else 1000):
                if os.read(self._ready, 32):
                    Pasta._proved = True
                    return
                self._refuse(self._words() or "pasta ended without a word")
            if time.monotonic() > deadline:
                self._refuse(self._words() or f"pasta was not ready after {_TIMEOUT:.0f} s")

    def _words(self) -> str:
        text = os.pread(self._messages, 4096, 0).rstrip(b"\0").decode(errors="replace")
        return next((line for line in reversed(text.splitlines()) if line.strip()), "")

    def _refuse(self, obstacle: str) -> None:
        raise HostLacks("connect a container to the network", obstacle, "or choose network none or host")

    def stop(self) -> None:
        """End it, without waiting: the kernel takes 20 ms to remove the tap device."""
        if self.pid > 0:
            try:
                os.kill(self.pid, signal.SIGKILL)
                _ending.add(self.pid)
            except ProcessLookupError:
                pass
            self.pid = -1
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        _reap()


#: Killed, but perhaps not gone yet.
_ending: set[int] = set()


def _reap() -> None:
    for pid in list(_ending):
        try:
            gone = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:
            gone = pid
        if gone:
            _ending.discard(pid)


def find() -> str:
    """The program; raises HostLacks when it is missing or could not make its device."""
    tried = "connect a container to the network"
    for folder in os.environ.get("PATH", _SEARCH).split(":"):
        program = os.path.join(folder, "pasta")
        if os.access(program, os.X_OK):
            break
    else:
        raise HostLacks(tried, "pasta is missing", "apt-get install passt, or choose network none or host")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostLacks(tried, "/dev/net/tun is missing", "modprobe tun, or choose network none or host") from None
    except OSError as error:
        obstacle = f"/dev/net/tun cannot be opened ({error.strerror})"
        raise HostLacks(tried, obstacle, "chmod 666 /dev/net/tun, or choose network none or host") from None
    return program


def arguments(target: int, pid_file: str) -> list[str]:
    """pasta's command line: out is open, in and back to the host is not."""
    forward = [] if resolver.nameservers(rootful=False) else ["--dns-forward", resolver.FORWARDED]
    return [
        # --runas: it takes uid 0 of a small user namespace for the host's root, and would become nobody.
        "--foreground", "--quiet", "--runas", "0", "--ns-ifname", "eth0", "--config-net", "--no-map-gw", *forward,
        "-t", "none", "-u", "none", "-T", "none", "-U", "none",
        "--pid", pid_file, "--userns", f"/proc/{target}/ns/user", "--netns", f"/proc/{target}/ns/net",
    ]  # fmt: skip
