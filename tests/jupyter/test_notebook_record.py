"""A notebook goes on with what it changed, knows its environment, and opens in exactly that one."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import nbformat
import pytest

from tests.jupyter.conftest import Server
from tests.jupyter.test_server import Session
from workbench.history import notebooks
from workbench.workbench import Workbench

pytestmark = pytest.mark.usefixtures("tidy")

WRITE = "open('/opt/state', 'w').write('{}')"
READ = "open('/opt/state').read()"


def editor(*cells: tuple[str, str], kernel: str = "wb-python") -> dict[str, Any]:
    """A notebook as an editor has it in memory. cells: id and source."""
    made = [nbformat.v4.new_code_cell(source, id=name, execution_count=1) for name, source in cells]
    spec = {"name": kernel, "display_name": "Python", "language": "python"}
    return dict(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec}))


def save(server: Server, notebook: dict[str, Any], path: str = "n.ipynb") -> dict[str, Any]:
    """As an editor saves; what is on disk then."""
    body = {"type": "notebook", "format": "json", "content": notebook}
    status, answer = server.request(f"/api/contents/{path}", "PUT", body)
    assert status in (200, 201), answer
    found: dict[str, Any] = json.loads((server.root / path).read_text())
    return found


def test_it_goes_on_and_starts_anew(server: Server, cli) -> None:
    save(server, editor())
    first = Session(server)
    first.run(WRITE.format("mine"))
    first.run("x = 1")
    first.close()
    again = Session(server)
    done = again.run(READ)
    assert done.text == "'mine'"
    assert "goes on with what it changed before" in done.stderr and "reset --hard" in done.stderr
    assert again.run("x").stderr == "" and again.run("x").error == "NameError"
    assert len(json.loads(cli("ps", "--all", "--json").out)) == 1
    other = Session(server, "other.ipynb")  # what one notebook did is not another's
    assert other.run(READ).error == "FileNotFoundError"
    other.close()
    assert "now in" in again.run("%container reset --hard").stdout
    assert again.run(READ).error == "FileNotFoundError"
    again.close()
    assert json.loads(cli("ps", "--all", "--json").out) == []


def test_two_at_once_do_not_share_it(server: Server, cli) -> None:
    save(server, editor())
    first = Session(server)
    first.run(WRITE.format("mine"))
    first.close()
    kernels = [
        server.request("/api/sessions", "POST", {
            "path": "n.ipynb", "name": "n.ipynb", "type": "notebook", "kernel": {"name": "wb-python"},
        })[1]["kernel"]["id"]
        for _ in range(2)
    ]  # fmt: skip
    assert len(set(kernels)) == 1 or len(json.loads(cli("ps", "--json").out)) == 2
    for kernel in set(kernels):
        server.request(f"/api/kernels/{kernel}", "DELETE")


def test_the_notebook_says_what_it_ran_in(server: Server) -> None:
    held = editor(("one", WRITE.format("a")), ("two", READ), ("three", "1"))
    save(server, held)
    session = Session(server)
    base = Workbench().image("python").id
    session.run(WRITE.format("a"), cell="one")
    session.run("%container snapshot -m A -t note/env")
    session.run(READ, cell="two")
    taken = Workbench().image("note/env")
    found = save(server, held)
    schema = json.loads(notebooks.SCHEMA.read_text())
    jsonschema.validate(found["metadata"]["workbench"], schema)
    assert found["metadata"]["workbench"] == {"version": 1, "image": taken.id, "ref": "note/env", "parent": base}
    assert found["metadata"]["kernelspec"]["name"] == "wb-note-env"
    assert [cell["metadata"].get("workbench") for cell in found["cells"]] == [
        {"image": base},
        {"image": taken.id},
        None,
    ]
    for cell in found["cells"][:2]:
        jsonschema.validate(cell["metadata"]["workbench"], schema | schema["$defs"]["cell"])
    # the editor knows nothing of it, and its next save loses nothing; nor does one after the kernel has gone
    assert save(server, held) == found
    session.close()
    assert save(server, held) == found
    held["cells"][0]["source"] = "changed"
    assert "workbench" not in save(server, held)["cells"][0]["metadata"]
    held["metadata"]["kernelspec"]["name"] = "python3"
    assert "workbench" not in save(server, held)["metadata"]


def test_what_is_uploaded_stays(server: Server) -> None:
    """A colleague's notebook says where it ran; that no kernel runs for it here yet is no reason to forget it."""
    held = editor(("one", READ), kernel="wb-note-env")
    said = {"version": 1, "image": "sha256:" + "1" * 64, "ref": "note/env"}
    held["metadata"]["workbench"] = said
    held["cells"][0]["metadata"]["workbench"] = {"image": said["image"]}
    found = save(server, held, "uploaded.ipynb")
    assert found["metadata"]["workbench"] == said
    assert found["cells"][0]["metadata"]["workbench"] == {"image": said["image"]}
    assert save(server, held, "uploaded.ipynb") == found


def test_it_opens_in_the_very_image_or_not_at_all(server: Server, cli) -> None:
    held = editor(("one", READ))
    save(server, held)
    session = Session(server)
    session.run(WRITE.format("first"))
    session.run("%container snapshot -m First -t note/env")
    save(server, held)
    session.run(WRITE.format("second"))
    session.run("%container snapshot -m Second")
    session.close()
    (row,) = json.loads(cli("ps", "--all", "--json").out)
    assert cli("rm", row["id"]).code == 0
    first = Workbench().image("note/env~1").id
    opened = Session(server, kernel="wb-note-env")
    done = opened.run(READ)
    assert done.text == "'first'"
    assert f"in {first[7:19]}, as the notebook says; note/env has moved since" in done.stderr
    opened.close()
    # another kernel than the one that it names is that kernel
    plain = Session(server, kernel="wb-python")
    assert plain.run(READ).error == "FileNotFoundError"
    plain.close()
    # what it names stays while it does
    archive = server.root / "env.oci.tar"
    assert cli("export", "note/env~1", "-o", str(archive)).code == 0
    assert cli("rmi", "note/env").code == 0
    cli("gc")
    assert Workbench().image(first).id == first
    text = (server.root / "n.ipynb").read_text()
    (server.root / "n.ipynb").unlink()
    cli("gc")
    (server.root / "n.ipynb").write_text(text.replace('"parent"', '"seen": ["env.oci.tar"], "parent"'))
    assert cli("import", str(archive), "note/env").code == 0  # and a kernel wb-note-env
    (server.root / "n.ipynb").write_text(text.replace(first, "sha256:" + "1" * 64).replace(
        '"parent"', '"seen": ["env.oci.tar"], "parent"'
    ))  # fmt: skip
    body = {"path": "n.ipynb", "name": "n.ipynb", "type": "notebook", "kernel": {"name": "wb-note-env"}}
    status, answer = server.request("/api/sessions", "POST", body)
    assert status >= 400
    told = "image 111111111111 (note/env) is not here, last seen in env.oci.tar"
    assert told in json.dumps(answer)
    assert json.loads(cli("ps", "--json").out) == []
    # who has no such kernel chooses another one, and is told as well
    plain = Session(server, kernel="wb-python")
    assert f"this notebook was last run in another environment: {told}" in plain.run("1").stderr
    plain.close()
