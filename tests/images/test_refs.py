"""Names of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.images import config
from workbench.images.refs import Refs, split
from workbench.images.store import Store
from workbench.model import Conflict, Corrupt, InvalidInput, NotFound


@pytest.fixture
def refs(store: Store) -> Refs:
    return Refs(store.home)


def image(store: Store, number: int = 0) -> str:
    return store.add_image(config.encode(diff_ids=[], labels={"n": str(number)})).id


def test_set_get_delete(store: Store, refs: Refs) -> None:
    one, two = image(store, 1), image(store, 2)
    refs.set("python", one)
    refs.set("team/tools.x:V_1", two)
    assert refs.all() == {"python:latest": one, "team/tools.x:V_1": two}
    assert (store.home / "refs/team/tools.x/V_1").read_text() == two + "\n"
    refs.set("python:latest", two)
    assert refs.get("python") == two
    refs.delete("team/tools.x:V_1")
    assert refs.all() == {"python:latest": two} and not (store.home / "refs/team").exists()


@pytest.mark.parametrize(
    "name",
    ["", "A", "a b", "../a", "a/../b", "/a", "a/", "a//b", ".a", "a.", "a..b", "-a", "a:", "a:b:c", "a:.b", "a:-b",
     "a:b/c", "a:" + "t" * 129, "a" * 201, "a\n", "a:b\n", "é", "a:é", "a\0", "sha256:" + "0" * 64 + "x"],
)  # fmt: skip
def test_what_is_no_name(name: str, store: Store, refs: Refs) -> None:
    one = image(store)
    for action in (lambda: refs.set(name, one), lambda: refs.get(name), lambda: refs.delete(name)):
        with pytest.raises(InvalidInput) as refused:
            action()
        assert "\n" not in str(refused.value)
    assert refs.all() == {}


def test_names_that_are(refs: Refs) -> None:
    assert split("a") == ("a", "latest") and split("a/b-c_d.e/0:T.1-_") == ("a/b-c_d.e/0", "T.1-_")


def test_only_images_get_names(store: Store, refs: Refs) -> None:
    with pytest.raises(NotFound):
        refs.set("a", "sha256:" + "0" * 64)
    for text in ("", "latest", "sha256:../../etc", "sha256:" + "A" * 64):
        with pytest.raises(InvalidInput):
            refs.set("a", text)
    assert refs.all() == {}


def test_a_file_in_the_way_of_a_folder(store: Store, refs: Refs) -> None:
    one = image(store)
    refs.set("a:b", one)
    with pytest.raises(Conflict, match="another name"):
        refs.set("a/b", one)
    refs.set("c/d", one)
    with pytest.raises(Conflict):
        refs.set("c:d", one)
    assert refs.all() == {"a:b": one, "c/d:latest": one}


def test_resolve(store: Store, refs: Refs) -> None:
    one, two = image(store, 1), image(store, 2)
    refs.set("python:v1", one)
    assert refs.resolve("python:v1") == refs.resolve(one) == refs.resolve(one[7:19]) == refs.resolve(one[:14]) == one
    refs.set(one[7:15], two)  # digits that are a name
    assert refs.resolve(one[7:15]) == two
    with pytest.raises(NotFound, match=r"did you mean python:v1\?"):
        refs.resolve("pyhton:v1")
    for text in ("nothing", "0123", "sha256:" + "0" * 64, "python:v1x"):
        with pytest.raises(NotFound):
            refs.resolve(text)
    for text in ("Python", "sha256:xyz", "sha256:abc", "../x"):
        with pytest.raises(InvalidInput):
            refs.resolve(text)


def test_digits_of_several_images(store: Store, refs: Refs) -> None:
    found: dict[str, str] = {}
    number = 0
    while True:
        new = image(store, number)
        if new[7:11] in found:
            break
        found[new[7:11]] = new
        number += 1
    with pytest.raises(Conflict, match="give more digits"):
        refs.resolve(new[7:11])
    assert refs.resolve(new[7:27]) == new


def test_a_damaged_name(store: Store, refs: Refs) -> None:
    one = image(store)
    refs.set("a", one)
    refs.set("b", one)
    (store.home / "refs/a/latest").write_text("sha256:12")
    with pytest.raises(Corrupt, match="check --repair"):
        refs.get("a")
    assert refs.all() == {"b:latest": one}


def test_a_name_over_a_killed_writer(store: Store, refs: Refs, place: Path) -> None:
    """Names survive the folder of a name that went meanwhile."""
    one = image(store)
    for _ in range(20):
        refs.set("x/y/z", one)
        refs.delete("x/y/z")
    assert list((store.home / "refs").iterdir()) == []
