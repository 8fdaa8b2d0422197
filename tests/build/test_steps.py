"""Files that go into a step's container and come out of it: nothing leads elsewhere."""

from __future__ import annotations

import os

import pytest

from workbench.build import steps
from workbench.build.lock import StepLock, Wheel, checked
from workbench.model import BuildFailed, InvalidInput


def test_what_is_handed_over_stays_in_its_folder(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_text("new")
    folder.mkdir()
    (folder / "there").write_text("old")
    steps.hand_over(folder, {"a/b": source, "there": source})
    assert (folder / "a" / "b").read_text() == "new"
    assert (folder / "there").read_text() == "old"
    for name in (str(tmp_path / "out"), "../out", "a/../../out"):
        with pytest.raises(InvalidInput, match="leads elsewhere"):
            steps.hand_over(folder, {name: source})
    assert sorted(os.listdir(tmp_path)) == ["folder", "source"]


def test_what_comes_out_is_a_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("content")
    assert steps.read_out(tmp_path, "file") == b"content"
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("link", "pipe", "folder", "device", "nothing"):
        with pytest.raises(BuildFailed):
            steps.read_out(tmp_path, name)
    with pytest.raises(BuildFailed, match="no file of a sensible size"):
        steps.read_out(tmp_path, "file", limit=3)


@pytest.mark.parametrize("wheel", [
    Wheel("../x", "1", "x-1-py3-none-any.whl", "0" * 64, 1), Wheel("x", "1", "../x.whl", "0" * 64, 1),
    Wheel("x", "1", "x-1-py3-none-any.whl", "", 1), Wheel("x", "1", "x-1-py3-none-any.whl", "0" * 64, 0),
])  # fmt: skip
def test_what_was_chosen_is_held_against_what_a_lock_may_say(wheel):
    with pytest.raises(InvalidInput, match="lock step python: "):
        checked(StepLock("python", {}, wheels=(wheel,)))
