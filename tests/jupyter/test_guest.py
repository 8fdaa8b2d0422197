"""``%container`` under each kind of client, and what the code inside cannot ask for."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket
from jupyter_client.manager import start_new_kernel

from tests.jupyter.clients import argv_kernel, run
from tests.jupyter.conftest import Server, Start
from tests.jupyter.test_server import Session
from workbench import guest
from workbench.guest import api, words
from workbench.jupyter import guest_api
from workbench.workbench import Workbench

pytestmark = pytest.mark.usefixtures("tidy")

#: A package as pip leaves it, without a network.
INSTALL = """
import pathlib
site = pathlib.Path('/opt/venv/lib/python3.11/site-packages')
(site / 'madeup-1.2.dist-info').mkdir()
(site / 'madeup-1.2.dist-info' / 'METADATA').write_text('Name: madeup\\nVersion: 1.2\\n')
(site / 'madeup.py').write_text('answer = 42')
"""


def test_a_notebook_keeps_what_it_installed(server: Server) -> None:
    notebook = Session(server)
    notebook.run(INSTALL)
    assert "madeup-1.2.dist-info" in notebook.run("%container snapshot --dry-run").stdout
    notebook.run("x = 'alive'")
    said = notebook.run("%container snapshot -m 'Add madeup' -t guest/plots").stdout
    assert said.startswith("[guest/plots ") and "Add madeup" in said and "paused for" in said
    assert notebook.run("x").text == "'alive'"
    assert "nothing has changed" in notebook.run("%container snapshot -m again").stdout
    status = notebook.run("%container status").text
    assert (
        "\nmemory " in status
        and "guest/plots" in status
        and "0 files and folders" in status
        and "limit of processes" in status
    )
    log = notebook.run("%container log --oneline").stdout.splitlines()
    assert (len(log) == 2 and log[0].endswith("(guest/plots:latest) Add madeup")) or "(guest/plots)" in log[0]
    with_counts = notebook.run("%container log --oneline --stat").stdout.splitlines()
    assert with_counts == [log[0], "    1 package, 3 added, 0 modified, 0 deleted", log[1]]
    assert "parent" in notebook.run("%container log").text  # a table
    table = "get_ipython().run_line_magic('container', 'log --stat')[['packages', 'added', 'modified', 'deleted']]"
    assert notebook.run(f"{table}.values.tolist()").text == "[[1, 3, 0, 0], ['', '', '', '']]"
    asked = api.ask_shell({"do": "log", "image": "guest/plots", "stat": True, "number": 1})  # as without a container
    assert [row["changed"] for row in asked] == [{"packages": 1, "added": 3, "modified": 0, "deleted": 0}]
    diff = notebook.run("%container diff")
    assert diff.stdout.startswith("1 package; 3 files: 3 added, 0 modified, 0 deleted; +")
    assert "madeup" in diff.text and "1.2" in diff.text
    assert "Add madeup" in notebook.run("%container show").stdout
    # the same after a restart, and with the same socket
    notebook.post("restart")
    notebook.reconnect()
    notebook.run("open('/opt/second', 'w').write('x')")
    assert "[guest/plots " in notebook.run("%container snapshot -m Second").stdout
    assert len(notebook.run("%container log --oneline").stdout.splitlines()) == 3
    other = Session(server, "o.ipynb", "wb-guest-plots")
    assert other.run("import madeup; madeup.answer").text == "42"
    assert "guest/plots" in other.run("%container status").text
    listed = other.run("import os; [name for name in os.listdir('/run/workbench/host')]").text
    assert "guest" in listed


WATCHERS = "import threading; print([each.name for each in threading.enumerate() if 'dashboard' in each.name])"


def test_the_dashboard_is_kept_up_as_long_as_it_is_seen(start: Start) -> None:
    """Whatever draws no widgets has the lines, and nothing runs on; a front end says how many views there are."""
    _, client = start()
    shown = run(client, "%container status")
    assert "application/vnd.jupyter.widget-view+json" in shown.data[-1]
    assert shown.text.startswith("image  ") and "\nlimit of processes" in shown.text and not shown.stdout
    assert run(client, WATCHERS).stdout == "[]\n"
    opened = [message["content"] for message in shown.messages if message["header"]["msg_type"] == "comm_open"]
    figures = next(each["comm_id"] for each in opened if each["data"]["state"].get("_view_count") == 0)

    def say(views: int) -> None:
        data = {"method": "update", "state": {"_view_count": views}, "buffer_paths": []}
        client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": figures, "data": data}))

    say(1)
    sent, until = [], time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(queue.Empty):
            message = client.get_iopub_msg(timeout=0.1)
            if message["header"]["msg_type"] == "comm_msg" and message["content"]["comm_id"] == figures:
                sent.append(message["content"]["data"]["state"].get("value", ""))
    assert len(list(filter(None, sent))) in (2, 3, 4) and all("memory" in each for each in sent if each), sent
    assert run(client, WATCHERS).stdout == "['workbench-dashboard']\n"
    say(0)
    time.sleep(4)
    assert run(client, WATCHERS).stdout == "[]\n"


def test_a_dashboard_tells_of_its_new_widgets_once_its_kernel_has_begun(start: Start) -> None:
    """Of who begins to listen in the midst of it, before, its front end hears of widgets that it cannot know."""
    _, client = start()
    box = run(client, "%container status").data[-1]["application/vnd.jupyter.widget-view+json"]["model_id"]
    client.execute("%container reset --hard")
    heard, opened, until = [], set(), time.monotonic() + 6
    while time.monotonic() < until:
        with contextlib.suppress(queue.Empty):
            message = client.get_iopub_msg(timeout=0.1)
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "comm_open":
                opened.add("IPY_MODEL_" + content["comm_id"])
            elif kind == "status" and content["execution_state"] == "starting":
                heard.append("kernel")
            elif kind == "comm_msg" and content["comm_id"] == box:
                heard += [kind for kind in content["data"]["state"] if kind == "children"]
                assert set(content["data"]["state"].get("children", ())) <= opened
    assert heard in (["kernel", "children", "children"], ["children", "children"])


@pytest.mark.first
def test_a_dashboard_that_nobody_hears_leaves_its_kernel_idle(server: Server) -> None:
    """A tab that is closed tells nothing of its views; a server ends kernels that were idle for long."""
    notebook = Session(server)
    shown = notebook.run("%container status")
    opened = [message["content"] for message in shown.messages if message["header"]["msg_type"] == "comm_open"]
    figures = next(each["comm_id"] for each in opened if each["data"]["state"].get("_view_count") == 0)
    data = {"method": "update", "state": {"_view_count": 1}, "buffer_paths": []}
    notebook.send("comm_msg", {"comm_id": figures, "data": data})

    def drawn() -> Iterator[str]:
        for message in notebook.messages(timeout=30):
            if message["content"].get("comm_id") == figures and "value" in message["content"]["data"]["state"]:
                yield message["content"]["data"]["state"]["value"]

    def active() -> str:
        return str(server.request(f"/api/kernels/{notebook.kernel}")[1]["last_activity"])

    assert "memory" in next(drawn())
    notebook.socket.close()
    time.sleep(4)
    before = active()
    time.sleep(13)
    assert active() == before
    notebook.connect()
    assert "image" in next(drawn()), "it goes on for who comes back"
    notebook.close()


def test_the_status_without_widgets(start: Start) -> None:
    _, client = start()
    run(client, "import shutil; shutil.rmtree('/opt/venv/lib/python3.11/site-packages/ipywidgets')")
    shown = run(client, "%container status")
    assert shown.stdout.startswith("image  ") and "\nlimit of processes" in shown.stdout and not shown.data


def test_the_life_of_a_kernel_and_its_snapshot_is_told(server: Server) -> None:
    socket = websocket.create_connection(
        f"ws://127.0.0.1:{server.port}/api/events/subscribe?token={server.token}", timeout=60
    )

    def told(action: str) -> dict[str, str]:
        while True:
            event = json.loads(socket.recv())
            if "/workbench/" in event["schema_id"]:
                assert event["action"] == action, event
                return event

    notebook = Session(server)
    started = told("started")
    assert started["kernel"] == notebook.kernel
    notebook.run("open('/opt/new', 'w').write('x')")
    notebook.run("%container snapshot -m new -t told/new")
    taken = told("snapshot")
    assert taken["name"] == "told/new"
    notebook.run("%container tag told/other")
    assert told("tagged")["image"] == taken["image"]
    notebook.post("restart")
    told("ended")
    assert told("started")["container"] == started["container"]
    assert server.request("/workbench/api/images/told/other", "DELETE")[0] == 200
    removed = told("removed")
    assert (removed["name"], removed["image"]) == ("told/other", taken["image"])
    notebook.close()
    told("ended")
    kept = told("kept")
    assert server.request(f"/workbench/api/containers/{kept['container']}", "DELETE")[0] == 204
    socket.close()


def test_an_editor_that_starts_argv_itself(image: str, tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (_, client):
        run(client, "open('/opt/x', 'w').write('x')")
        assert "[guest-argv " in run(client, "%container snapshot -m x -t guest-argv").stdout
        assert "guest-argv" in run(client, "%container status").text


def test_what_it_does_not_know_is_said(start: Start) -> None:
    _, client = start()
    for line, expected in (
        ("%container", "this container: image"), ("%container frob", "is no verb"), ("%container log -n x", "a number"),
        ("%container log --frob", "has no option"), ("%container snapshot", "no message"),
        ("%container snapshot -m", "wants a value"), ("%container tag", "wants a NAME"), ("%container log 'x", "quot"),
        ("%container log a b", "takes no 'b'"), ("%container show nothing-here", "none that this container stands on"),
        ("%container tag UPPER", "is not one"), ("%container import x", "in a terminal, jupyter workbench import"),
    ):  # fmt: skip
        done = run(client, line)
        assert expected in done.stdout + done.stderr and not done.error, (line, done)


def test_nothing_of_others(start: Start, cli, image: str) -> None:
    """Neither can it move their names, nor see their images, nor take their kernels' place in the launcher."""
    cli("tag", "others/image", "python")
    made = json.loads(cli("images", "--json").out)
    _, client = start()
    run(client, "open('/opt/x', 'w').write('x')")
    for line in ("snapshot -m x -t python", "snapshot -m x -t others/image", "snapshot -m x -t others-image"):
        assert "is another image's" in run(client, f"%container {line}").stderr, line
    assert json.loads(cli("images", "--json").out) == made
    run(client, "%container snapshot -m x -t guest-own")
    assert "is another image's" in run(client, "%container tag python").stderr
    assert run(client, "%container tag guest-own-2").stdout.startswith("guest-own-2 ")
    foreign = next((row["id"] for row in made if row["id"] != image and row["names"]), "")
    if foreign:
        assert "none that this container stands on" in run(client, f"%container show {foreign}").stderr


