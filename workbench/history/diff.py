"""What lies between two images: packages and files, read from the trees of their layers; nothing of them is run."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.history import inventory
from workbench.history.capture import equal, shown_pieces
from workbench.images.store import Store
from workbench.images.tree import walk
from workbench.images.view import Shown, View, is_opaque
from workbench.linux import userns
from workbench.model import Image, count, format_size

if TYPE_CHECKING:
    import pandas

Kind = Literal["A", "D", "M"]


@dataclass(frozen=True, slots=True)
class PackageChange:
    """A package that came, went (its version is empty then) or changed. kind: see ``inventory.Package``.

    origin: where the later one came from, where an index of its kind does not say all: ``editable``, ``vcs``, ``url``,
    ``folder``…, with the address.
    """

    kind: str
    name: str
    before: str
    after: str
    place: str
    origin: str = ""


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

    @property
    def counts(self) -> dict[str, int]:
        """How many ``packages`` differ, and how many files were ``added``, ``modified`` and ``deleted``."""
        kinds = Counter(row.kind for row in self.files)
        return {"packages": len(self.packages), "added": kinds["A"], "modified": kinds["M"], "deleted": kinds["D"]}

    @property
    def summary(self) -> str:
        """The same in a line, with the bytes that it grew by."""
        packages, *kinds = self.counts.values()
        grown = sum(row.after - row.before for row in self.files)
        size = f"{'-' if grown < 0 else '+'}{format_size(abs(grown))}"
        return (
            f"{count(packages, 'package')}; {count(len(self.files), 'file')}: "
            f"{kinds[0]} added, {kinds[1]} modified, {kinds[2]} deleted; {size}"
        )

    def frame(self, what: Literal["packages", "files"] = "packages") -> pandas.DataFrame:
        """Packages or files as a table, a row for each change; kinds are categories, bytes are whole numbers.

        Files have ``grown``, their bytes after less those before, and ``folder``, as far down as three names.
        """
        import pandas

        if what == "packages":
            rows, columns = [asdict(row) for row in self.packages], list(PackageChange.__dataclass_fields__)
            return pandas.DataFrame(rows, columns=columns).astype({"kind": "category"})
        rows, columns = [asdict(row) for row in self.files], list(FileChange.__dataclass_fields__)
        frame = pandas.DataFrame(rows, columns=columns).astype({"before": "int64", "after": "int64"})
        frame["kind"] = pandas.Categorical(frame["kind"], categories=["A", "M", "D"])
        frame["grown"] = frame["after"] - frame["before"]
        frame["folder"] = [inventory.folder_of(path) for path in frame["path"]]
        return frame


def between(store: Store, one: Image, other: Image, *, times: bool = True) -> Diff:
    """From the first to the second. Layers that both have in common are not looked at. times: whether a file that is
    only of another time is another. Raises NotFound, HostLacks."""
    trees = [store.trees(image.diff_ids) for image in (one, other)]
    found = userns.call("workbench.history.diff:compare", *trees, common(one, other), times)
    return Diff(
        tuple(PackageChange(*row) for row in found["packages"]), tuple(FileChange(*row) for row in found["files"])
    )


def common(one: Image, other: Image) -> int:
    """How many of their lowest layers are the same."""
    pairs = zip(one.diff_ids, other.diff_ids, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one.diff_ids), len(other.diff_ids)))


def compare(one: list[str], other: list[str], shared: int, times: bool = True) -> dict[str, Any]:
    """``between`` on trees, highest first, of which the lowest ``shared`` are the same; through ``userns.call``."""
    views = View(one), View(other)
    look = _Look(*views, times)
    for tree in {*one[: len(one) - shared], *other[: len(other) - shared]}:
        for raw, at, _, found in walk(tree):
            path = os.fsdecode(raw)
            if path:
                look.at(path, everything=stat.S_ISDIR(found.st_mode) and is_opaque(at))
    before, after = ({package.key: package for package in inventory.packages(view)} for view in views)
    return {
        "packages": [
            (kind, name, old.version if old else "", new.version if new else "", place, (new or old or _NOBODY).told)
            for kind, name, place in sorted(before.keys() | after.keys())
            if says(old := before.get((kind, name, place))) != says(new := after.get((kind, name, place)))
        ],
        "files": sorted(look.found.values(), key=lambda row: row[1]),
    }


_NOBODY = inventory.Package("", "", "")


def says(package: inventory.Package | None) -> tuple[str, str] | None:
    """What makes it another package: who installed it does not."""
    return (package.version, package.told) if package else None


class _Look:
    """Compares paths of two views, each once."""

    def __init__(self, one: View, other: View, times: bool) -> None:
        self.one, self.other, self.times = one, other, times
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
            elif not equal(*(shown_pieces(os.fsencode(path), side, times=self.times) for side in (before, after))):
                self._note("M", path, before, after)

    def _note(self, kind: Kind, path: str, before: Shown, after: Shown) -> None:
        shown = path + "/" if (after if kind != "D" else before).is_folder else path
        self.found[path] = (kind, shown, _size(before), _size(after))


def _size(side: Shown) -> int:
    return side.found.st_size if side.found is not None and not side.is_folder else 0
