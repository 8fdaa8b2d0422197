"""Stands in for a helper: a container's namespaces without a container, connected by ``network``, and code run inside.

Called through ``userns.call``, so it runs where a helper would: as real root, or in the user's namespace B.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from workbench.containers import launch, network
from workbench.linux import syscalls as sc
from workbench.linux import userns

#: The ids, as the helper is told them; inside B they can't be asked for any more.
Ids = dict[str, Any]


class Guest:
    """An init that waits in its own namespaces, as a container's does before its exec."""

    def __init__(self, ids: Ids, kind: str = "outbound") -> None:
        given = {**ids, "sub_uids": tuple(ids["sub_uids"]), "sub_gids": tuple(ids["sub_gids"])}
        self.ids = userns.HostIds(**given)
        self.id = os.urandom(6).hex()
        self.rootful = self.ids.kind == "root"
        self.slot, self.lock = launch.take_slot() if self.rootful else (0, -1)
        read, write = os.pipe()
        self.pid = sc.clone(sc.CLONE_NEWUSER | sc.CLONE_NEWNET | sc.CLONE_NEWPID, signal.SIGCHLD)
        if self.pid == 0:
            try:
                sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
                sc.close_range(write + 1)
                os.close(write)
                os.read(read, 1)
            finally:
                os._exit(0)
        os.close(read)
        self.hold = write
        text = self.ids.container_map(self.slot)
        if self.ids.kind == "single":
            _put(f"/proc/{self.pid}/setgroups", "deny")
        for name in ("uid_map", "gid_map"):
            _put(f"/proc/{self.pid}/{name}", text)
        self.run(network.loopback_up)
        self.attachment = network.Attachment()
        begin = time.perf_counter()
        try:
            self.attachment = network.attach(
                kind, pid=self.pid, slot=self.slot, container_id=self.id, rootful=self.rootful
            )
        except BaseException:
            self.end()
            raise
        self.ms = (time.perf_counter() - begin) * 1e3

    def run(self, code: Callable[..., Any], *args: Any) -> Any:
        """What ``code`` returns in the guest's namespaces."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                sc.prctl(sc.PR_SET_DUMPABLE, 0)
                user, own = (os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net"))
                sc.setns(user, sc.CLONE_NEWUSER)
                sc.setns(own, sc.CLONE_NEWNET)
                os.write(write, json.dumps({"value": code(*args)}).encode())
            except BaseException as error:
                os.write(write, json.dumps({"error": repr(error)}).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            answer = json.loads(file.read())
        os.waitpid(child, 0)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["value"]

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.hold)
        self.attachment.detach()
        if self.lock >= 0:
            os.close(self.lock)


def _put(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


@contextmanager
def guests(ids: Ids, count: int = 1, kind: str = "outbound") -> Iterator[list[Guest]]:
    made: list[Guest] = []
    try:
        for _ in range(count):
            made.append(Guest(ids, kind))
        yield made
    finally:
        for guest in made:
            guest.end()
        network.close()


# --- asked inside ---------------------------------------------------------------------------------------------


def interfaces() -> dict[str, bool]:
    """Name -> up."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        import fcntl

        for _, name in socket.if_nameindex():
            flags = fcntl.ioctl(sock, 0x8913, struct.pack("16sh22x", name.encode(), 0))
            found[name] = bool(struct.unpack_from("16xh", flags)[0] & 1)
    return found


def addresses() -> list[str]:
    """IPv4 addresses by the route that a packet to the world would take."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("198.51.100.1", 9))
        return [sock.getsockname()[0]]


def connect(host: str, port: int, timeout: float = 2.0) -> bool:
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def abstract(name: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect("\0" + name)
        except OSError:
            return False
        return True


def fetch(host: str) -> str:
    """The first line of the answer of http://host/."""
    with socket.create_connection((host, 80), 15) as sock:
        sock.sendall(f"HEAD / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return sock.recv(100).decode(errors="replace").splitlines()[0]


def ask_name(server: str, name: str) -> str:
    """An IPv4 address of a name, asked of that server by UDP (RFC 1035)."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack("!6H", 0x4242, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        for attempt in range(3):
            sock.sendto(query, (server, 53))
            try:
                answer = sock.recv(4096)
                break
            except TimeoutError:
                if attempt == 2:
                    raise
    at = len(query)
    while at < len(answer):
        kind, _, _, length = struct.unpack_from("!HHIH", answer, at + 2)
        if kind == 1:
            return socket.inet_ntoa(answer[at + 12 : at + 16])
        at += 12 + length
    return ""


# --- called through userns.call -------------------------------------------------------------------------------


def look(ids: Ids, kind: str, host_ports: list[int], host_address: str, abstract_name: str) -> dict[str, Any]:
    """What one guest of a kind sees and reaches."""
    with guests(ids, kind=kind) as (guest,):
        found: dict[str, Any] = {
            "interfaces": guest.run(interfaces),
            "own loopback": guest.run(_own_loopback),
            "host": [
                f"{address}:{port}"
                for address in ("127.0.0.1", host_address, *_gateway(guest))
                for port in host_ports
                if guest.run(connect, address, port, 0.7)
            ],
            "abstract": guest.run(abstract, abstract_name),
        }
        if kind == "outbound":
            texts = dict(network.files("outbound", rootful=guest.rootful, hostname="guest"))
            servers = [
                line.split()[1] for line in texts["/etc/resolv.conf"].splitlines() if line.startswith("nameserver")
            ]
            found["name"] = guest.run(ask_name, servers[0], "deb.debian.org")
            found["fetched"] = guest.run(fetch, "deb.debian.org")
        return found


def _gateway(guest: Guest) -> list[str]:
    text = guest.run(lambda: open("/proc/self/net/route").read())
    rows = [line.split() for line in text.splitlines()[1:]]
    return [socket.inet_ntoa(struct.pack("=I", int(row[2], 16))) for row in rows if row[1] == "00000000"]


def _own_loopback() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return connect("127.0.0.1", server.getsockname()[1])


def two(ids: Ids) -> dict[str, Any]:
    """Whether one guest reaches a server of another, and whether that server is one at all."""
    with guests(ids, 2) as (one, other):
        read, write = os.pipe()
        serving = os.fork()
        if serving == 0:
            one.run(_serve, write)
            os._exit(0)
        os.close(write)
        port = int(os.read(read, 10))
        address = one.run(addresses)[0]
        try:
            return {
                "itself": one.run(connect, address, port),
                "other": other.run(connect, address, port, 1.0),
                "addresses": [address, other.run(addresses)[0]],
            }
        finally:
            with suppress(ProcessLookupError):
                os.kill(serving, signal.SIGKILL)
            os.waitpid(serving, 0)


def _serve(write: int) -> None:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.create_server(("0.0.0.0", 0)) as server:
        os.write(write, str(server.getsockname()[1]).encode())
        while True:
            server.accept()[0].close()


def many(ids: Ids, count: int) -> list[float]:
    """Milliseconds for each of so many at once."""
    with guests(ids, count) as made:
        assert made[-1].run(fetch, "deb.debian.org").startswith("HTTP/")
        return [guest.ms for guest in made]


def rounds(ids: Ids, count: int) -> int:
    """Come and go, one after the other."""
    for _ in range(count):
        with guests(ids) as (guest,):
            assert guest.run(interfaces).get("eth0")
    return count


def hang(ids: Ids, report: int) -> None:
    """Attach, tell, and wait to be killed."""
    with guests(ids, 2) as made:
        os.write(report, json.dumps([guest.id for guest in made]).encode())
        os.close(report)
        time.sleep(100)