HOSTILE = """
import json, os, socket
def say(data, size=1 << 16):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect('/run/workbench/api')
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            return s.recv(size).decode()
        except OSError as error:
            return str(error)
bad = [b'', b'x', b'null\\n', b'[]\\n', b'{}\\n', b'{"do": "snapshot", "look_only": true}\\n', b'{"do": ["status"]}\\n',
       b'{"do": "__init__"}\\n', b'{"do": "log", "number": -1}\\n', b'{"do": "log", "number": true}\\n',
       b'{"do": "log", "image": 1}\\n', b'\\xff\\xfe\\n', b'{"do": "log", "image": "../../etc"}\\n',
       b'[' * 100000 + b'\\n',
       b'{"do": "tag", "name": ""}\\n', b'{"do": "log", "image": "a\\\\u0000b"}\\n',
       b'{"do": "snapshot", "message": "x", "tag": "../../up"}\\n', b'x' * (1 << 20) + b'\\n',
       json.dumps({'do': 'snapshot', 'message': 'x', 'author': 'a\\nb'}).encode() + b'\\n']
print(json.dumps([say(data) for data in bad]))
"""


def test_hostile_requests(start: Start, workbench_names: set[str]) -> None:
    _, client = start()
    answers = json.loads(run(client, HOSTILE).stdout)
    for answer in answers:
        assert "value" not in answer and "Traceback" not in answer and "\n" not in answer.strip(), answer
    assert "image" in run(client, "%container status").text
    # its name can be taken away or lead elsewhere, to its own harm only
    run(client, "import os; os.unlink('/run/workbench/api'); os.symlink('/etc/passwd', '/run/workbench/api')")
    assert "ask the launcher" in run(client, "%container status").stderr
    assert run(client, "1").reply["status"] == "ok"
    assert workbench_names == set(Workbench().refs.all())


