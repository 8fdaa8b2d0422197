"""The tutorials run from top to bottom in the kernels that they name, with what they promise to show."""

from __future__ import annotations

import shutil
import subprocess
import sys

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
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_tutorial_runs(path, image, cli, tmp_path):
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
    if path.stem == "quickstart":
        assert str(tmp_path) in outputs[0]["data"]["text/html"]
