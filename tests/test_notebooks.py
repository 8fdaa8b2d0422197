"""The tutorials run from top to bottom in the kernels that they name, with what they promise to show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import nbformat
import pytest

from tests.conftest import TOP

NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))


#: What each shows, beside text: a name that is not here shows nothing else.
SHOWN = {
    "quickstart": {"text/html", "image/png", "application/vnd.jupyter.widget-view+json"},
    "tensorflow": {"text/html", "image/png"},
    "sklearn": {"text/html", "image/png"},
    "r": {"text/html", "image/png"},
    "snapshot": {"text/html"},
}
#: As those of the recipes, tests/recipes/test_recipes.py.
ONCE = {"tensorflow": pytest.mark.second, "sklearn": pytest.mark.first}


@pytest.fixture
def tidy(cli) -> Iterator[None]:
    """What a tutorial keeps goes."""
    yield
    for row in json.loads(cli("ps", "--all", "--json").out):
        cli("rm", "-f", row["id"])
    cli("rmi", "tutorial", "tutorial-two")
    cli("gc")


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=ONCE.get(path.stem, ())) for path in NOTEBOOKS]
)
def test_a_tutorial_runs(path, image, cli, tmp_path, request):
    if path.stem == "snapshot":
        request.getfixturevalue("tidy")
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    name = notebook.metadata.kernelspec.name.removeprefix("wb-")
    done = cli("build", str(TOP / "recipes" / name), "--refresh", timeout=280)
    assert done.code == 0, done.err
    copy = shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(copy, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert SHOWN.get(path.stem, set()) <= shown
    if path.stem == "snapshot":
        said = "".join(output.get("text", "") for output in outputs)
        assert "] Add toolz\n" in said and "] Set the threshold\n" in said and "1 package; " in said
        assert said.count("now in ") == 2 and "False\n" in said and "\n0.05\n" in said and "* tutorial-two" not in said
        assert "* tutorial " in said and "  tutorial-two " in said
    if path.stem == "quickstart":
        assert str(tmp_path) in outputs[0]["data"]["text/html"]
