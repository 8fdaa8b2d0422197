"""The relay alone: bytes in order, none lost, whatever the pace of the client."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workbench.containers.relay import Backlog, Relay, sockets_of

Pair = tuple[socket.socket, socket.socket]


class Running:
    """A relay in a thread of its own, with one channel whose kernel is a socket of the test's."""

    def __init__(self, folder: Path, kernel_there: bool = True) -> None:
        self.path = folder / "k-1"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.kernel = socket.socket(socket.AF_UNIX)
        if kernel_there:
            self.bind()
        self._folder = os.open(folder, os.O_RDONLY)
        self._wake, self._poke = os.pipe()
        self._calls: list[Callable[[], None]] = []
        self.relay = Relay([(self.listener, "k-1")], sockets_of(self._folder), spill=str(folder))
        self.relay.watch(self._wake, lambda _: os.read(self._wake, 1) and None)
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def bind(self) -> None:
        self.kernel.bind(str(self.path))
        self.kernel.listen()

    def call(self, what: Callable[[], None]) -> None:
        self._calls.append(what)
        os.write(self._poke, b"x")

    def _run(self) -> None:
        while not self._over:
            self.relay.step(1)
            while self._calls:
                self._calls.pop()()
        self.relay.close()

    def pair(self) -> Pair:
        client = socket.create_connection(("127.0.0.1", self.port))
        kernel, _ = self.kernel.accept()
        return client, kernel

    def close(self) -> None:
        self._over = True
        self.call(lambda: None)
        self._thread.join()
        self.kernel.close()
        for fd in (self._folder, self._wake, self._poke):
            os.close(fd)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    yield running
    running.close()


def receive(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_both_ways_and_half_close(running: Running) -> None:
    client, kernel = running.pair()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert receive(kernel) == b"question"
    kernel.sendall(b"answer")  # still heard after the client has said its last
    kernel.close()
    assert receive(client) == b"answer"
    client.close()


def test_a_slow_client_never_slows_the_kernel(running: Running, tmp_path: Path) -> None:
    client, kernel = running.pair()
    block = random.Random(1).randbytes(1 << 20)
    sent = hashlib.sha256()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel.settimeout(20)
    for number in range(200):
        data = struct.pack("q", number) + block
        sent.update(data)
        kernel.sendall(data)  # nobody reads; would block for ever without the spill
    kernel.close()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 64 << 20
    assert sorted(os.listdir(tmp_path)) == ["k-1"]  # a file without a name
    got = hashlib.sha256()
    while part := client.recv(1 << 16):
        got.update(part)
    assert got.digest() == sent.digest()
    client.close()


def test_a_kernel_that_comes_late(tmp_path: Path) -> None:
    running = Running(tmp_path, kernel_there=False)
    client = socket.create_connection(("127.0.0.1", running.port))  # at once: clients probe the ports
    client.sendall(b"early")
    time.sleep(0.1)
    running.bind()
    kernel, _ = running.kernel.accept()
    assert kernel.recv(10) == b"early"
    client.close()
    kernel.close()
    running.close()


def test_a_name_that_is_no_socket_is_not_followed(tmp_path: Path) -> None:
    elsewhere = socket.socket(socket.AF_UNIX)
    (tmp_path / "other").mkdir()
    elsewhere.bind(str(tmp_path / "other" / "host-service"))
    elsewhere.listen()
    elsewhere.settimeout(0.3)
    running = Running(tmp_path, kernel_there=False)
    running.path.symlink_to(tmp_path / "other" / "host-service")
    client = socket.create_connection(("127.0.0.1", running.port))
    with pytest.raises(TimeoutError):
        elsewhere.accept()
    client.close()
    elsewhere.close()
    running.close()


def test_the_last_words_of_a_dead_kernel_arrive(running: Running) -> None:
    client, kernel = running.pair()
    data = os.urandom(30 << 20)
    kernel.sendall(data)
    kernel.close()
    running.call(running.relay.kernel_gone)
    assert receive(client) == data
    client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port))


def test_a_client_that_resets_is_forgotten(running: Running) -> None:
    client, kernel = running.pair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    kernel.settimeout(5)
    assert kernel.recv(1) == b""
    for _ in range(100):
        if not running.relay.links:
            break
        time.sleep(0.01)
    assert running.relay.links == 0
    kernel.close()


def test_no_descriptor_stays(running: Running) -> None:
    client, kernel = running.pair()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        one, other = running.pair()
        one.close()
        assert other.recv(1) == b""
        other.close()
    time.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) <= before
    client.close()
    kernel.close()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    backlog = Backlog(memory=10)
    backlog.push(memoryview(b"0123456789"))
    backlog._file = open("/dev/full", "r+b", buffering=0)
    with pytest.raises(OSError, match="No space"):
        backlog.push(memoryview(b"abc"))
    one, other = socket.socketpair()
    while backlog:
        backlog.send(one)
    one.close()
    assert receive(other) == b"0123456789abc"
    other.close()
