"""A real server: kernels through its REST and websocket, as JupyterLab uses them."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from tests.jupyter.clients import HUNGRY, Outputs, ask_to_end, family, gone
from tests.jupyter.conftest import Server
from workbench.linux import cgroup


class Session:
    """A notebook with its kernel, as a browser has it."""

    def __init__(self, server: Server, path: str = "n.ipynb", kernel: str = "wb-python") -> None:
        self.server = server
        body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": kernel}}
        status, answer = server.request("/api/sessions", "POST", body)
        assert status == 201, answer
        self.kernel = answer["kernel"]["id"]
        self.connect()

    def connect(self) -> None:
        """Open the websocket. The server answers once the kernel's iopub channel is known to arrive."""
        self.session = uuid.uuid4().hex
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{self.server.port}/api/kernels/{self.kernel}/channels?session_id={self.session}",
            header=[f"Authorization: token {self.server.token}"], timeout=60, suppress_origin=True,
        )  # fmt: skip

    def reconnect(self) -> None:
        """After a restart, as browsers do: what a kernel publishes before it is heard is lost, in any kernel."""
        self.socket.close()
        self.connect()

    def send(self, kind: str, content: dict[str, Any], channel: str = "shell", cell: str = "") -> str:
        """Send a request, for a cell with an id as JupyterLab does; its id."""
        request = uuid.uuid4().hex
        header = {"msg_id": request, "msg_type": kind, "session": self.session, "username": "", "version": "5.3"}
        metadata = {"cellId": cell} if cell else {}
        message = {"header": header, "parent_header": {}, "metadata": metadata, "content": content, "channel": channel}
        self.socket.send(json.dumps(message | {"buffers": []}))
        return request

    def execute(self, code: str, cell: str = "") -> str:
        """Ask for an execution."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        return self.send("execute_request", content | {"allow_stdin": False, "stop_on_error": True}, cell=cell)

    def messages(self, timeout: float = 60) -> Iterator[dict[str, Any]]:
        """What arrives."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            opcode, data = self.socket.recv_data(control_frame=True)  # a ping would begin the waiting anew
            if opcode == websocket.ABNF.OPCODE_TEXT:
                yield json.loads(data)
        raise TimeoutError

    def run(self, code: str, after: Callable[[], Any] | None = None, cell: str = "") -> Outputs:
        """Execute and wait for reply and idle."""
        outputs, request, idle = Outputs(), self.execute(code, cell), False
        for message in self.messages():
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["channel"] == "iopub":
                idle = outputs.take(message) or idle
                if after is not None and message["header"]["msg_type"] == "execute_input":
                    time.sleep(0.3)
                    after()
            elif message["channel"] == "shell":
                outputs.reply = message["content"]
            if idle and outputs.reply:
                return outputs
        raise AssertionError

    def post(self, action: str) -> None:
        """Interrupt or restart."""
        status, answer = self.server.request(f"/api/kernels/{self.kernel}/{action}", "POST", {})
        assert status in (200, 204), answer

    def close(self) -> None:
        """Close the tab and shut the kernel down."""
        self.socket.close()
        self.server.request(f"/api/kernels/{self.kernel}", "DELETE")


@pytest.mark.alone
def test_a_notebook_lives(server: Server) -> None:
    assert "wb-python" in server.request("/api/kernelspecs")[1]["kernelspecs"]
    status, logo = server.request("/kernelspecs/wb-python/logo-svg.svg")
    assert status == 200 and logo.startswith("<svg")
    notebook = Session(server)
    assert notebook.run("import os; print(os.getcwd())").stdout.strip() == str(server.root)
    notebook.run("x = 5; open('/opt/mine', 'w').write('kept')")
    begin = time.monotonic()
    done = notebook.run("import time; time.sleep(60)", after=lambda: notebook.post("interrupt"))
    assert done.error == "KeyboardInterrupt" and time.monotonic() - begin < 2
    assert notebook.run("x").text == "5"
    notebook.post("restart")
    notebook.reconnect()
    assert notebook.run("open('/opt/mine').read()").text == "'kept'"
    assert notebook.run("x").error == "NameError"
    rows = server.request("/workbench/api/containers")[1]["containers"]
    (row,) = [row for row in rows if row["labels"].get("kernel") == notebook.kernel]
    notebook.close()
    status, row = server.request(f"/workbench/api/containers/{row['id']}")
    assert status == 200 and row["status"] == "exited"
    status, answer = server.request(f"/workbench/api/containers/{row['id']}", "DELETE")
    assert status == 409 and "that no snapshot has" in answer["message"]
    assert server.request(f"/workbench/api/containers/{row['id']}?force=1", "DELETE")[0] == 204


