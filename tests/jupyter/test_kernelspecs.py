"""Kernelspecs: what is written, where, and what is never touched."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from workbench.jupyter import kernelspecs
from workbench.model import Conflict, Image, InvalidInput, Kernel

KERNEL = Kernel(("python", "-m", "ipykernel_launcher", "-f", "{connection_file}"), "python", "P", "message", ("curve",))
IMAGE = Image("sha256:" + "0" * 64, (), kernel=KERNEL)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("python", "wb-python"),
        ("python:latest", "wb-python"),
        ("python:v1", "wb-python-v1"),
        ("team/deep/learning:2024.1", "wb-team-deep-learning-2024.1"),
        ("a:UPPER", "wb-a-upper"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert kernelspecs.kernel_name(name) == expected
    assert re.fullmatch(r"[a-z0-9._-]+", expected)


def test_content(data: Path) -> None:
    folder = kernelspecs.write("python", IMAGE)
    assert folder == data / "kernels" / "wb-python"
    known = json.loads((folder / "kernel.json").read_text())
    assert os.path.isabs(known["argv"][0])
    assert known["argv"][-2:] == ["python", "{connection_file}"]
    assert known["interrupt_mode"] == "message"
    assert known["metadata"]["kernel_provisioner"]["provisioner_name"] == "workbench"
    assert known["metadata"]["kernel_provisioner"]["config"]["image"] == "python"
    assert known["metadata"]["supported_encryption"] == ["curve"]
    assert known["metadata"]["workbench"]["image"] == IMAGE.id
    assert "kernel_protocol_version" not in known
    assert sorted(path.name for path in folder.iterdir()) == ["kernel.json", "logo-svg.svg"]
    from jupyter_client.kernelspec import KernelSpecManager

    assert KernelSpecManager().get_kernel_spec("wb-python").display_name == "P"


def test_a_second_write_replaces_and_remove_removes(data: Path) -> None:
    folder = kernelspecs.write("python", IMAGE)
    assert kernelspecs.write("python", IMAGE) == folder
    assert [name for name, _ in kernelspecs.written()] == ["wb-python"]
    kernelspecs.remove("python")
    kernelspecs.remove("python")
    assert not folder.exists()


def test_somebody_elses_stays(data: Path) -> None:
    folder = data / "kernels" / "wb-python"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["x"], "display_name": "mine", "language": "x"}')
    with pytest.raises(Conflict, match="not ours"):
        kernelspecs.write("python", IMAGE)
    kernelspecs.remove("python")
    assert folder.exists()


def test_an_image_without_a_kernel(data: Path) -> None:
    with pytest.raises(InvalidInput, match="no kernel"):
        kernelspecs.write("base", Image(IMAGE.id, ()))
