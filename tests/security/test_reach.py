"""What the network reaches: neither the host's loopback nor its services, nor other containers."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.containers.inside import PYTHON, run
from workbench.linux import userns
from workbench.workbench import Workbench

ROOT = userns.host_ids().kind == "root"

#: Tries every address that could be the host's, by TCP and UDP, and tells which port answered where.
TRY = """
import json, socket, struct, sys
given = json.loads(sys.argv[1])
addresses = {"127.0.0.1", "127.0.0.53", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "169.254.1.1", "10.0.2.2"}
addresses |= set(given["addresses"])
gateways = []
for line in open("/proc/net/route").read().splitlines()[1:]:
    fields = line.split()
    if fields[1] == "00000000":
        gateways.append(socket.inet_ntoa(struct.pack("=I", int(fields[2], 16))))
for line in open("/proc/net/ipv6_route").read().splitlines():
    fields = line.split()
    if fields[4].strip("0") and fields[-1] != "lo":
        gateways.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[4])) + "%" + fields[-1])
with open("/etc/resolv.conf") as file:
    gateways += [line.split()[1] for line in file if line.startswith("nameserver")]
reached = []
for address in sorted(addresses | set(gateways)):
    for port in given["ports"]:
        try:
            found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        except OSError:
            continue
        for family, _, _, _, where in found:
            with socket.socket(family, socket.SOCK_STREAM) as tcp, socket.socket(family, socket.SOCK_DGRAM) as udp:
                tcp.settimeout(given["patience"])
                try:
                    tcp.connect(where)
                    reached.append(["tcp", address, port])
                except OSError:
                    pass
                try:
                    udp.sendto(f"from {address}".encode(), where)
                except OSError:
                    pass
names = []
for name in ("host.containers.internal", "host.docker.internal", "_gateway"):
    try:
        names.append(socket.gethostbyname(name))
    except OSError:
        pass
print(json.dumps({"reached": reached, "gateways": gateways, "names": names,
                  "links": [name for _, name in socket.if_nameindex()]}))
"""


class Services:
    """The host's: a TCP and a UDP server on loopback, one on every address, for IPv4 and IPv6."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.ports: list[int] = []
        self.heard: list[bytes] = []
        self.addresses = own_addresses()
        for family, address in (
            (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "0.0.0.0"),
        ):  # fmt: skip
            try:
                tcp = socket.create_server((address, 0), family=family)
            except OSError:  # a host without IPv6
                continue
            port = tcp.getsockname()[1]
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.bind((address, port))
            self.sockets += [tcp, udp]
            self.ports.append(port)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self.sockets:
                if each.type == socket.SOCK_DGRAM:
                    selector.register(each, selectors.EVENT_READ)
            while not self.over.is_set():
                for key, _ in selector.select(0.05):
                    self.heard.append(key.fileobj.recv(100))

    def close(self) -> None:
        """The thread first: it would read from whatever is opened next under a number that was closed."""
        self.over.set()
        self.thread.join()
        for each in self.sockets:
            each.close()


def own_addresses() -> list[str]:
    """The host's addresses, but for those on loopback."""
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


@pytest.fixture
def services() -> Iterator[Services]:
    services = Services()
    yield services
    services.close()


def attempt(workbench: Workbench, image: str, services: Services, **options: Any) -> Any:
    given = {"ports": services.ports, "addresses": services.addresses, "patience": 0.25}
    return run(workbench, image, [PYTHON, "-c", TRY, json.dumps(given)], cwd=None, **options).json


@pytest.mark.parametrize("single", [False, True])
def test_outbound_reaches_nothing_on_the_hosts_loopback(image, services, monkeypatch, single):
    if single:
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    workbench = Workbench()
    try:
        found = attempt(workbench, image, services, network="outbound")
    finally:
        workbench.close()
    assert found["gateways"], "a way out there is"
    loopback = set(services.ports[:-1])  # the last listens on every address of the host
    assert [row for row in found["reached"] if row[2] in loopback] == []
    # Its own addresses are the host's only as far as the host's own neighbours reach it.
    allowed = set() if ROOT and not single else set(services.addresses)
    assert [row for row in found["reached"] if row[1] not in allowed] == []
    heard = {data.decode().removeprefix("from ") for data in services.heard}
    assert heard <= allowed, heard
    assert found["names"] == []


def test_no_network_is_none(workbench, image, services):
    found = attempt(workbench, image, services, network="none")
    assert (found["reached"], found["gateways"], found["links"], services.heard) == ([], [], ["lo"], [])


SERVE = """
import json, socket, time
servers = [socket.create_server(("0.0.0.0", 0)), socket.create_server(("::", 0), family=socket.AF_INET6)]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("198.51.100.1", 9))
    address = probe.getsockname()[0]
with socket.socket(socket.AF_UNIX) as abstract:
    abstract.bind("\\0of-a-container")
    abstract.listen()
    print(json.dumps([address, [server.getsockname()[1] for server in servers]]), flush=True)
    while True:
        servers[0].accept()
"""


def test_other_containers_are_out_of_reach(workbench, image):
    container = workbench.create(image, argv=[PYTHON, "-c", SERVE], cwd=None, network="outbound")
    reading, writing = os.pipe()
    container.start((0, writing, writing)).result(timeout=30)
    os.close(writing)
    with os.fdopen(reading) as file:
        address, ports = json.loads(file.readline())
        found = run(
            workbench, image,
            [PYTHON, "-c", TRY + "import socket; socket.socket(socket.AF_UNIX).connect('\\0of-a-container')",
             json.dumps({"ports": ports, "addresses": [address], "patience": 0.25})],
            cwd=None, network="outbound",
        )  # fmt: skip
        assert "ConnectionRefusedError" in found.text
        assert json.loads(next(line for line in found.text.splitlines() if line[0] == "{"))["reached"] == []
        container.kill()
        container.exited.result(timeout=10)
    container.settle()
