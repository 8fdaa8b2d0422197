"""Named networks: who is in one finds the others by name, and nobody else finds anybody."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containers.inside import PYTHON, probe, run
from workbench.containers import lan, spec
from workbench.containers.container import Container
from workbench.model import InvalidInput, narrower, parse_network
from workbench.workbench import Workbench

#: Says who it is, and as many bytes as it is asked for.
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        number = self.path.strip("/")
        data = bytes(range(256)) * (int(number) << 12) if number else sys.argv[1].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
server = http.server.ThreadingHTTPServer(("", 8000), Handler)
print("ready", flush=True)
server.serve_forever()
"""
ASK = "import urllib.request as u; print(u.urlopen('http://{}:8000/{}', timeout=10).read().decode())"

Begin = Callable[..., Container]


@pytest.fixture
def begin(image: str) -> Iterator[Begin]:
    """Start a server: ``begin(workbench, network, name)``."""
    begun: list[tuple[Workbench, Container]] = []

    def start(workbench: Workbench, network: str, name: str) -> Container:
        argv = [PYTHON, "-uc", SERVER, name]
        container = workbench.create(image, argv=argv, cwd=None, network=network, names=[name])
        begun.append((workbench, container))
        container.start().result(timeout=30)
        until = time.monotonic() + 20
        while "ready" not in Path(container.log).read_text():
            assert time.monotonic() < until and not container.exited.done(), Path(container.log).read_text()
            time.sleep(0.02)
        return container

    yield start
    for workbench, container in begun:
        if os.path.exists(container.folder):
            workbench.remove(container.id, force=True)
    until = time.monotonic() + 5
    networks = Path(os.environ["WORKBENCH_HOME"], "networks")
    while networks.exists() and list(networks.iterdir()):
        assert time.monotonic() < until, "a network is still there"
        time.sleep(0.02)


def ask(workbench: Workbench, image: str, network: str, host: str, path: str = "") -> str:
    done = run(workbench, image, [PYTHON, "-c", ASK.format(host, path)], network=network)
    return done.text.strip().splitlines()[-1]


def test_members_find_each_other_by_name(workbench: Workbench, image: str, begin: Begin) -> None:
    first = begin(workbench, "lan:lab", "The DB")
    assert ask(workbench, image, "lan:lab", "the-db") == "The DB"
    assert ask(workbench, image, "lan:lab", first.id) == "The DB"
    begin(workbench, "lan:lab", "second")
    assert ask(workbench, image, "lan:lab", "second") == "second"
    # one's own name is the address that the others see
    seen = probe(
        workbench, image, "import json, socket; print(json.dumps([socket.gethostbyname(socket.gethostname()), "
        "sorted(socket.if_nameindex()), open('/etc/hosts').read()]))", network="lan:lab",
    )  # fmt: skip
    assert seen[0].startswith("10.") and lan.DEVICE in [name for _, name in seen[1]]
    assert "the-db" in seen[2] and "second" in seen[2]


def test_a_hundred_megabytes_arrive(workbench: Workbench, image: str, begin: Begin) -> None:
    begin(workbench, "lan:lab", "source")
    code = (
        "import hashlib, json, urllib.request as u; data = u.urlopen('http://source:8000/100', timeout=60).read();"
        "print(json.dumps([len(data), data == bytes(range(256)) * (100 << 12)]))"
    )
    assert probe(workbench, image, code, network="lan:lab") == [100 << 20, True]


def test_nobody_else_reaches_a_member(workbench: Workbench, image: str, begin: Begin) -> None:
    begin(workbench, "lan:lab", "db")
    address = probe(
        workbench, image, "import json, socket; print(json.dumps(socket.gethostbyname('db')))", network="lan:lab"
    )
    # Whether it is this server that answers: a host's own network may well answer for any address.
    attempt = """
        import json, urllib.request
        def attempt(host):
            try:
                return urllib.request.urlopen(f"http://{host}:8000/", timeout=0.7).read(2).decode()
            except OSError as error:
                return type(error).__name__
    """
    names = f"print(json.dumps([attempt('db'), attempt({address!r})]))"
    assert probe(workbench, image, textwrap.dedent(attempt) + names, network="lan:lab") == ["db", "db"]
    for network in ("lan:other", "outbound", "none"):
        assert "db" not in probe(workbench, image, textwrap.dedent(attempt) + names, network=network), network
    scope: dict[str, Callable[[str], str]] = {}
    exec(textwrap.dedent(attempt), scope)
    assert scope["attempt"](address) != "db"
    # on the host the network is a socket of the user's alone
    networks = Path(workbench.home, "networks")
    assert os.listdir(networks) == ["lab"]
    for path, mode in ((networks, 0o700), (networks / "lab", 0o700)):
        assert path.stat().st_mode & 0o777 & ~mode == 0


