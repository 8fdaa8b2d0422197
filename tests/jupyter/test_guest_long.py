"""What takes long from inside: it tells how far it is, ends with the cell, and keeps nobody waiting; what comes out of
the launcher is written by the container itself."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.jupyter.clients import Outputs, argv_kernel, run
from tests.jupyter.conftest import Start
from workbench.guest import api
from workbench.jupyter import guest_channel
from workbench.linux import userns
from workbench.workbench import Workbench

pytestmark = pytest.mark.usefixtures("tidy")

NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
MIB = 1 << 20
#: A file that takes a moment to read, hash and write.
LARGE = """
import os
data = os.urandom(1 << 20)
with open('/opt/large', 'wb') as file:
    for n in range(600):
        file.write(n.to_bytes(8, 'big') + data[8:])
"""
ASK = """
import json, socket, time
def ask(data, path='/run/workbench/api'):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(path)
        s.sendall(data)
        return json.loads(s.makefile().readline() or '{}')
def soon(request, within=5.0):
    began = time.monotonic()
    while True:
        try:
            answer = ask(json.dumps(request).encode() + b'\\n')
        except BlockingIOError:  # too many wait to be let in
            answer = {'busy': True}
        if not answer.get('busy'):
            return round(time.monotonic() - began, 1), 'value' in answer
        time.sleep(0.2)
"""


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers here, which are in this process, have a word soon: an archive may be written in half a second."""
    monkeypatch.setattr(guest_channel, "_QUIET", 0.05)


def listing(home: Path) -> dict[str, Any]:
    """What the store holds, by name."""
    found = {
        str(path.relative_to(home)): path.read_text() if "refs" in path.parts and path.is_file() else ""
        for path in [path for pattern in ("blobs/*/*", "refs/**/*", "tmp/*") for path in home.glob(pattern)]
    }
    found |= {path.name.partition(".")[0]: "" for path in home.glob("layers/*")}  # as a tar, a tree, or both
    heads = {f"{path.parent.name}/{path.name}": path.read_text() for path in home.glob("containers/*/*/head*.json")}
    return found | heads


def settled(home: Path, before: dict[str, Any], cli: Any = None) -> None:
    """The store is as it was, as soon as who was interrupted has tidied up. cli: and what has no name is taken away."""
    until = time.monotonic() + 20
    while (now := listing(home)) != before:
        if cli:
            cli("gc")
        assert time.monotonic() < until, set(now) ^ set(before)
        time.sleep(0.05)


def interrupted(manager: KernelManager, client: BlockingKernelClient, code: str) -> Outputs:
    """Execute, and interrupt the kernel as soon as there is a word of progress."""
    outputs, request, until, idle, sent = Outputs(), client.execute(code), time.monotonic() + 60, False, False
    while not idle or not outputs.reply:
        assert time.monotonic() < until, (outputs.stdout, outputs.stderr)
        try:
            message = client.get_iopub_msg(timeout=0.1)
            if message["parent_header"].get("msg_id") == request:
                if message["header"]["msg_type"] == "display_data" and not sent:
                    manager.interrupt_kernel()
                    sent = True  # another would reach IPython while it tells of this one
                idle = outputs.take(message) or idle
        except queue.Empty:
            pass
        if idle:
            outputs.reply = client.get_shell_msg(timeout=10)["content"]
    return outputs


def progress(outputs: Outputs) -> list[str]:
    """What was shown, one in the place of the other."""
    updates = [one["content"] for one in outputs.messages if one["header"]["msg_type"] == "update_display_data"]
    return [str(data["text/plain"]) for data in [*outputs.data[:1], *(one["data"] for one in updates)]]


def numbers(text: str) -> tuple[float, float]:
    """Of ``…: 12.0 MiB of 600.0 MiB``."""
    words = text.rpartition(": ")[2].split()
    return float(words[0]), float(words[3])


