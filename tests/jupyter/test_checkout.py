"""``%container checkout``, ``reset``, ``branch``: the kernel comes back in another environment, under every client."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import nbformat
import pytest
from jupyter_core.paths import jupyter_data_dir
from nbclient import NotebookClient

from tests.jupyter.clients import argv_kernel, run
from tests.jupyter.conftest import Server, Start
from tests.jupyter.test_server import Session
from workbench.workbench import Workbench

pytestmark = pytest.mark.usefixtures("tidy")

WRITE = "open('/opt/state', 'w').write('{}')"
READ = "print(open('/opt/state').read())"


#: What is typed, and what is then printed.
TOUR = [
    (WRITE.format("one"), ""),
    ("%container snapshot -m One -t out/plots", "[out/plots "),
    (WRITE.format("two"), ""),
    ("%container snapshot -m Two", "[out/plots "),
    ("%container checkout out/plots~1", "now in "),
    (READ, "one"),
    ("%container branch", "  out/plots "),
    (WRITE.format("three"), ""),
    ("%container checkout -b out/side", "snapshots move out/side from now on"),
    ("%container snapshot -m Three", "[out/side "),
    ("%container checkout out/plots", "now in "),
    (READ, "two"),
    ("%container branch", "* out/plots "),
    (WRITE.format("four"), ""),
    ("%container reset --hard", "now in "),
    (READ, "two"),
    ("%container log --oneline", "Two"),
]


@pytest.mark.usefixtures("start")  # which ends this process's helper
def test_from_top_to_bottom_by_nbclient(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(code) for code, _ in TOUR]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "wb-python", "display_name": ""}})
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for cell, (code, wanted) in zip(notebook.cells, TOUR, strict=True):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert wanted in said, (code, cell.outputs)
    bench = Workbench()
    names = bench.refs.all()
    assert bench.image(names["out/plots:latest"]).parent == bench.image(names["out/side:latest"]).parent


def test_by_a_manager_whose_loop_does_not_run(start: Start) -> None:
    tour(start()[1])


def test_between_two_kernels_it_looks_alive(start: Start) -> None:
    """nbclient looks each second; here somebody looks all the time."""
    manager, client = start()
    run(client, WRITE.format("one"))
    run(client, "%container snapshot -m One -t out/alive")
    seen: list[bool] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(asyncio.run(alive()))

    async def alive() -> bool:
        return bool(manager.provisioner.has_process and await manager.provisioner.poll() is None)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        assert "now in" in run(client, "%container checkout HEAD~1").stdout
    finally:
        over.set()
        watcher.join()
    assert len(seen) > 100
    # Only to who ends it, from the order to end until it has ended.
    assert seen.count(False) <= len(seen) / 50, seen.count(False)


def test_by_an_editor_that_starts_argv_itself(image: str, tmp_path: Path) -> None:
    with argv_kernel(tmp_path) as (_, client):
        tour(client)


def tour(client) -> None:
    for code, wanted in TOUR[:6]:
        done = run(client, code)
        assert wanted in done.stdout, (code, done)


def test_under_a_server(server: Server) -> None:
    notebook = Session(server)
    for code, wanted in TOUR[:4]:
        assert wanted in notebook.run(code).stdout
    row = server.request("/workbench/api/containers")[1]["containers"][0]
    done = notebook.run("%container checkout out/plots~1")  # which the next kernel answers
    assert "now in" in done.stdout
    assert notebook.run(READ).stdout == "one\n"
    after = server.request("/workbench/api/containers")[1]["containers"]
    assert [each["id"] for each in after] == [row["id"]]
    assert after[0]["pid"] != row["pid"]
    model = server.request(f"/api/kernels/{notebook.kernel}")[1]
    assert model["execution_state"] in ("idle", "busy", "starting")
    notebook.close()


def test_over_rest(server: Server) -> None:
    api = "/workbench/api"
    notebook = Session(server)
    notebook.run(WRITE.format("one"))
    (row,) = server.request(f"{api}/containers")[1]["containers"]
    place = f"{api}/containers/{row['id']}"
    status, taken = server.request(f"{place}/snapshot", "POST", {"message": "One", "tag": "out/rest", "dry_run": True})
    assert (status, taken["image"], taken["paths"]) == (200, None, ["opt/state"])
    status, taken = server.request(f"{place}/snapshot", "POST", {"message": "One", "tag": "out/rest", "author": "A"})
    assert (status, taken["ref"]) == (201, "out/rest")
    assert server.request(f"{place}/snapshot", "POST", {"message": "again"})[0] == 200
    notebook.run(WRITE.format("two"))
    status, answer = server.request(f"{place}/checkout", "POST", {"image": "HEAD~1"})
    assert status == 409 and "that no snapshot has" in answer["message"]
    assert notebook.run(READ).stdout == "two\n"  # and the kernel was left alone
    status, answer = server.request(f"{place}/checkout", "POST", {"create": "out/side"})
    assert (status, answer["moved"], answer["ref"]) == (200, False, "out/side")
    status, answer = server.request(f"{place}/reset", "POST", {"hard": True})
    assert (status, answer["image"]) == (200, taken["image"])
    notebook.reconnect()
    assert notebook.run(READ).stdout == "one\n"
    entries = server.request(f"{api}/history?image=out/rest&number=5")[1]["entries"]
    assert [entry["message"] for entry in entries] == ["One", "built from a recipe"]
    assert entries[0]["author"] == "A"
    diff = server.request(f"{api}/diff?one=out/rest~1&other=out/rest")[1]
    assert [row["path"] for row in diff["files"]] == ["opt/state"]
    assert server.request(f"{api}/branches", "POST", {"name": "out/more", "image": "out/rest"})[0] == 201
    assert server.request(f"{api}/branches", "POST", {"name": "out/more", "image": "out/rest"})[0] == 409
    rows = {row["name"]: row for row in server.request(f"{api}/branches")[1]["branches"]}
    assert rows["out/side"]["containers"] == [row["id"]] and rows["out/more"]["image"] == taken["image"]
    assert "wb-out-more" in server.request("/api/kernelspecs")[1]["kernelspecs"]
    notebook.close()


def test_what_was_done_is_told_also_without_a_card(server: Server) -> None:
    """A kernelspec of somebody else's has the name: the snapshot was made nevertheless, and the name given."""
    api = "/workbench/api"
    foreign = [Path(jupyter_data_dir(), "kernels", f"wb-out-{name}") for name in ("mine", "named", "tagged")]
    text = '{"argv": ["x"], "display_name": "mine", "language": "x"}'
    for folder in foreign:
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(text)
    try:
        notebook = Session(server)
        notebook.run(WRITE.format("one"))
        (row,) = server.request(f"{api}/containers")[1]["containers"]
        body = {"message": "One", "tag": "out/mine"}
        status, taken = server.request(f"{api}/containers/{row['id']}/snapshot", "POST", body)
        assert (status, taken["image"]) == (201, Workbench().image("out/mine").id)
        made = {"name": "out/named", "image": taken["image"]}
        assert server.request(f"{api}/branches", "POST", made) == (201, made)
        assert notebook.run("%container tag out/tagged").stdout.startswith("out/tagged ")
        assert server.log.read_text().count("has no kernel in the launcher: write the kernelspec wb-out-") == 3
        notebook.close()
        assert {(folder / "kernel.json").read_text() for folder in foreign} == {text}
    finally:
        for folder in foreign:
            shutil.rmtree(folder)


