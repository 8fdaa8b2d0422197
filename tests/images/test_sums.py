"""What of a layer is named when another one differs from its lock."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.images import sums

#: More files in one folder than there may be sums, beside folders of all sizes.
TREE = {f"a/many/{number}": 1 for number in range(300)} | {f"lib/pack{number}/x": number for number in range(40)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, size in TREE.items():
        for number in range(size):
            path = tmp_path / name / str(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    return tmp_path


@pytest.mark.parametrize("most", [1, 10, 60, 1000])
def test_what_was_changed_is_below_what_is_named_and_nothing_else_is(tree: Path, most: int) -> None:
    before = sums.summary(str(tree), most=most)
    assert len(before) <= most + 1
    assert sums.summary(str(tree), list(before)) == before
    for name in ("lib/pack17/x/3", "a/many/7/0", "lib/pack39/x/0"):
        (tree / name).write_text("changed")
        after = sums.summary(str(tree), list(before))
        named = [path for path in before | after if before.get(path) != after.get(path)]
        assert len(named) == 1
        assert name.startswith(named[0])
        before = after


def test_what_is_new_is_named_by_the_folder_that_stands_for_it(tree: Path) -> None:
    before = sums.summary(str(tree), most=60)
    (tree / "lib" / "other").mkdir()
    after = sums.summary(str(tree), list(before))
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {"lib", "lib/other"}


def test_the_largest_folders_are_told_apart_first(tree: Path) -> None:
    found = sums.summary(str(tree), most=60)
    assert "lib/pack39/x" in found or "lib/pack39" in found
    assert "a/many/7" not in found


def test_a_long_list_is_cut() -> None:
    assert sums.told(["a", "b", "c"], most=2) == "a, b and 1 more"