def test_a_large_snapshot(start: Start, home: Path, cli: Any) -> None:
    manager, client = start()
    assert not run(client, LARGE + ASK).error
    before = listing(home)
    done = interrupted(manager, client, "%container snapshot -m Large -t guest/large")
    assert done.error == "KeyboardInterrupt" and "[guest/large" not in done.stdout
    assert progress(done)[-1].startswith("stopped after")
    settled(home, before)
    assert run(client, "1 + 1").text == "2"
    # the next one works, tells how far it is, and others are answered meanwhile
    run(client, "import threading; found = []")
    run(client, "threading.Timer(0.6, lambda: found.extend([soon({'do': 'log'}), soon({'do': 'branch'})])).start()")
    done = run(client, "%container snapshot -m Large -t guest/large")
    assert done.stdout.startswith("[guest/large ") and not done.error, done.stderr
    said = progress(done)
    assert said[-1].startswith("took ")
    counted = [numbers(text) for text in said if text.startswith("reading what changed: ")]
    assert len({number for number, _ in counted}) > 1 and {total for _, total in counted} == {600.0}
    assert [number for number, _ in counted] == sorted(number for number, _ in counted)
    waited = run(client, "found").text
    assert waited.count("True") == 2 and float(waited.split("(")[1].split(",")[0]) < 1.5, waited
    assert json.loads(cli("log", "guest/large", "--json").out)[0]["message"] == "Large"
    # while one is under way the status does without
    run(client, "file = open('/opt/large', 'r+b'); file.write(b'x'); file.flush()")
    run(
        client, "thread = threading.Thread(target=soon, args=({'do': 'snapshot', 'message': 'Again'},)); thread.start()"
    )
    began = time.monotonic()
    assert "limit of processes" in run(client, "%container status").text and time.monotonic() - began < 12
    run(client, "thread.join()")


@pytest.mark.first
def test_an_archive_from_inside_is_that_of_the_command_line(
    start: Start, home: Path, cli: Any, tmp_path: Path, elsewhere: Path
) -> None:
    manager, client = start()
    run(client, "open('/opt/new', 'w').write('new')")
    assert "[guest/sent " in run(client, "%container snapshot -m Sent -t guest/sent").stdout
    before = listing(home)
    done = interrupted(manager, client, "%container export -o mine.oci.tar")
    assert done.error == "KeyboardInterrupt", done.stdout
    settled(home, before)
    assert [name for name in os.listdir(tmp_path) if "mine" in name] == []
    (tmp_path / "work.ipynb").write_text(NOTEBOOK)
    done = run(client, "%container export --with work.ipynb")
    assert done.stdout.startswith("guest-sent.oci.tar  ") and not done.error, done.stderr
    assert numbers(progress(done)[0])[1] > 50
    out, mine = tmp_path / "out.oci.tar", tmp_path / "guest-sent.oci.tar"
    assert cli("export", "guest/sent", "-o", str(out), "--with", str(tmp_path / "work.ipynb")).code == 0
    assert mine.read_bytes() == out.read_bytes()
    settled(home, before)
    taken = cli("import", str(mine), cwd=elsewhere, WORKBENCH_HOME=str(elsewhere / "w"))
    assert taken.code == 0 and (elsewhere / "work.ipynb").read_text() == NOTEBOOK, taken.err
    log = cli("log", "guest/sent", "--oneline", WORKBENCH_HOME=str(elsewhere / "w")).out
    assert log.splitlines()[0].endswith("Sent")
    (tmp_path / "kept.part").write_text("of somebody else")
    for line, expected in (
        ("export nothing-here", "none that this container stands on"), ("export -o /nowhere/x", "can be written"),
        ("export nothing-here -o kept", "none that this container stands on"),
        ("export --with gone.ipynb", "No such file"), ("export --with out.oci.tar", "64"),
    ):  # fmt: skip
        done = run(client, f"%container {line}")
        assert done.stderr and not done.stdout, (line, done.stdout)
        assert expected in done.stderr or line.endswith("tar"), (line, done.stderr)
    assert (tmp_path / "kept.part").read_text() == "of somebody else"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder with another store, ``w``."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    yield folder
    userns.call("workbench.linux.trees:remove", str(folder / "w"))