def test_nothing_is_lost_unasked(start: Start, cli) -> None:
    _, client = start()
    run(client, WRITE.format("one"))
    run(client, "%container snapshot -m One -t out/keep")
    run(client, WRITE.format("two"))
    run(client, "import os; os.makedirs('/opt/venv/lib/python3.11/site-packages/madeup-1.2.dist-info')")
    run(client, "open('/opt/venv/lib/python3.11/site-packages/madeup-1.2.dist-info/METADATA', 'w').write('Name: x')")
    for code in ("%container checkout HEAD~1", "%container reset", "%container checkout python"):
        said = run(client, code).stderr
        assert "that no snapshot has" in said and "madeup-1.2" in said and "%container snapshot" in said, said
    assert run(client, READ).stdout == "two\n"
    (row,) = json.loads(cli("ps", "--json").out)
    done = cli("checkout", row["id"], "python")
    assert done.code == 1 and "that no snapshot has" in done.err
    assert "it is running" in cli("checkout", "-f", row["id"], "python").err
    assert "now in" in run(client, "%container checkout -f python").stdout
    assert run(client, "import os; os.path.exists('/opt/state')").text == "False"
    # the name that the image was built under is nobody's branch
    run(client, WRITE.format("x"))
    run(client, "%container snapshot -m More")
    assert Workbench().image("python").parent == ""


def test_what_is_not_its_own_cannot_be_checked_out(start: Start, image: str) -> None:
    bench = Workbench()
    bench.tag("out/others", "python", force=True)
    _, client = start()
    assert "none that this container stands on" in run(client, "%container checkout out/nothing").stderr
    assert "that name is another image's" in run(client, "%container checkout -b python").stderr
    assert "has no parent" in run(client, "%container checkout HEAD~1").stderr
    assert "wants an IMAGE" in run(client, "%container checkout").stderr
    assert run(client, "1").reply["status"] == "ok"


def test_from_a_shell(start: Start, cli, tmp_path: Path) -> None:
    manager, client = start()
    run(client, WRITE.format("one"))
    run(client, "%container snapshot -m One -t out/shell")
    run(client, WRITE.format("two"))
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    (row,) = json.loads(cli("ps", "--all", "--json").out)
    done = cli("rm", row["id"])
    assert done.code == 1 and "it holds 1 change, " in done.err and "rm --force" in done.err
    done = cli("reset", row["id"])
    assert done.code == 1 and "reset --hard" in done.err
    assert cli("checkout", "-b", "out/two", row["id"]).code == 0
    assert cli("snapshot", row["id"], "-m", "Two").out.startswith("[out/two ")
    assert f"{row['id']}" in cli("branch").out
    assert cli("branch", "out/third", "out/two~1").code == 0
    assert "that name is an image's" in cli("branch", "out/third", "out/two").err
    done = cli("checkout", row["id"], "out/shell")
    assert done.code == 0, done.err
    assert cli("diff", "out/shell", "out/third").err == "no difference\n"
    assert json.loads(cli("ps", "--all", "--json").out)[0]["image_id"] == Workbench().image("out/shell").id
    assert cli("reset", "--hard", row["id"], "HEAD~1").code == 0
    assert Workbench().image("out/shell").id == Workbench().image("python").id
    assert "reset: moving to HEAD~1" in Workbench().refs.log("out/shell")[0]["why"]
    assert cli("rm", row["id"]).code == 0
