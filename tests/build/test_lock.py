"""A lock: what it says comes back as it was written, what is wrong in it is one line, and it names no host."""

from __future__ import annotations

import re

import msgspec
import pytest

from tests.conftest import RECIPE
from workbench.build import lock, recipe
from workbench.build.lock import Deb, Source, StepLock, Wheel
from workbench.model import InvalidInput

SHA = "0123456789abcdef" * 4
STEPS = (
    StepLock(
        "base", {"suite": "bookworm"}, "mmdebstrap 1.3.5", f"sha256:{SHA}",
        debian=(Deb("libc6", "2.36-9", "amd64", SHA, 3, "debian/pool/main/g/glibc/libc6_2.36-9.deb", "required"),),
        sums={"": "00000000", "etc/a \"b\"\n": "11111111"},
    ),
    StepLock(
        "python", {"packages": ["six ; python_version > '3'", "ü"]}, "uv 1.0", f"sha256:{SHA}",
        wheels=(Wheel("six", "1", "six-1-py3-none-any.whl", SHA, 5, Source("six-1.tar.gz", SHA, 7)),),
        tool=Wheel("uv", "1.0", "uv-1.0-py3-none-any.whl", SHA, 9),
    ),
)  # fmt: skip


def test_it_comes_back_as_it_was_written():
    made = lock.new(1_700_000_000, "x86_64", STEPS)
    text = lock.write(made)
    assert lock.parse(text) == made
    assert lock.write(lock.parse(text)) == text
    assert lock.parse(text).epoch == 1_700_000_000


def test_a_changed_version_is_a_changed_line():
    other = msgspec.structs.replace(STEPS[1].wheels[0], version="2")
    changed = (STEPS[0], msgspec.structs.replace(STEPS[1], wheels=(other,)))
    before, after = (lock.write(lock.new(1, "x86_64", steps)).splitlines() for steps in (STEPS, changed))
    assert sum(one != two for one, two in zip(before, after, strict=True)) == 1


WRONG = [
    ("version = 1", "Object missing required field"),
    ('version = 2\ntime = 2026-01-01T00:00:00Z\nmachine = "x"', "it is of version 2"),
    ("version = ", "Invalid value"),
    (lock.write(lock.new(1, "x", STEPS)).replace(SHA, SHA[:-1]), "matching regex"),
    (lock.write(lock.new(1, "x", STEPS)).replace("six-1-py3", "../six-1-py3"), "matching regex"),
    (lock.write(lock.new(1, "x", STEPS)).replace('name = "six"', 'name = "/root/.ssh"'), "matching regex"),
    (lock.write(lock.new(1, "x", STEPS)).replace('name = "six"', 'name = ".."'), "matching regex"),
    (lock.write(lock.new(1, "x", STEPS)).replace("main/g", "main/../../g"), "matching regex"),
    (lock.write(lock.new(1, "x", STEPS)).replace("asks", "aks"), "unknown field `aks`"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_said_in_one_line(text, said):
    with pytest.raises(InvalidInput) as caught:
        lock.parse(text, "here/recipe.lock")
    assert str(caught.value).startswith("read a lock: here/recipe.lock: ")
    assert said in str(caught.value)
    assert "jupyter workbench lock" in str(caught.value)


def test_shipped_recipes_have_a_lock_of_theirs_that_names_no_address():
    for folder in recipe.shipped().values():
        text = (folder / lock.FILE).read_text()
        found = lock.load(folder)
        assert found is not None
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", step.diff_id) for step in found.steps)
        assert "://" not in text
        assert not re.search(r"\b(?:deb\.debian|pypi|pythonhosted|localhost|127\.0)", text)


def test_a_lock_goes_where_the_recipe_is_or_says_why_not(tmp_path):
    assert lock.load(RECIPE / "nowhere") is None
    (tmp_path / "folder").mkdir()
    path = lock.save(lock.new(1, "x86_64", STEPS), tmp_path / "folder")
    assert lock.load(path.parent) == lock.new(1, "x86_64", STEPS)
    assert [entry.name for entry in path.parent.iterdir()] == [lock.FILE]
    with pytest.raises(InvalidInput, match="copy the recipe to a folder of yours"):
        lock.save(lock.new(1, "x86_64", STEPS), "/proc")