def test_only_notebooks_go_along(start: Start, home: Path, tmp_path: Path) -> None:
    _, client = start()
    before = listing(home)
    (tmp_path / "fake.ipynb").write_text("#!/bin/sh\n")
    (tmp_path / "list.ipynb").write_text('{"cells": {}, "metadata": {}, "nbformat": 4}')
    (tmp_path / "deep.ipynb").write_text("[" * (1 << 20))
    (tmp_path / ".hidden.ipynb").write_text(NOTEBOOK)
    (tmp_path / "conf.py").write_text(NOTEBOOK)
    (tmp_path / "large.ipynb").write_bytes(b" " * (17 << 20))
    for name in ("fake.ipynb", "list.ipynb", "deep.ipynb", ".hidden.ipynb", "conf.py", "large.ipynb"):
        said = run(client, f"%container export --with {name}").stderr
        assert "is no notebook" in said or "16 MiB together" in said, (name, said)
    run(client, ASK)
    for along in ({"../up.ipynb": 2}, {"/etc/x.ipynb": 2}, {"a.ipynb": -1}, {"a.ipynb": 1 << 30}, {"a.ipynb": "2"},
                  {"a.ipynb": True}):  # fmt: skip
        answer = run(client, f"ask(json.dumps({{'do': 'export', 'along': {along!r}}}).encode() + b'\\n[]')").text
        assert "error" in answer and "value" not in answer, (along, answer)
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith((".tar", ".part"))) == []
    settled(home, before)


def test_what_it_names_is_in_the_container(start: Start, home: Path) -> None:
    """The launcher may write anywhere, the container not."""
    _, client = start()
    run(client, "open('/opt/new', 'w').write('new')")
    run(client, "%container snapshot -m x -t guest/paths")
    name = f"workbench-test-{os.getpid()}"
    before = listing(home)
    for place in (f"/etc/{name}", f"../../../../../../../root/{name}"):
        assert name in run(client, f"%container export -o {place}").stdout
        assert run(client, f"import os; os.path.getsize('{place}') > 1 << 20").text == "True"
        assert run(client, f"%container freeze --no-build -o {place}.d").stdout.startswith(
            f"recipe {place}.d/recipe.toml"
        )
        assert run(client, f"os.listdir('{place}.d')").text == "['recipe.toml']"
    for folder in filter(lambda path: os.access(path, os.R_OK), ("/etc", "/root", str(home), str(home.parent))):
        assert not [found for found in os.listdir(folder) if found.startswith(name)], folder
    settled(home, before)


def test_a_recipe_from_inside_is_that_of_the_command_line(start: Start, home: Path, cli: Any, tmp_path: Path) -> None:
    manager, client = start()
    run(client, "open('/opt/new', 'w').write('new')")
    run(client, "%container snapshot -m x -t guest/recipe")
    names = set(Workbench().refs.all())
    before = listing(home)
    done = interrupted(manager, client, "%container freeze")
    assert done.error == "KeyboardInterrupt", (done.stdout, done.stderr)
    settled(home, before, cli)
    assert not [name for name in os.listdir(tmp_path) if "frozen" in name]
    done = run(client, "%container freeze", timeout=200)
    assert done.stdout.startswith("recipe recipe-frozen/recipe.toml  on "), (done.stdout, done.stderr)
    assert "equal  " in done.stdout and "not    1 file that no package owns: /opt/new" in done.stdout
    assert set(Workbench().refs.all()) == names  # what was built has none
    host = cli("freeze", "guest/recipe", "-o", "host", cwd=tmp_path)
    assert host.code == 0, host.err
    for name in ("recipe.toml", "recipe.lock"):
        assert (tmp_path / "recipe-frozen" / name).read_text() == (tmp_path / "host" / name).read_text()
    assert "is there, and not empty" in run(client, "%container freeze").stderr


