"""Clients that know no provisioner: a test for each one's way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from tests.conftest import our_processes
from tests.jupyter.clients import (
    Argv,
    argv_kernel,
    connection,
    family,
    gone,
    interrupt_message,
    run,
    spec,
)

pytestmark = pytest.mark.usefixtures("image")


@pytest.mark.alone
def test_vs_code(tmp_path: Path) -> None:
    """It waits for the ports, interrupts every descendant and then the launcher, and ends with SIGTERM."""
    kernel = Argv(tmp_path)
    ports = json.loads(kernel.file.read_text())
    try:
        for channel in ("shell", "iopub"):
            until = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", ports[f"{channel}_port"]), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < until
                    time.sleep(0.02)
        client = kernel.connect()
        assert run(client, "x = 41; print(x + 1)").stdout == "42\n"

        def interrupt() -> None:
            for pid in [*kernel.descendants(), kernel.process.pid]:
                os.kill(pid, signal.SIGINT)

        start = time.monotonic()
        assert run(client, "import time; time.sleep(60)", after=interrupt).error == "KeyboardInterrupt"
        assert time.monotonic() - start < 2
        for _ in range(3):  # once: nothing that comes later is interrupted as well
            assert run(client, "time.sleep(0.1); x").text == "41"
        everything = kernel.family()
        assert len(everything) >= 4
        for pid in [*kernel.descendants(), kernel.process.pid]:
            os.kill(pid, signal.SIGTERM)
        kernel.end()
        assert gone(everything)
    finally:
        kernel.close()


@pytest.mark.alone
def test_zed(tmp_path: Path) -> None:
    """It wants an element that is the connection file's, interrupts by message, and kills the launcher itself."""
    argv = spec()["argv"]
    assert len(argv) >= 2
    assert argv.count("{connection_file}") == 1
    with argv_kernel(tmp_path) as (kernel, client):
        start = time.monotonic()
        done = run(client, "import time; time.sleep(60)", after=lambda: interrupt_message(client))
        assert done.error == "KeyboardInterrupt"
        assert time.monotonic() - start < 2
        everything = kernel.family()
        kernel.process.kill()
        kernel.process.wait()
        assert gone(everything)


def test_positron(tmp_path: Path) -> None:
    """It passes a registration file from protocol 5.5 on; else a connection file, interrupt by signal or message."""
    assert "kernel_protocol_version" not in spec()
    with argv_kernel(tmp_path) as (kernel, client):
        done = run(client, "import time; time.sleep(60)", after=lambda: kernel.process.send_signal(signal.SIGINT))
        assert done.error == "KeyboardInterrupt"
        client.shutdown()
        assert kernel.end()[0] == 0


def test_emacs(tmp_path: Path) -> None:
    """It waits for the connection file's access time to change, and interrupts its process group."""
    file = connection(tmp_path)
    past = time.time() - 7200
    os.utime(file, (past, time.time()))
    with argv_kernel(tmp_path, file=file, start_new_session=True) as (kernel, client):
        assert file.stat().st_atime > past + 1
        group = os.getpgid(kernel.process.pid)
        assert group == kernel.process.pid
        done = run(client, "import time; time.sleep(60)", after=lambda: os.killpg(group, signal.SIGINT))
        assert done.error == "KeyboardInterrupt"
        assert run(client, "1 + 1").text == "2"


