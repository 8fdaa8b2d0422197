"""What the kernel's files tell of links, and the settings below /proc/sys/net; no netlink, so anybody may look.

sysfs and /proc/sys show the network namespace of the process that mounted or asks: the host's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Literal

BRIDGE = "wb0"
LOCK = "/run/workbench-network.lock"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


class Lock:
    """Held while the shared things are looked at and changed; one for each host."""

    def __enter__(self) -> Lock:
        while True:
            self.fd = os.open(LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.fstat(self.fd).st_ino == os.stat(LOCK).st_ino:
                    return self
            os.close(self.fd)  # the last one took it along while we waited

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def remove(self) -> None:
        """Take the file away, too: nobody is left to need it."""
        with suppress(FileNotFoundError):
            os.unlink(LOCK)


def port_name(container_id: str) -> str:
    """The host's end of a container's pair of links."""
    return f"wb-{container_id[:8]}"


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot (proc(5), stat): with the pid it names one for good.

    Raises ProcessLookupError for one that has ended, even if nobody has waited for it.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, "the process has ended") from None
    if fields[0] in "ZX":
        raise ProcessLookupError(errno.ESRCH, "the process has ended")
    return fields[19]


def index(name: str) -> int:
    """The number of a device of this process's network namespace; 0 when there is none (netdevice(7))."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def bring_up(name: str) -> None:
    """Set a device of this process's network namespace up (netdevice(7)). Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", name.encode(), 0)
        flags = struct.unpack_from("16xh", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", name.encode(), flags | _IFF_UP))


def ports() -> list[str]:
    """The links on the bridge, by name."""
    try:
        return os.listdir(f"/sys/class/net/{BRIDGE}/brif")
    except OSError:
        return []


def alive(port: str) -> bool:
    """Whether the container behind a link runs: its helper holds the number that the link's alias names.

    Asked of the network namespace, for a pid says nothing to a helper in another pid namespace.
    """
    try:
        with open(f"/sys/class/net/{port}/ifalias") as file:
            slot = file.read().split()[2]
        with open("/proc/net/unix") as file:
            return any(line.endswith(f" @workbench-slot-{slot}\n") for line in file)
    except (OSError, IndexError):
        return False


def uplinks(process: int | Literal["self"] = "self") -> list[str]:
    """The devices of the IPv4 default routes in a process's network namespace (proc(5), net/route)."""
    with open(f"/proc/{process}/net/route") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return list(dict.fromkeys(row[0] for row in rows if row[1] == "00000000" and row[7] == "00000000"))


def has_default_route(process: int | Literal["self"] = "self") -> bool:
    """Whether a process's network namespace has one, IPv4 or IPv6 (proc(5), net/ipv6_route)."""
    with suppress(OSError):
        if uplinks(process):
            return True
    with suppress(OSError), open(f"/proc/{process}/net/ipv6_route") as file:
        return any(line.startswith("0" * 32 + " 00 ") and not line.endswith(" lo\n") for line in file)
    return False


def mtu(name: str) -> int:
    """The most bytes of a packet on a device; 1500 when nobody knows."""
    try:
        with open(f"/sys/class/net/{name}/mtu") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1500


def sysctl(path: str, value: str | None = None) -> str:
    """Read or write a file below /proc/sys/net; nothing where there is none."""
    try:
        with open(f"/proc/sys/net/{path}", "w" if value else "r") as file:
            if value:
                file.write(value)
                return value
            return file.read().strip()
    except FileNotFoundError:
        return ""


def without_ipv6(name: str) -> None:
    """No address by itself, no router advertisements: the bridge carries IPv4 only."""
    sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")


def forward(ways_out: list[str]) -> None:
    """Let packets pass between the bridge and the way out.

    Where the host forwards anyway nothing is touched. Otherwise only these devices do, not the host as a whole; the
    bridge's alias remembers which of them did not before.
    """
    if sysctl("ipv4/ip_forward") == "1":
        return
    alias = f"/sys/class/net/{BRIDGE}/ifalias"
    with open(alias) as file:
        changed = file.read().split()[1:]
    new = [name for name in ways_out if sysctl(f"ipv4/conf/{name}/forwarding") == "0"]
    if new:
        with open(alias, "w") as file:
            file.write(" ".join(["workbench", *dict.fromkeys([*changed, *new])]))
    for name in (BRIDGE, *new):
        sysctl(f"ipv4/conf/{name}/forwarding", "1")


def stop_forwarding() -> None:
    """Undo what ``forward`` did."""
    with suppress(OSError), open(f"/sys/class/net/{BRIDGE}/ifalias") as file:
        changed = file.read().split()[1:]
        if sysctl("ipv4/ip_forward") == "0":  # else somebody else wants it by now
            for name in changed:
                sysctl(f"ipv4/conf/{name}/forwarding", "0")