def test_nothing_is_fetched_for_a_container_without_a_network(start: Start, tmp_path: Path) -> None:
    from traitlets.config import Config

    _, client = start(traits={"config": Config({"Workbench": {"network": "none"}})})
    assert "this container reaches nothing; %container freeze --no-build" in run(client, "%container freeze").stderr
    assert run(client, "%container freeze --no-build -o f").stdout.startswith("recipe f/recipe.toml")
    assert os.listdir(tmp_path / "f") == ["recipe.toml"]


HOSTILE = """
def crowd(count, line=b''):
    found = []
    for n in range(count):
        s = socket.socket(socket.AF_UNIX); s.connect('/run/workbench/api')
        try:
            s.sendall(line)
        except OSError:
            pass
        found.append(s)
    return found
idle = crowd(100)
first = soon({'do': 'log'})
begun = crowd(100, b'{"do": "log", ')
second = soon({'do': 'log'})
deaf = crowd(3, b'{"do": "export"}\\n')
time.sleep(1)
third = soon({'do': 'log'})
many = crowd(100, b'{"do": "branch"}\\n')
fourth = soon({'do': 'log'})
print(json.dumps([first, second, third, fourth]))
"""


def test_who_does_not_read_or_write_keeps_nobody_waiting(start: Start, home: Path) -> None:
    _, client = start()
    before = listing(home)
    assert not run(client, ASK).error
    done = run(client, HOSTILE, timeout=100)
    assert not done.error, done.stderr
    answers = json.loads(done.stdout)
    assert all(right for _, right in answers), answers
    assert max(seconds for seconds, _ in answers[:3]) < 3 and answers[3][0] < 10, answers
    run(client, "for s in idle + begun + deaf + many: s.close()")
    settled(home, before)
    assert "image" in run(client, "%container status").text


SAID = "from workbench.guest.progress import Progress as P; p = P(); p.show('one'); p.show('two'); p.end(); p.end()"


def test_how_far_it_is_without_a_notebook() -> None:
    """On a terminal one line that is gone at the end, else lines."""
    done = subprocess.run([sys.executable, "-c", SAID], stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == "one\ntwo\n"
    master, inner = os.openpty()
    subprocess.run([sys.executable, "-c", SAID], stderr=inner, check=True)
    assert os.read(master, 99).decode() == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"
    os.close(master)
    os.close(inner)


def test_under_an_editor_that_starts_argv_itself(image: str, tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (_, client):
        run(client, "open('/opt/x', 'w').write('x')")
        assert "[guest/argv " in run(client, "%container snapshot -m x -t guest/argv").stdout
        assert run(client, "%container export").stdout.startswith("guest-argv.oci.tar  ")
        assert run(client, "%container freeze --no-build").stdout.startswith("recipe argv-frozen/recipe.toml  on ")
        text = (tmp_path / "argv-frozen/recipe.toml").read_text()
        assert 'name = "guest/argv-frozen"' in text and "#   1 file that no package owns: /opt/x" in text


def test_a_door_that_is_closed_has_no_thread(tmp_path: Path) -> None:
    """Nor does one whose container has ended cost anything from then on, while its server lives."""
    door = guest_channel.Door(lambda line, channel: channel.answer({"value": line.decode()}), "workbench-door")
    door.open(str(tmp_path / "api"))
    assert api.ask({"do": "x"}, str(tmp_path / "api")) == '{"do": "x"}\n'
    door.close()
    until = time.monotonic() + 5
    while any(thread.name == "workbench-door" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_reader_that_stops_is_dropped(start: Start, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_channel, "_TIMEOUT", 1.0)
    _, client = start()
    before = listing(home)
    run(client, ASK + "s = socket.socket(socket.AF_UNIX); s.connect('/run/workbench/api')")
    run(client, 's.sendall(b\'{"do": "export"}\\n\')')
    until = time.monotonic() + 30
    while listing(home) == before:  # it is at it
        assert time.monotonic() < until
        time.sleep(0.01)
    settled(home, before)
    assert run(client, "len(s.makefile('rb').read()) > 0").text == "True"
