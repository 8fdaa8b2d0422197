"""A named network, ``lan:NAME``: containers of one user that join it reach each other by name, and nobody else's.

A process of its own, the *switch*, carries Ethernet frames between tap devices, one in each member's network
namespace. Whoever has a tap device's descriptor can do that (the kernel's networking/tuntap), so that it works alike
with and without root, and between helpers that have no rights over each other's namespaces. The switch starts with
the first member and ends with the last; names are lines in the members' /etc/hosts (hosts(5)), which it keeps.

What a member sends is believed as far as it is its own: a frame with another's address goes nowhere.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from workbench.containers import links
from workbench.linux import syscalls as sc
from workbench.linux.sockets import bind_private
from workbench.model import HostLacks, LaunchFailed

DEVICE = "lan0"
#: The first that no route of the host leads into; members of different networks may have the same addresses.
_RANGES = ("10.214.0.0/16", "10.86.0.0/16", "172.28.0.0/16", "10.175.0.0/16")
_MTU = 65520  # bytes: the larger, the fewer frames are carried
_FRAME = _MTU + 14
_HOSTS = 1 << 16  # bytes: a longer /etc/hosts is left as it is
_TIMEOUT = 10.0  # seconds
_MOST = 1024  # members

# netdevice(7), linux/if_tun.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _SIOCSIFHWADDR = 0x8916, 0x891C, 0x8922, 0x8924
_IPV4, _ARP = b"\x08\x00", b"\x08\x06"


def join(home: str, name: str, *, target: int, hosts: int, names: Sequence[str]) -> None:
    """Make a container a member; returns when the others can reach it.

    home: the store, which is the user's alone; target: a pidfd of the container's init, with which membership ends;
    hosts: its /etc/hosts, open for reading and writing; names: of this member. Raises HostLacks, LaunchFailed.
    """
    tried = f"join the network {name}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise HostLacks(tried, "/dev/net/tun cannot be opened", "modprobe tun, chmod 666 /dev/net/tun")
    folder = os.path.join(home, "networks")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _door(place, name) as door:
            socket.send_fds(door, [json.dumps({"names": list(names)}).encode()], [target, hosts])
            answer = json.loads(door.recv(4096) or b"{}")
            if "address" not in answer:
                raise LaunchFailed(tried, answer.get("obstacle", "its switch has ended"))
            _make_device(door, target, answer)
            if door.recv(16) != b"joined":
                raise LaunchFailed(tried, "its switch has ended")
    except OSError as error:
        raise LaunchFailed(tried, error.strerror or str(error)) from None
    finally:
        os.close(place)


def _door(place: int, name: str) -> socket.socket:
    """A connection to the network's switch, started where there is none. place: the folder of all sockets."""
    fcntl.flock(place, fcntl.LOCK_EX)  # no switch ends meanwhile
    try:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = f"/proc/self/fd/{place}/{name}"  # a socket's name has 108 bytes (unix(7))
        door.settimeout(_TIMEOUT)
        try:
            door.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            bind_private(listener, path)
            listener.listen(64)
            _start(listener, place, name)
            listener.close()
            door.connect(path)
        return door
    finally:
        fcntl.flock(place, fcntl.LOCK_UN)


def _make_device(door: socket.socket, target: int, answer: dict[str, Any]) -> None:
    """In a process that enters the container's network namespace, for not everybody finds the way back."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sc.setns(target, sc.CLONE_NEWNET)
            socket.send_fds(door, [b"device"], [_device(**answer)])
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(max(code, 1), os.strerror(max(code, 1)))


def _device(address: str, mac: str, mask: str) -> int:
    """A tap device with that address in this process's network namespace; its descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    name = DEVICE.encode()
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TAP | _IFF_NO_PI))
    with suppress(OSError):
        links.without_ipv6(DEVICE)  # the switch carries none
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFHWADDR, struct.pack("16sH6s16x", name, 1, bytes.fromhex(mac)))
        fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si20x", name, _MTU))
        for request, text in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, mask)):
            packed = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, socket.inet_aton(text))
            fcntl.ioctl(sock, request, packed)
    links.bring_up(DEVICE)
    return tap


# --- the switch: a process of its own -------------------------------------------------------------------------


def _start(listener: socket.socket, place: int, name: str) -> None:
    """Fork it, so that it is nobody's child: it outlives the helper that has the first member."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            # The lock is that of an open file: with the helper's, it would hold what the helper holds.
            own = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            sc.close_all_but(listener.fileno(), own)
            for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            network = _free_range()
            sc.set_capabilities(frozenset())
            _Switch(listener, own, name, network).serve()
    finally:
        os._exit(0)


def _free_range() -> ipaddress.IPv4Network:
    """Judged by the host's routes (proc(5), net/route); the first where all are taken."""
    taken = []
    with suppress(OSError), open("/proc/net/route") as file:
        for fields in (line.split() for line in file.readlines()[1:]):
            number, mask = (int.from_bytes(bytes.fromhex(fields[column]), "little") for column in (1, 7))
            if mask:
                taken.append(ipaddress.IPv4Network((number, mask.bit_count()), strict=False))
    ranges = [ipaddress.IPv4Network(text) for text in _RANGES]
    return next((one for one in ranges if not any(one.overlaps(other) for other in taken)), ranges[0])


@dataclass(slots=True, eq=False)
class _Member:
    """A container: its init, its /etc/hosts, its names and addresses; its device once it has sent it."""

    door: socket.socket
    init: int
    hosts: int
    names: tuple[str, ...]
    address: bytes
    mac: bytes
    tap: int = -1


