"""Archives, inventories and recipes over REST."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.jupyter.conftest import Server

pytestmark = pytest.mark.usefixtures("tidy")

API = "/workbench/api"


def call(server: Server, path: str, data: bytes | None = None, token: str = "") -> tuple[int, bytes]:
    """Status and body of an answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{API}{path}", data=data)
    request.add_header("Authorization", f"token {token or server.token}")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def staged(home: Path) -> list[str]:
    """What lies in the store's staging."""
    return sorted(str(path) for path in (home / "tmp").glob("*/*"))


def changed(cli: Any, image: str) -> None:
    """An image ``sent``, over the python image."""
    made = cli("run", "--no-folder", "python", "sh", "-c", "echo hello > /opt/hello")
    assert made.code == 0, made.err
    (row,) = json.loads(cli("ps", "--all", "--json").out)
    assert cli("snapshot", row["id"], "-m", "Say hello", "-t", "sent").code == 0
    assert cli("rm", row["id"]).code == 0


@pytest.mark.first
def test_away_and_back(shared_server: Server, cli: Any, image: str, home: Path, tmp_path: Path) -> None:
    changed(cli, image)
    notebook = tmp_path / "work.ipynb"
    notebook.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    for form in ("none", "zstd"):
        out = tmp_path / f"{form}.oci.tar"
        assert cli("export", "sent", "-o", str(out), "--compress", form).code == 0
        status, data = call(shared_server, f"/export?image=sent&compress={form}")
        assert status == 200 and data == out.read_bytes()
    assert cli("export", "sent", "-o", str(out), "--with", str(notebook)).code == 0
    sent = json.loads(cli("images", "--json").out)
    cli("rmi", "sent")
    cli("gc")
    status, answer = call(shared_server, "/import", out.read_bytes())
    assert status == 201, answer
    found = json.loads(answer)
    assert found["name"] == "sent:latest" or found["name"] == "sent"
    assert found["image"] in {row["id"] for row in sent}
    assert found["notebooks"] == {"work.ipynb": notebook.read_text()}
    assert json.loads(cli("log", "sent", "--json").out)[0]["message"] == "Say hello"
    assert (status := call(shared_server, "/import?name=python", out.read_bytes())[0]) == 409, status
    status, answer = call(shared_server, "/import?name=other", data)
    assert (status, json.loads(answer)["image"]) == (201, found["image"])
    assert staged(home) == []


@pytest.mark.parametrize(
    ("path", "data", "status", "said"),
    [
        ("/import", b"", 400, "no body"), ("/import", b"no archive" * 99, 400, "no tar archive"),
        ("/import?name=UPPER", b"no archive" * 99, 400, ""), ("/export", None, 400, "none is named"),
        ("/export?image=nothing-here", None, 404, "nothing-here"), ("/inventory", None, 400, "no image is named"),
        ("/export?image=python&compress=rar", None, 400, "no compression"), ("/show", None, 400, "none is named"),
    ],
)  # fmt: skip
def test_what_is_refused(
    shared_server: Server, home: Path, image: str, path: str, data: bytes | None, status: int, said: str
) -> None:
    got, answer = call(shared_server, path, data)
    assert got == status and said in json.loads(answer)["message"], answer
    assert staged(home) == []


def begun(server: Server, token: str, size: int = 3 << 20) -> socket.socket:
    """An upload of which only the beginning is sent. size: bytes of it."""
    channel = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {API}/import HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: token {token}\r\n"
    channel.sendall(f"{head}Content-Length: {1 << 40}\r\n\r\n".encode() + bytes(size))
    return channel


def test_an_upload_that_breaks_off_leaves_nothing(shared_server: Server, home: Path) -> None:
    with begun(shared_server, shared_server.token):
        until = time.monotonic() + 20
        while not staged(home):
            assert time.monotonic() < until
            time.sleep(0.05)
    while staged(home):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_stranger_is_refused_before_anything_is_kept(shared_server: Server, home: Path) -> None:
    with begun(shared_server, "wrong", 0) as channel:
        answer = http.client.HTTPResponse(channel)
        answer.begin()
        with contextlib.suppress(ConnectionError):  # it may have hung up
            channel.sendall(bytes(3 << 20))
        assert answer.status == 403 and staged(home) == []


def test_what_it_holds(shared_server: Server, cli: Any, image: str) -> None:
    changed(cli, image)
    shown = json.loads(call(shared_server, "/show?image=sent")[1])
    assert shown == json.loads(cli("show", "sent", "--json").out)
    assert [row["path"] for row in shown["diff"]["files"]] == ["opt/hello"]
    found = json.loads(call(shared_server, "/inventory?image=sent&unowned=1")[1])
    assert found == json.loads(cli("inventory", "sent", "--unowned", "--json").out)
    status, answer = call(shared_server, "/freeze", b'{"image": "sent"}')
    frozen = json.loads(answer)
    assert status == 200 and set(frozen["recipe"]) == {"recipe.toml"} and frozen["image"] is None
    assert [lost["name"] for lost in frozen["lost"]] == ["/opt/hello"]