def test_a_memory_limit_is_told_and_others_go_on(image: str, tmp_path: Path) -> None:
    server = Server(tmp_path, config="c.Workbench.memory = '300M'")
    try:
        one, other = Session(server, "one.ipynb"), Session(server, "other.ipynb")
        other.run("y = 7")
        one.run("1")
        request = one.execute(HUNGRY)
        told, restarted = "", False
        for message in one.messages():
            if message["header"]["msg_type"] == "stream" and message["parent_header"].get("msg_id") == request:
                told += message["content"]["text"]
            if message["header"]["msg_type"] == "error":
                assert os.getuid() and message["content"]["ename"] == "MemoryError"  # no control group: rlimits
                return
            restarted |= message["content"].get("execution_state") == "restarting"
            if told and restarted:
                break
        assert "memory limit of 300.0 MiB" in told
        assert "memory limit of 300.0 MiB" in server.log.read_text()
        assert other.run("y").text == "7"
        one.reconnect()
        assert one.run("1 + 1").text == "2"  # restarted by the server
        one.close()
        other.close()
    finally:
        server.close()


@pytest.mark.skipif("memory" not in cgroup.available()[1], reason="no control group: Python says MemoryError itself")
@pytest.mark.parametrize("before", [0, 3])
def test_a_death_in_one_call_is_told_in_its_cell(image: str, tmp_path: Path, before: int) -> None:
    """The call holds the interpreter's lock, so that the kernel cannot even say that it is busy with that cell."""
    server = Server(tmp_path, config="c.Workbench.memory = '300M'")
    try:
        notebook = Session(server)
        for number in range(before):
            notebook.run(f"{number}")
        # The first leaves no time for anything; the others wait in the kernel's queue, as with Run All.
        request, *_ = [notebook.execute(code) for code in ("x = b'1' * 10**9", "2", "3")]
        for message in notebook.messages():
            if message["header"]["msg_type"] == "stream":
                break
        assert "memory limit of 300.0 MiB" in message["content"]["text"]
        assert message["parent_header"]["msg_id"] == request
        notebook.socket.close()
    finally:
        server.close()


def test_stopping_a_kernels_container_ends_the_kernel(server: Server) -> None:
    notebook = Session(server)
    notebook.run("open('/opt/mine', 'w').write('kept')")
    (row,) = server.request("/workbench/api/containers")[1]["containers"]
    assert server.request(f"/workbench/api/containers/{row['id']}", "DELETE")[0] == 409
    assert server.request(f"/workbench/api/containers/{row['id']}/stop", "POST", {})[0] == 204
    assert server.request("/api/kernels")[1] == []
    assert server.request(f"/workbench/api/containers/{row['id']}/logs")[0] == 200
    assert server.request("/workbench/api/containers")[1]["containers"] == []
    after = server.request("/workbench/api/containers?all=1")[1]["containers"]
    assert row["id"] in [other["id"] for other in after]
    assert server.request(f"/workbench/api/containers/{row['id']}?force=1", "DELETE")[0] == 204
    notebook.socket.close()


def test_stopped_from_a_shell_it_is_not_started_again(server: Server, cli: Any) -> None:
    notebook = Session(server)
    notebook.run("open('/opt/mine', 'w').write('kept')")
    (row,) = server.request("/workbench/api/containers")[1]["containers"]
    assert cli("stop", row["id"]).code == 0
    until = time.monotonic() + 15
    while server.request("/api/kernels")[1]:
        assert time.monotonic() < until, server.log.read_text()[-2000:]
        time.sleep(0.1)
    (after,) = server.request("/workbench/api/containers?all=1")[1]["containers"]
    assert after["id"] == row["id"] and after["status"] == "exited" and after["exit"]["asked"]
    assert "stopped by" in server.log.read_text()
    assert server.request(f"/workbench/api/containers/{row['id']}?force=1", "DELETE")[0] == 204
    notebook.socket.close()


def test_required_encryption(image: str, tmp_path: Path) -> None:
    server = Server(tmp_path, config="c.MappingKernelManager.transport_encryption = 'required'")
    try:
        notebook = Session(server)
        assert notebook.run("6 * 7").text == "42"
        notebook.close()
    finally:
        server.close()


def test_a_removed_image_is_told_to_the_browser(server: Server) -> None:
    from jupyter_core.paths import jupyter_data_dir

    folder = Path(jupyter_data_dir()) / "kernels" / "wb-removed"
    folder.mkdir(parents=True)
    known = json.loads((folder.parent / "wb-python" / "kernel.json").read_text())
    known["metadata"]["kernel_provisioner"]["config"]["image"] = "removed"
    (folder / "kernel.json").write_text(json.dumps(known))
    try:
        body = {"path": "r.ipynb", "name": "r", "type": "notebook", "kernel": {"name": "wb-removed"}}
        status, answer = server.request("/api/sessions", "POST", body)
        assert status == 500  # the server's own word for a kernel that did not start
        assert answer["message"].startswith("find an image: there is none named removed")
        assert "\n" not in answer["message"]
    finally:
        (folder / "kernel.json").unlink()
        folder.rmdir()


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_an_ended_server_leaves_nothing(image: str, tmp_path: Path, how: str) -> None:
    from tests.conftest import our_processes

    before = set(our_processes())
    server = Server(tmp_path)
    try:
        notebook = Session(server)
        assert notebook.run("1 + 1").text == "2"
        everything = family(before)
        assert len(everything) >= 3
        if how == "asked":
            ask_to_end(server.process, server.log)
        else:
            server.process.kill()
            server.process.wait(timeout=30)
    finally:
        server.process.kill()
        server.process.wait()
    assert gone(everything)
    for file in Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("*"):
        file.unlink()  # a killed server leaves its own files, as every server does