@pytest.fixture
def workbench_names(image: str) -> set[str]:
    return set(Workbench().refs.all())


def test_in_a_kernel_without_a_container(image: str, tmp_path: Path) -> None:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        assert not run(client, "%load_ext workbench").error
        assert "built from a recipe" in run(client, "%container log --oneline python").stdout
        assert "in no container" in run(client, "%container snapshot -m x").stderr
        assert run(client, "%container log --stat -n 0 python").text.startswith("Empty DataFrame")
        log = "%container log --stat -n 0 python"
        assert len(run(client, f"{log}\nfor _ in range(2):\n    {log}\n{log}").data) == 4  # not only the last one
        kept = run(client, f"x = {log}\ny = [{log[1:]!r}]\nprint(len(x))")
        assert kept.stdout == "0\n" and kept.data == []
        assert "name an image" in run(client, "%container log").stderr
        assert "no parent" in run(client, "%container diff python~1 python").stderr
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_what_runs_inside_is_python_3_8(tmp_path: Path) -> None:
    sources = sorted(Path(guest.__file__).parent.glob("*.py"))
    assert len(sources) > 3
    trees = [ast.parse(source.read_text(), feature_version=(3, 8)) for source in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert found <= set(sys.stdlib_module_names) | {"pandas", "IPython", "tornado", "ipywidgets", "comm"}
    os.symlink(Path(guest.__file__).parent, tmp_path / "workbench_guest")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from workbench_guest import magics, words; "
    code += "print(words.parse('log -n 3 a'))"
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'do': 'log', 'number': 3, 'image': 'a'}\n"


def test_every_verb_is_told_of(image: str) -> None:
    verbs = {line.split()[1] for line in words.HELP.splitlines() if line.startswith("%container ")}
    assert verbs == {*guest_api._KNOWN, "help"} - {"again", "hello", "dashboard"}  # which no user types
