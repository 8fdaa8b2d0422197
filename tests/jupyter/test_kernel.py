"""A kernel's life by the provisioner."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import stat
import time
from pathlib import Path

import pytest

from tests.jupyter.clients import HUNGRY, family, gone, run, timed
from tests.jupyter.conftest import Start
from workbench.jupyter import listening
from workbench.model import WorkbenchError


def test_it_is_in_a_container_over_unix_sockets(start: Start, tmp_path: Path, image: str) -> None:
    manager, client = start()
    done = run(client, "import os, platform; print(os.getuid(), os.getcwd(), platform.node())")
    uid, cwd, node = done.stdout.split()
    assert (uid, cwd) == ("0", str(tmp_path))
    assert len(node) == 12
    assert manager.transport == "ipc"
    folder = Path(manager.ip).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.glob("k-*")} == {f"k-{number}" for number in range(1, 6)}
    assert stat.S_IMODE((folder / "connection.json").stat().st_mode) == 0o600
    assert len(manager.ip) < 90
    content = json.loads(Path(manager.connection_file).read_text())
    assert content["transport"] == "ipc"


def test_what_is_asked_at_once_is_heard_on_every_channel(start: Start) -> None:
    """jupyter_console asks a kernel once and then looks for its output; a refused connection waits 0.1 to 0.2 s."""
    manager, client = start()
    for _ in range(2):
        for number in range(1, 6):
            with socket.socket(socket.AF_UNIX) as channel:
                channel.connect(f"{manager.ip}-{number}")
        manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)


def test_a_kernel_that_listens_late_is_started(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_LISTENING", 0.0)
    manager, client = start()
    assert run(client, "6 * 7").text == "42"
    assert manager.is_alive()


def test_the_environment_is_not_the_servers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    _, client = start(env=os.environ | {"JPY_SESSION_NAME": "/somewhere/n.ipynb", "OTHER": "1"})
    env = run(client, "import os, json; print(json.dumps(dict(os.environ)))").stdout
    assert "hunter2" not in env
    seen = json.loads(env)
    assert seen["JPY_SESSION_NAME"] == "/somewhere/n.ipynb"
    assert "OTHER" not in seen
    assert "JPY_PARENT_PID" not in seen


@pytest.mark.alone
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "!sleep 60", "while True: pass"])
def test_interrupt(start: Start, code: str) -> None:
    manager, client = start()
    run(client, "kept = 5")
    begin = time.monotonic()
    done = run(client, code, after=manager.interrupt_kernel)
    assert time.monotonic() - begin < 1.6  # it is asked for after half a second
    assert done.error == "KeyboardInterrupt" or code.startswith("!")
    assert run(client, "kept").text == "5"
    assert "sleep" not in run(client, "!cat /proc/[0-9]*/comm").stdout


def test_restart_keeps_the_writable_layer_and_the_container(start: Start) -> None:
    manager, client = start()
    run(client, "x = 1; open('/opt/mine', 'w').write('kept')")
    node = run(client, "import platform; platform.node()").text
    manager.restart_kernel()
    client.wait_for_ready(timeout=60)
    assert run(client, "x").error == "NameError"
    assert run(client, "open('/opt/mine').read()").text == "'kept'"
    assert run(client, "import platform; platform.node()").text == node
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    assert run(client, "open('/opt/mine').read()").text == "'kept'"
    container = manager.provisioner._container.id
    manager.shutdown_kernel()
    from workbench.jupyter import shared

    bench = shared.workbench()
    (row,) = [row for row in bench.ps(True) if row["id"] == container]
    assert row["status"] == "exited"
    bench.remove(container, force=True)


def test_an_unchanged_container_goes_with_its_kernel(start: Start) -> None:
    manager, client = start()
    run(client, "1")
    folder, files = Path(manager.ip).parent, Path(manager.connection_file)
    container = Path(manager.provisioner._container.folder)
    manager.shutdown_kernel()
    assert not folder.exists()
    assert not files.exists()
    assert not container.exists()


def test_memory_limit_says_why(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    from traitlets.config import Config

    manager, client = start(traits={"config": Config({"Workbench": {"memory": "300M"}})})
    request = client.execute(HUNGRY)
    words = _last_words(client, request)
    if words == "MemoryError":  # no control group to be had: rlimits, and Python says itself what it met
        assert os.getuid()
        return
    assert "memory limit of 300.0 MiB" in words
    until = time.monotonic() + 2
    while manager.is_alive():
        assert time.monotonic() < until
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    assert run(client, "1 + 1").text == "2"


@pytest.mark.parametrize("encryption", ["disabled", "required"])
def test_a_crash_says_why(start: Start, encryption: str, caplog: pytest.LogCaptureFixture) -> None:
    _manager, client = start(transport_encryption=encryption)
    run(client, "import os")
    with caplog.at_level(logging.ERROR):
        words = _last_words(client, client.execute("import time; time.sleep(0.3); os.kill(os.getpid(), 11)"))
    assert "SIGSEGV" in words


def _last_words(client, request: str) -> str:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            message = client.get_iopub_msg(timeout=0.2)
        except queue.Empty:
            continue
        if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") == request:
            assert message["content"]["name"] == "stderr"
            return str(message["content"]["text"])
        if message["msg_type"] == "error":
            return str(message["content"]["ename"])
    raise TimeoutError("no last words")


def test_a_wanted_end_has_no_last_words(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    manager, _client = start()
    manager.shutdown_kernel(now=True)
    assert "Kernel died" not in caplog.text
    assert timed(lambda: manager.is_alive()) < 0.1


def test_curve_when_required_or_possible(start: Start) -> None:
    for policy in ("required", "auto"):
        manager, client = start(transport_encryption=policy)
        assert manager.curve_publickey
        assert client.curve_publickey == manager.curve_publickey
        assert run(client, "6 * 7").text == "42"
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
        assert run(client, "6 * 7").text == "42"


def test_curve_is_refused_in_one_word(start: Start, image: str) -> None:
    """A kernelspec that promises what its image can't keep."""
    from dataclasses import replace

    from workbench.jupyter import connection, shared

    kernel = shared.workbench().image(image).kernel
    assert kernel is not None
    with pytest.raises(WorkbenchError, match="unencrypted"):
        connection.require_curve(replace(kernel, supported_encryption=()), "an-image")


