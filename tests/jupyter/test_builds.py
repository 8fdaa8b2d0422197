"""Builds over REST: begun, followed by events, cancelled, and what becomes of them when the server goes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import websocket
import yaml

from tests.jupyter.conftest import Server
from workbench.jupyter import handlers

API = "/workbench/api"


def recipe(folder: Path, name: str, text: str) -> None:
    place = folder / name
    place.mkdir()
    (place / "recipe.toml").write_text(f'name = "{name}"\n[base]\nsuite = "bookworm"\n{text}')


def ended(server: Server, build: str, seconds: float = 120) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status, row = server.request(f"{API}/builds/{build}")
        assert status == 200
        if row["status"] != "running":
            return row
        time.sleep(0.1)
    raise AssertionError(row)


@pytest.fixture
def server(image: str, tmp_path: Path):
    server = Server(tmp_path)
    yield server
    server.close()


def events_of(server: Server) -> websocket.WebSocket:
    address = f"ws://127.0.0.1:{server.port}/api/events/subscribe?token={server.token}"
    return websocket.create_connection(address, timeout=60)


def test_a_build_is_begun_followed_and_its_kernel_is_there(server: Server) -> None:
    recipe(server.root, "rest", f'[[run]]\nscript = "echo made {time.time()}"\n')  # in no cache
    socket = events_of(server)
    status, row = server.request(f"{API}/builds", "POST", {"recipe": "rest", "name": "rest:by-rest"})
    assert (status, row["status"]) == (202, "running")
    told = []
    while not told or told[-1]["action"] == "started" or told[-1]["action"] == "progress":
        told.append(json.loads(socket.recv()))
    socket.close()
    assert {event["build"] for event in told} == {row["id"]}
    assert told[0]["action"] == "started"
    assert told[-1]["action"] == "finished"
    assert any("run-1: done in" in event["line"] for event in told)
    found = ended(server, row["id"])
    assert found["result"]["name"] == "rest:by-rest"
    assert any("run-1: done in" in line for line in found["lines"])
    assert server.request(f"{API}/images/rest:by-rest")[0] == 200
    assert row["id"] in [each["id"] for each in server.request(f"{API}/builds")[1]["builds"]]
    assert server.request(f"{API}/builds/{row['id']}", "DELETE")[0] == 409


def test_a_build_is_cancelled_and_leaves_nothing(server: Server) -> None:
    recipe(server.root, "slow", '[[run]]\nscript = "echo begun; sleep 1000"\n')
    row = server.request(f"{API}/builds", "POST", {"recipe": "slow"})[1]
    wait_for(server, row["id"], "run-1: echo begun")
    assert server.request(f"{API}/builds/{row['id']}", "DELETE")[0] == 204
    assert ended(server, row["id"], 20)["status"] == "cancelled"
    assert server.request(f"{API}/images/slow")[0] == 404


def wait_for(server: Server, build: str, text: str) -> None:
    until = time.monotonic() + 60
    while not any(text in line for line in server.request(f"{API}/builds/{build}")[1]["lines"]):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_build_ends_with_its_server(server: Server) -> None:
    recipe(server.root, "orphan", '[[run]]\nscript = "sleep 1000"\n')
    row = server.request(f"{API}/builds", "POST", {"recipe": "orphan"})[1]
    wait_for(server, row["id"], "run-1: sleep")
    server.process.kill()
    server.process.wait()  # that nothing is left of it is asserted after each test


def test_modules_of_the_working_folder_are_not_run(server: Server) -> None:
    """Containers write into it."""
    for name in ("workbench", "json"):
        (server.root / f"{name}.py").write_text(f"open({str(server.root / 'run')!r}, 'a').write('{name}')")
    recipe(server.root, "broken", '[[run]]\nscript = "exit 3"\n')
    found = ended(server, server.request(f"{API}/builds", "POST", {"recipe": "broken"})[1]["id"])
    assert "build broken, step run-1" in found["error"] and not (server.root / "run").exists()


def test_a_failed_build_says_why(server: Server) -> None:
    recipe(server.root, "broken", '[[run]]\nscript = "echo so it is >&2; exit 3"\n')
    found = ended(server, server.request(f"{API}/builds", "POST", {"recipe": "broken"})[1]["id"])
    assert found["status"] == "failed"
    assert "build broken, step run-1: so it is" in found["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "no recipe is named"),
        ({"recipe": "nowhere"}, 404, "there is no folder nowhere"),
        ({"recipe": "../../etc"}, 400, "lies outside of the server's folder"),
        ({"recipe": "/etc"}, 404, "there is no folder /etc"),
        ({"recipe": "python", "debug": True}, 400, "'debug' is not understood"),
        ({"recipe": "python", "refresh": "yes"}, 400, "'refresh' is not understood"),
    ],
)
def test_what_cannot_be_begun(shared_server: Server, body: dict[str, Any], status: int, said: str) -> None:
    got, answer = shared_server.request(f"{API}/builds", "POST", body)
    assert got == status
    assert said in answer["message"]


def described() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(handlers.__file__).parent / "openapi.yaml").read_text())
    return found


def test_the_description_names_every_route_and_no_other() -> None:
    methods = ("get", "post", "put", "patch", "delete")
    there = {
        (re.sub(r"\{[^}]*\}", "abc123", path), method)
        for path, entry in described()["paths"].items()
        for method in entry
        if method in methods
    }
    ours = set()
    for pattern, handler in handlers.ROUTES:
        path = re.sub(r"\(\?P<text>[^)]*\)", "abc123", pattern).replace("/?", "")
        ours |= {(path, method) for method in methods if method in vars(handler)}
    assert there == ours