def test_many_interrupts_are_one(tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (kernel, client):

        def storm() -> None:
            for _ in range(20):
                kernel.process.send_signal(signal.SIGINT)
                time.sleep(0.002)

        code = "import time\nn = 0\nfor _ in range(4):\n  try: time.sleep(1)\n  except KeyboardInterrupt: n += 1\nn"
        assert run(client, code, after=storm).text == "1"


def test_ipc(tmp_path: Path) -> None:
    with argv_kernel(tmp_path, file=connection(tmp_path, transport="ipc")) as (kernel, client):
        assert run(client, "6 * 7").text == "42"
        modes = {path.stat().st_mode & 0o077 for path in tmp_path.glob("s-*")}
        assert modes == {0}
        client.shutdown()
        kernel.end()
    assert not list(tmp_path.glob("s-*"))


def test_curve_end_to_end(tmp_path: Path) -> None:
    with argv_kernel(tmp_path, file=connection(tmp_path, curve=True)) as (_, client):
        assert client.curve_publickey
        assert run(client, "6 * 7").text == "42"


def test_curve_is_never_clear(tmp_path: Path) -> None:
    """A client that does not encrypt gets nothing from a kernel that was asked to."""
    file = connection(tmp_path, curve=True)
    with argv_kernel(tmp_path, file=file) as (kernel, _):
        content = json.loads(file.read_text())
        plain = tmp_path / "plain.json"
        plain.write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("curve")}))
        from jupyter_client.blocking import BlockingKernelClient

        client = BlockingKernelClient()
        client.load_connection_file(str(plain))
        client.start_channels()
        client.shell_channel.socket.sndtimeo = 2000  # turned away before it has asked, it would wait for good
        with pytest.raises((RuntimeError, zmq.Again)):
            client.wait_for_ready(timeout=2)
        client.stop_channels()
        assert kernel.process.poll() is None


@pytest.mark.first
def test_flood_through_a_slow_client(tmp_path: Path) -> None:
    """100 MB of output, and a client that reads nothing for a while: not one byte is lost."""
    with argv_kernel(tmp_path) as (_, client):
        line = "x" * 999
        code = f"import sys\nfor i in range(100_000): sys.stdout.write({line!r} + '\\n')\n"
        request = client.execute(code)
        time.sleep(5)
        size, idle, until = 0, False, time.monotonic() + 120
        while not idle:
            assert time.monotonic() < until
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "stream":
                size += len(message["content"]["text"])
            idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        assert size == 100_000_000


def test_large_display(tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (_, client):
        code = "from IPython.display import display\ndisplay({'text/plain': 'y' * 50_000_000}, raw=True)"
        assert len(run(client, code, timeout=120).text) == 50_000_000


def test_input(tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (_, client):
        assert run(client, "input('name? ')", answer="Ada").text == "'Ada'"


def test_the_reason_of_a_death(tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (kernel, client):
        client.execute("import os; os._exit(7)")
        code, err = kernel.end()
    assert code == 7
    assert "exit code 7" in err


_CLIENT = """
import json, os, subprocess, sys, time
process = subprocess.Popen(json.loads(sys.argv[1]), stdin=subprocess.DEVNULL)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_client_takes_everything_along(tmp_path: Path) -> None:
    file = connection(tmp_path)
    before = set(our_processes())
    argv = [str(file) if word == "{connection_file}" else word for word in spec()["argv"]]
    client = subprocess.Popen(
        [sys.executable, "-c", _CLIENT, json.dumps(argv)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert client.stdout is not None
    launcher = int(client.stdout.readline())
    view = Argv.__new__(Argv)
    view.file = file
    view.process = client
    kernel = view.connect()
    assert run(kernel, "1 + 1").text == "2"
    everything = family(before)
    assert launcher in everything
    kernel.stop_channels()
    client.kill()
    client.wait()
    client.stdout.close()
    assert gone(everything)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["python"], "usage: workbench-kernel IMAGE CONNECTION_FILE"),
        (["python", "/nowhere/kernel.json"], "there is no such file"),
        (["no-such-image", "{file}"], "no-such-image"),
        (["python", "{elsewhere}"], "asks for 192.0.2.1"),
        (["python", "{registration}"], "protocol 5.5"),
        (["python", "{half}"], "one of the two CURVE keys"),
        (["python", "{taken}"], "in use"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    files = {
        "{file}": connection(tmp_path),
        "{elsewhere}": connection(tmp_path, ip="192.0.2.1"),
        "{registration}": connection(tmp_path, registration_port=1),
        "{half}": connection(tmp_path, curve_publickey="x" * 40),
        "{taken}": connection(tmp_path, hb_port=taken.getsockname()[1]),
    }
    command = [spec()["argv"][0], *(str(files.get(word, word)) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    taken.close()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