def test_resolve_path(start: Start, tmp_path: Path) -> None:
    manager, _client = start()
    (tmp_path / "a.py").write_text("pass")
    (tmp_path / "out").symlink_to("/etc")
    assert manager.resolve_path("a.py") == str(tmp_path / "a.py")
    assert manager.resolve_path(str(tmp_path / "a.py")) == str(tmp_path / "a.py")
    for path in ("b.py", "/etc/passwd", "../../../etc/passwd", "out/passwd", "~/x", "/opt/app/bin/python"):
        assert manager.resolve_path(path) is None


def test_input(start: Start) -> None:
    _, client = start()
    assert run(client, "input('name? ')", answer="Ada").text == "'Ada'"


def test_comms_and_widgets(start: Start) -> None:
    _, client = start()
    done = run(client, "import ipywidgets as w; s = w.IntSlider(value=3); s")
    assert "application/vnd.jupyter.widget-view+json" in done.data[-1]
    opened = [message["content"] for message in done.messages if message["msg_type"] == "comm_open"]
    model = done.data[-1]["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert model in {content["comm_id"] for content in opened}
    update = {"comm_id": model, "data": {"method": "update", "state": {"value": 42}, "buffer_paths": []}}
    client.shell_channel.send(client.session.msg("comm_msg", update))
    assert run(client, "s.value").text == "42"


def test_inline_plot(start: Start) -> None:
    _, client = start()
    done = run(client, "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()", timeout=120)
    assert any("image/png" in data for data in done.data)


def test_flood_and_large_display(start: Start) -> None:
    _, client = start()
    code = "import sys\nfor i in range(100_000): sys.stdout.write('x' * 999 + '\\n')\n"
    assert run(client, code, timeout=120).size == 100_000_000
    code = "from IPython.display import display\ndisplay({'text/plain': 'y' * 50_000_000}, raw=True)"
    assert len(run(client, code, timeout=120).text) == 50_000_000


def test_a_removed_image_is_one_line(start: Start, tmp_path: Path) -> None:
    from jupyter_core.paths import jupyter_data_dir

    folder = Path(jupyter_data_dir()) / "kernels" / "wb-removed"
    folder.mkdir(parents=True)
    known = json.loads((folder.parent / "wb-python" / "kernel.json").read_text())
    known["metadata"]["kernel_provisioner"]["config"]["image"] = "removed"
    (folder / "kernel.json").write_text(json.dumps(known))
    try:
        with pytest.raises(Exception, match="removed") as caught:
            start(kernel_name="wb-removed")
        assert "\n" not in str(caught.value)
    finally:
        (folder / "kernel.json").unlink()
        folder.rmdir()


def test_a_killed_process_takes_its_kernels_along(image: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.conftest import our_processes

    code = (
        "from jupyter_client.manager import start_new_kernel; import time\n"
        "km, kc = start_new_kernel(kernel_name='wb-python'); print('up', flush=True); time.sleep(600)"
    )
    before = set(our_processes())
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # where a killed client leaves its connection file
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    everything = family(before)
    assert len(everything) >= 4
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(everything)