class _Switch:
    """Serves one network until its last member has gone."""

    def __init__(self, listener: socket.socket, place: int, name: str, network: ipaddress.IPv4Network) -> None:
        self.listener, self.place, self.name, self.network = listener, place, name, network
        self.members: list[_Member] = []
        self.by_mac: dict[bytes, _Member] = {}
        self.last = 1
        self.buffer = bytearray(_FRAME + 64)
        self.poll = select.epoll()
        self.acts: dict[int, tuple[Any, _Member | None]] = {}
        self.changed = False  # whether a descriptor's number may mean something else by now
        self._watch(listener.fileno(), self._newcomer, None)
        listener.setblocking(False)

    def serve(self) -> None:
        """Carry frames; look every now and then whether anybody is left."""
        lonely = time.monotonic()
        while True:
            self.changed = False
            for fd, _ in self.poll.poll(-1 if self.members else 0.05):
                act, member = self.acts[fd]
                act(member)
                if self.changed:  # what else was ready still is
                    break
            if self.members:
                lonely = time.monotonic()
            elif time.monotonic() - lonely >= 0.05 and self._closed():
                return

    def _closed(self) -> bool:
        """Whether the network could be given up: nobody stands before the door, and nobody can come to it now."""
        try:
            fcntl.flock(self.place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._newcomer(None)
        if not self.members:
            with suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.place)
            return True
        fcntl.flock(self.place, fcntl.LOCK_UN)
        return False

    def _watch(self, fd: int, act: Any, member: _Member | None) -> None:
        self.changed = True
        self.acts[fd] = act, member
        self.poll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        self.changed = True
        if self.acts.pop(fd, None):
            self.poll.unregister(fd)

    def _newcomer(self, _member: _Member | None) -> None:
        try:
            door, _ = self.listener.accept()
        except OSError:
            return
        door.settimeout(_TIMEOUT)
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(door, 4096, 2)
            asked = json.loads(data)
            init, hosts = fds
            address = self._free_address()
            if address is None:
                raise ValueError
        except (OSError, ValueError):
            for fd in fds:
                os.close(fd)
            with suppress(OSError):
                door.send(json.dumps({"obstacle": f"it has {_MOST} members already"}).encode())
            door.close()
            return
        mac = b"\x02wb\x00" + address[2:]
        member = _Member(door, init, hosts, tuple(asked["names"]), address, mac)
        self.members.append(member)
        self._watch(init, self._gone, member)
        self._watch(door.fileno(), self._device, member)
        text = {"address": socket.inet_ntoa(address), "mac": mac.hex(), "mask": str(self.network.netmask)}
        with suppress(OSError):
            door.send(json.dumps(text).encode())

    def _free_address(self) -> bytes | None:
        """The next one: what has just been somebody's is not at once another's."""
        taken = {member.address for member in self.members}
        if len(taken) >= _MOST:
            return None
        while True:
            self.last = self.last + 1 if self.last < self.network.num_addresses - 2 else 2
            address = self.network[self.last].packed
            if address not in taken:
                return address

    def _device(self, member: _Member) -> None:
        """A member has made its device, or has died over it."""
        fds: list[int] = []
        with suppress(OSError):
            _, fds, _, _ = socket.recv_fds(member.door, 16, 1)
        self._forget(member.door.fileno())
        if not fds:
            self._gone(member)
            return
        member.tap = fds[0]
        os.set_blocking(member.tap, False)
        self.by_mac[member.mac] = member
        self._watch(member.tap, self._carry, member)
        self._tell_names()
        with suppress(OSError):
            member.door.send(b"joined")
        member.door.close()

    def _gone(self, member: _Member) -> None:
        self.members.remove(member)
        self.by_mac.pop(member.mac, None)
        if member.door.fileno() >= 0:
            self._forget(member.door.fileno())
            member.door.close()
        for fd in (member.init, member.tap):
            if fd >= 0:
                self._forget(fd)
                os.close(fd)
        os.close(member.hosts)
        self._tell_names()

    def _carry(self, member: _Member) -> None:
        """Up to a few dozen frames, then the others' turn."""
        view = memoryview(self.buffer)
        for _ in range(64):
            try:
                size = os.readv(member.tap, [self.buffer])
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    self._gone(member)
                return
            frame = view[:size]
            if not _own(frame, member):
                continue
            if frame[0] & 1:  # to all (or to a group)
                receivers = [other for other in self.by_mac.values() if other is not member]
            else:
                found = self.by_mac.get(bytes(frame[:6]))
                receivers = [found] if found else []
            for other in receivers:
                with suppress(OSError):  # full, or its end has begun
                    os.write(other.tap, frame)

    def _tell_names(self) -> None:
        """Everybody's /etc/hosts names everybody."""
        rows = [f"{socket.inet_ntoa(one.address)} {' '.join(one.names)}" for one in self.by_mac.values()]
        begin, end = f"# network {self.name}", f"# end of network {self.name}"
        block = "\n".join([begin, *rows, end]) + "\n"
        for member in self.by_mac.values():
            with suppress(OSError):
                text = os.pread(member.hosts, _HOSTS, 0).decode(errors="surrogateescape")
                if len(text) >= _HOSTS:
                    continue
                before, mark, rest = text.partition(begin + "\n")
                after = rest.partition(end + "\n")[2] if mark else ""
                data = (before + block + after).encode(errors="surrogateescape")
                os.pwrite(member.hosts, data, 0)
                os.ftruncate(member.hosts, len(data))


def _own(frame: memoryview, member: _Member) -> bool:
    """Whether a frame says where it comes from, and is of a kind that is carried: IPv4 or ARP (RFC 791, 826)."""
    if len(frame) < 34 or frame[6:12] != member.mac:
        return False
    kind = frame[12:14]
    if kind == _IPV4:
        return frame[26:30] == member.address
    return kind == _ARP and frame[22:28] == member.mac and frame[28:32] == member.address