def test_it_lives_as_long_as_its_last_member(image: str, begin: Begin) -> None:
    """The launcher with the first member goes, others go on; names come and go with members."""
    first, second = Workbench(), Workbench()
    try:
        begin(first, "lan:lab", "one")
        two = begin(second, "lan:lab", "two")
        done = subprocess.run(
            [sys.executable, "-m", "workbench", "run", "--network", "lan:lab", "--name", "three", "python",
             "python3", "-c", ASK.format("one", "")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "one\n"
        first.close()
        until = time.monotonic() + 5
        hosts = "import json; print(json.dumps(open('/etc/hosts').read()))"
        while "one" in probe(second, image, hosts, network="lan:lab"):
            assert time.monotonic() < until
        assert ask(second, image, "lan:lab", "two") == "two"
        two.kill()
        two.exited.result(timeout=10)
        assert begin(second, "lan:lab", "one") and ask(second, image, "lan:lab", "one") == "one"
    finally:
        first.close()
        second.close()


def test_what_a_member_may_say() -> None:
    """Frames of its own addresses only: no member can speak for another."""
    me, other = lan._Member(None, -1, -1, (), b"\x0a\xd6\0\2", b"\2wb\0\0\2"), b"\2wb\0\0\3"  # type: ignore[arg-type]

    def frame(source: bytes, kind: bytes, rest: bytes) -> memoryview:
        return memoryview(other + source + kind + rest)

    def ip(source: bytes) -> bytes:
        return bytes(12) + source + b"\x0a\xd6\0\3"

    def arp(mac: bytes, source: bytes) -> bytes:
        return bytes(8) + mac + source + bytes(10)

    assert lan._own(frame(me.mac, b"\x08\0", ip(me.address)), me)
    assert lan._own(frame(me.mac, b"\x08\6", arp(me.mac, me.address)), me)
    for forged in (
        frame(other, b"\x08\0", ip(me.address)), frame(me.mac, b"\x08\0", ip(b"\x0a\xd6\0\3")),
        frame(me.mac, b"\x08\6", arp(other, me.address)), frame(me.mac, b"\x08\6", arp(me.mac, b"\x0a\xd6\0\3")),
        frame(me.mac, b"\x86\xdd", ip(me.address)), frame(me.mac, b"\x08\0", b""),
    ):  # fmt: skip
        assert not lan._own(forged, me)


def test_inside_nobody_can_forge_frames_or_make_devices(workbench: Workbench, image: str, begin: Begin) -> None:
    begin(workbench, "lan:lab", "db")
    code = """
        import json, os, socket
        def attempt(act, *arguments):
            try:
                act(*arguments)
                return "done"
            except OSError as error:
                return error.strerror
        print(json.dumps([attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
                          attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1), os.path.exists("/dev/net/tun")]))
    """
    packet, raw, tun = probe(workbench, image, code, network="lan:lab")
    assert packet != "done" and raw != "done" and not tun


def test_names() -> None:
    assert parse_network("lan:dask-2") == "lan:dask-2"
    for text in ("", "lab", "lan:", "lan:a/b", "lan:..", "lan:A", "lan:-x", f"lan:{'x' * 33}", "outbuond"):
        with pytest.raises(InvalidInput):
            parse_network(text)
    assert [spec.label(text) for text in ("My Notebook (2)", "dask_worker", "...", "x" * 99)] == [
        "my-notebook-2", "dask-worker", "", "x" * 63,
    ]  # fmt: skip


def test_the_one_that_reaches_less() -> None:
    for first, second, wanted in (
        ("outbound", None, "outbound"), ("outbound", "lan:a", "lan:a"), ("lan:a", "lan:b", "lan:b"),
        ("lan:a", "none", "none"), ("none", "lan:a", "none"), ("host", "lan:a", "lan:a"), ("lan:a", "host", "lan:a"),
        ("outbound", "host", "outbound"),
    ):  # fmt: skip
        assert narrower(first, second) == wanted, (first, second)
