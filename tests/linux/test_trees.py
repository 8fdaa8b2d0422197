"""Removing trees that somebody else may have filled."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.linux import trees

FEW, MORE = 500, 2500


def files(at: Path, number: int) -> None:
    (at / f"{number:0200}").touch()


def folders(at: Path, number: int) -> None:
    (at / f"{number:0200}").mkdir()


@pytest.mark.parametrize("make", [files, folders])
@pytest.mark.parametrize("inner", ["", "inner"])
def test_many_names_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], None], inner: str
) -> None:
    """Bytes that Python counts for one more; a name alone has 250."""
    monkeypatch.setattr(trees, "_SOME", 100)
    held = {}
    for count in (FEW, MORE):
        (tmp_path / "tree" / inner).mkdir(parents=True)
        for number in range(count):
            make(tmp_path / "tree" / inner, number)
        tracemalloc.start()
        try:
            trees.remove(str(tmp_path / "tree"))
            held[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert os.listdir(tmp_path) == []
    assert (held[MORE] - held[FEW]) / (MORE - FEW) < 10


def test_names_that_it_would_take_itself(tmp_path: Path) -> None:
    """What is deep down goes up under a name that the tree may have, as a file, a folder, or one with content."""
    tree = tmp_path / "tree"
    for number in range(20):  # so many that some are taken, in whatever order the disk lists them
        (tree / f"{number}" / "/".join(["d"] * 150)).mkdir(parents=True)
        if number % 3 == 0:
            (tree / f".deep-{number}").write_text("x")
        else:
            (tree / f".deep-{number}" / ("full" * (number % 3 - 1))).mkdir(parents=True)
    trees.remove(str(tree))
    assert os.listdir(tmp_path) == []
