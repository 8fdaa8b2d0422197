"""What a kernelspec and a server's configuration say of a kernel; the stricter wins."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from jupyter_core.paths import jupyter_data_dir

from tests.jupyter.clients import run
from tests.jupyter.conftest import Server, Start
from tests.jupyter.test_server import Session
from workbench.jupyter import shared


@pytest.fixture
def kernelspec(image: str):
    """Change what the kernelspec of the image says to the provisioner, for one test."""
    path = Path(jupyter_data_dir(), "kernels", "wb-python", "kernel.json")
    before = path.read_text()

    def change(**config: object) -> None:
        content = json.loads(before)
        content["metadata"]["kernel_provisioner"]["config"] |= config
        path.write_text(json.dumps(content))

    yield change
    path.write_text(before)


def test_a_kernelspec_narrows_what_the_configuration_grants(start: Start, kernelspec, tmp_path: Path) -> None:
    from traitlets.config import Config

    seen = tmp_path / "seen"
    seen.mkdir()
    kernelspec(memory="600M", processes=5000, network="none", mounts=[f"{seen}:/seen:ro"])
    config = Config({"Workbench": {"memory": "2G", "processes": 400}})
    _, client = start(traits={"config": config}, cwd=str(tmp_path.parent))
    (row,) = shared.workbench(config).ps()
    assert row["limits"] == {"memory": 600 << 20, "processes": 400, "cpus": None}
    assert run(client, "import os; print(os.listdir('/sys/class/net'))").stdout == "['lo']\n"
    assert run(client, "print(os.path.isdir('/seen'), os.access('/seen', os.W_OK))").stdout == "True False\n"


def test_a_kernelspec_cannot_widen(start: Start, kernelspec) -> None:
    from traitlets.config import Config

    kernelspec(memory="600M", network="host")
    config = Config({"Workbench": {"memory": "500M", "network": "none"}})
    _, client = start(traits={"config": config})
    (row,) = shared.workbench(config).ps()
    assert (row["limits"]["memory"], row["network"]) == (500 << 20, "none")
    assert run(client, "1").reply["status"] == "ok"


def test_the_default_image_of_a_server(image: str, tmp_path: Path) -> None:
    server = Server(tmp_path, config="c.Workbench.default_image = 'python'")
    try:
        assert server.request("/api/kernelspecs")[1]["default"] == "wb-python"
    finally:
        server.close()


def test_readings_of_a_running_kernel(shared_server: Server, image: str) -> None:
    kernel = shared_server.request("/api/kernels", "POST", {"name": "wb-python"})[1]["id"]
    try:
        until = time.monotonic() + 20
        while True:
            rows = shared_server.request("/workbench/api/containers")[1]["containers"]
            (row,) = [row for row in rows if row["labels"].get("kernel") == kernel]
            usage = row["usage"]  # of its init and it; it may have just begun
            if usage["cpu"] > 0 and usage["processes"] >= 2 and usage["memory"] > 1 << 20:
                break
            assert time.monotonic() < until, usage
    finally:
        shared_server.request(f"/api/kernels/{kernel}", "DELETE")


def test_notebooks_of_a_network_find_each_other(image: str, tmp_path: Path) -> None:
    server = Server(tmp_path, config="c.Workbench.network = 'lan:lab'")
    try:
        first, second = Session(server, "The Scheduler.ipynb"), Session(server, "worker.ipynb")
        first.run("import socket; listener = socket.create_server(('', 8786))")
        second.run("import socket; talk = socket.create_connection(('the-scheduler', 8786), timeout=10)")
        assert (
            first.run("peer, (address, _) = listener.accept(); socket.gethostbyname('worker') == address").text
            == "True"
        )
    finally:
        server.close()


def test_a_kernel_by_rest_has_limits_of_its_own(shared_server: Server, image: str) -> None:
    (shared_server.root / "below").mkdir(exist_ok=True)
    path = "/workbench/api/kernels"
    wanted = {"name": "wb-python", "path": "below", "memory": "300M", "processes": 99, "cpus": 0.5, "network": "none"}
    status, model = shared_server.request(path, "POST", wanted)
    assert status == 201 and model["name"] == "wb-python"
    try:
        assert [kernel["id"] for kernel in shared_server.request("/api/kernels")[1]] == [model["id"]]
        rows = shared_server.request("/workbench/api/containers")[1]["containers"]
        (row,) = [row for row in rows if row["labels"].get("kernel") == model["id"]]
        assert row["limits"] == {"memory": 300 << 20, "processes": 99, "cpus": 0.5}
        assert (row["network"], row["folder"]) == ("none", str(shared_server.root / "below"))
        assert shared_server.request(f"/api/kernels/{model['id']}/restart", "POST", {})[0] == 200
    finally:
        shared_server.request(f"/api/kernels/{model['id']}", "DELETE")
    status, model = shared_server.request(path, "POST", {"name": "wb-python", "network": "host", "memory": 1 << 60})
    try:
        (row,) = shared_server.request("/workbench/api/containers")[1]["containers"]
        assert row["network"] == "outbound" and row["limits"]["memory"] < 1 << 60  # no more than the configuration's
    finally:
        shared_server.request(f"/api/kernels/{model['id']}", "DELETE")
    for wrong, code in (
        ({"name": "python3"}, 400), ({"name": "wb-nothing"}, 404), ({"name": "wb-python", "path": "../.."}, 404),
        ({"name": "wb-python", "path": "nowhere"}, 404), ({"name": "wb-python", "memory": "-1"}, 400),
        ({"name": "wb-python", "cpus": True}, 400), ({"name": "wb-python", "network": "lab"}, 400), ({}, 400),
        ({"name": "wb-python", "more": 1}, 400), ({"name": "wb-python", "processes": 0}, 400),
    ):  # fmt: skip
        status, answer = shared_server.request(path, "POST", wrong)
        assert status == code and "\n" not in answer["message"], (wrong, status, answer)
    assert shared_server.request("/api/kernels")[1] == []
