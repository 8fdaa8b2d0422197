"""Who may call the REST API, and what it says when something is wrong."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.jupyter.conftest import Server
from workbench.jupyter import base, handlers
from workbench.model import (
    BuildFailed,
    Conflict,
    Corrupt,
    HostLacks,
    InvalidInput,
    LaunchFailed,
    NotFound,
    WorkbenchError,
)

_DENY = """
from jupyter_server.auth.authorizer import Authorizer
class Deny(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return resource != "workbench"
c.ServerApp.authorizer_class = Deny
"""


def routes() -> list[tuple[str, str]]:
    """Every method of every route, with a path that it matches: generated, so that none is forgotten."""
    found = []
    for pattern, handler in handlers.ROUTES:
        path = re.sub(r"\(\?P<text>[^)]*\)", "abc123", pattern).replace("/?", "")
        assert re.fullmatch(pattern, path)
        methods = [name for name in ("get", "head", "post", "put", "patch", "delete") if name in vars(handler)]
        assert methods
        found += [(name.upper(), "/workbench/api" + path) for name in methods]
    return found


def test_every_route_refuses_strangers(image: str, tmp_path: Path) -> None:
    server = Server(tmp_path, config=_DENY)
    try:
        for (method, path), token in itertools.product(routes(), ("", "wrong")):
            status, answer = server.request(path, method, {} if method == "POST" else None, token=token)
            assert status == 403, (method, path, token, answer)
        for method, path in routes():
            status, answer = server.request(path, method, {} if method == "POST" else None)
            assert status == 403, (method, path, answer)
        assert server.request("/api/kernels")[0] == 200  # the authorizer denies ours only
    finally:
        server.close()


def test_a_page_of_somebody_else_cannot_use_the_browsers_login(shared_server: Server) -> None:
    """Every route that changes something wants the XSRF token beside the cookie that a login has left."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    base = f"http://127.0.0.1:{shared_server.port}"
    browser.open(f"{base}/api/status?token={shared_server.token}").close()
    seen = set()
    for method, path in routes():
        data = b"{}" if method in ("POST", "PUT", "PATCH") else None
        request = urllib.request.Request(base + path, method=method, data=data)
        try:
            with browser.open(request) as answer:
                status, text = answer.status, ""
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        seen.add(method)
        if method in ("GET", "HEAD"):
            assert status in (200, 400, 404), (method, path, status, text)  # the cookie is a login
        else:
            assert status == 403 and "_xsrf" in text, (method, path, status, text)
    assert {"GET", "POST", "DELETE"} <= seen


def test_images(shared_server: Server, image: str) -> None:
    (row,) = [row for row in shared_server.request("/workbench/api/images")[1]["images"] if row["id"] == image]
    assert "python:latest" in row["names"] or "python" in row["names"]
    for text in ("python", "python:latest", image, image[7:19]):
        status, answer = shared_server.request(f"/workbench/api/images/{text}")
        assert status == 200 and answer["id"] == image


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/images/nothing-here", 404),
        ("DELETE", "/images/nothing-here", 404),
        ("GET", "/images/Not%20A%20Name", 400),
        ("GET", "/images/UPPER", 400),
        ("GET", "/containers/ffffffffffff", 404),
        ("POST", "/containers/ffffffffffff/stop", 404),
        ("DELETE", "/containers/ffffffffffff", 404),
        ("GET", "/containers/ffffffffffff/logs", 404),
    ],
)
def test_errors_are_json_of_one_line(shared_server: Server, method: str, path: str, status: int) -> None:
    got, answer = shared_server.request(f"/workbench/api{path}", method, {} if method == "POST" else None)
    assert got == status, answer
    assert isinstance(answer, dict) and answer["message"]
    assert "\n" not in answer["message"]


def test_no_path_leads_out(shared_server: Server) -> None:
    for path in ("/containers/..%2f..%2fetc", "/containers/../../etc", "/images/..%2f..", "/images/../x"):
        assert shared_server.request(f"/workbench/api{path}")[0] in (400, 404)


def test_each_error_has_a_status() -> None:
    expected = {InvalidInput: 400, NotFound: 404, Conflict: 409, HostLacks: 503}
    for kind in (InvalidInput, NotFound, Conflict, HostLacks, Corrupt, BuildFailed, LaunchFailed, WorkbenchError):
        assert base.status_of(kind("a", "b")) == expected.get(kind, 500)


def test_the_extension_is_light() -> None:
    code = (
        "import jupyter_server.serverapp, time, sys; t = time.perf_counter(); "
        "import workbench, workbench.jupyter.extension, workbench.jupyter.handlers; "
        "print(time.perf_counter() - t, 'pandas' in sys.modules, 'pyroute2' in sys.modules)"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, *heavy = done.stdout.split()
        assert heavy == ["False", "False"]
        took.append(float(seconds))
    assert min(took) < 0.1
