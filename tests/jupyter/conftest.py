"""Kernels by the provisioner, with jupyter_client in the test's own process, and a real server in another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.jupyter.clients import ask_to_end

Start = Callable[..., tuple[KernelManager, BlockingKernelClient]]


@pytest.fixture
def start(image: str, tmp_path: Path) -> Iterator[Start]:
    """Start kernels of the image, as many as wanted; the helper of this process ends with the test."""
    from workbench.jupyter import shared

    running: list[tuple[KernelManager, BlockingKernelClient]] = []

    def start(**options: Any) -> tuple[KernelManager, BlockingKernelClient]:
        options = {"cwd": str(tmp_path)} | options
        manager = KernelManager(kernel_name=options.pop("kernel_name", "wb-python"), **options.pop("traits", {}))
        if encryption := options.pop("transport_encryption", None):
            manager.transport_encryption = encryption
        manager.start_kernel(**options)
        client = manager.client()
        client.start_channels()
        running.append((manager, client))
        client.wait_for_ready(timeout=60)
        return manager, client

    yield start
    for manager, client in running:
        client.stop_channels()
        with contextlib.suppress(Exception):
            manager.shutdown_kernel(now=True)
    for bench in shared._known.values():
        bench.close()
    shared._known.clear()


class Server:
    """A jupyter_server process with the extension, on a port and with a token of its own."""

    def __init__(
        self, folder: Path, *arguments: str, config: str = "", token: str = "secret-of-the-test",
        python: str = sys.executable, **process: Any,
    ) -> None:  # fmt: skip
        """python, process: another user's interpreter, and how ``subprocess`` is to start it."""
        self.token, self.folder = token, folder
        file = folder / "jupyter_server_config.py"
        others = ("jupyterlab", "notebook", "notebook_shim", "jupyter_lsp", "jupyter_server_terminals")
        file.write_text(
            f"c.ServerApp.allow_unauthenticated_access = False\n"
            f"c.ServerApp.jpserver_extensions = {dict.fromkeys(others, False)}\n{config}\n"
        )
        self.log = folder / "server.log"
        root = folder / "root"
        root.mkdir(exist_ok=True)
        self.root = root
        self.process = subprocess.Popen(
            [
                python, "-m", "jupyter_server", f"--config={file}", "--no-browser", "--port=0",
                f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}",
                *(["--allow-root"] if os.getuid() == 0 else []), *arguments,
            ],
            stdout=subprocess.DEVNULL, stderr=self.log.open("w"), cwd=root, **process,
        )  # fmt: skip
        until = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        while True:  # it says so before it listens
            try:
                self.request("/api")
                break
            except urllib.error.URLError:
                assert time.monotonic() < until, self.log.read_text()
                time.sleep(0.02)

    def request(self, path: str, method: str = "GET", body: Any = None, token: str | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of an answer. token: "" sends none."""
        token = self.token if token is None else token
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if token:
            request.add_header("Authorization", f"token {token}")
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def close(self) -> None:
        """Ask it to end; what it said is shown with a failed test."""
        ask_to_end(self.process, self.log)
        print(self.log.read_text())


@pytest.fixture
def server(image: str, tmp_path: Path) -> Iterator[Server]:
    """A server with the extension enabled as installation enables it."""
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture(scope="module")
def shared_server(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same for all tests of a module that start no kernel."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def tidy(cli, image: str) -> Iterator[None]:
    """No snapshot stays."""
    before = {name for row in json.loads(cli("images", "--json").out) for name in row["names"]}
    yield
    for row in json.loads(cli("ps", "--all", "--json").out):
        cli("rm", "-f", row["id"])
    for row in json.loads(cli("images", "--json").out):
        for name in set(row["names"]) - before:
            cli("rmi", name)
    cli("gc")
