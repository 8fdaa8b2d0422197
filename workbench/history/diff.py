"""What lies between two images: packages and files, read from the trees of their layers; nothing of them is run."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any, Literal

from workbench.history import inventory
from workbench.history.capture import equal, shown_pieces
from workbench.images.store import Store
from workbench.images.tree import walk
from workbench.images.view import Shown, View, is_opaque
from workbench.linux import userns
from workbench.model import Image

Kind = Literal["A", "D", "M"]


@dataclass(frozen=True, slots=True)
class PackageChange:
    """A package that came, went (its version is empty then) or changed. kind: ``deb``, ``python`` or ``r``."""

    kind: str
    name: str
    before: str
    after: str
    place: str


@dataclass(frozen=True, slots=True)
class FileChange:
    """A path that was added, deleted or modified (git-diff(1), --name-status), with its bytes before and after."""

    kind: Kind
    path: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Diff:
    """What lies between two images."""

    packages: tuple[PackageChange, ...]
    files: tuple[FileChange, ...]


def between(store: Store, one: Image, other: Image) -> Diff:
    """From the first to the second. Layers that both have in common are not looked at. Raises NotFound, HostLacks."""
    shared = 0
    while shared < min(len(one.diff_ids), len(other.diff_ids)) and one.diff_ids[shared] == other.diff_ids[shared]:
        shared += 1
    trees = [[str(store.layer(diff_id)) for diff_id in reversed(image.diff_ids)] for image in (one, other)]
    found = userns.call("workbench.history.diff:compare", *trees, shared)
    return Diff(
        tuple(PackageChange(*row) for row in found["packages"]), tuple(FileChange(*row) for row in found["files"])
    )


def compare(one: list[str], other: list[str], shared: int) -> dict[str, Any]:
    """``between`` on trees, highest first, of which the lowest ``shared`` are the same; through ``userns.call``."""
    views = View(one), View(other)
    look = _Look(*views)
    for tree in {*one[: len(one) - shared], *other[: len(other) - shared]}:
        for raw, at, _, found in walk(tree):
            path = os.fsdecode(raw)
            if path:
                look.at(path, everything=stat.S_ISDIR(found.st_mode) and is_opaque(at))
    before, after = (inventory.packages(view) for view in views)
    packages = [
        (*key[:2], before.get(key, ""), after.get(key, ""), key[2])
        for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)
    ]  # fmt: skip
    return {"packages": packages, "files": sorted(look.found.values(), key=lambda row: row[1])}


class _Look:
    """Compares paths of two views, each once."""

    def __init__(self, one: View, other: View) -> None:
        self.one, self.other = one, other
        self.found: dict[str, tuple[Kind, str, int, int]] = {}
        self.done: set[str] = set()

    def at(self, path: str, *, everything: bool = False) -> None:
        """One path; with all below it where it is a folder on one side only, or if ``everything`` is wanted."""
        pending = [(path, everything)]
        while pending:
            path, deep = pending.pop()
            before, after = self.one.find(path), self.other.find(path)
            if deep or before.is_folder != after.is_folder:
                names = {*self.one.names(path), *self.other.names(path)}
                pending += [(f"{path}/{name}", True) for name in names]
            if path in self.done:
                continue
            self.done.add(path)
            if before.path == after.path or (before.found is None and after.found is None):
                continue
            if before.found is None:
                self._note("A", path, before, after)
            elif after.found is None:
                self._note("D", path, before, after)
            elif not equal(*(shown_pieces(os.fsencode(path), side) for side in (before, after))):
                self._note("M", path, before, after)

    def _note(self, kind: Kind, path: str, before: Shown, after: Shown) -> None:
        shown = path + "/" if (after if kind != "D" else before).is_folder else path
        self.found[path] = (kind, shown, _size(before), _size(after))


def _size(side: Shown) -> int:
    return side.found.st_size if side.found is not None and not side.is_folder else 0
