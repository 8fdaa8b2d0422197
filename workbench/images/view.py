"""What an image's layers show together, by the rules of the overlay (overlayfs.rst), without mounting anything.

Paths are text relative to ``/`` with surrogate escapes for what is no UTF-8. To be used where a layer's files can be
read, through ``userns.call``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from workbench.images.tree import OPAQUE, is_whiteout


@dataclass(slots=True)
class Shown:
    """What a path shows. found: its lstat(2), None when nothing is there; path: the host's; folders: those merged."""

    found: os.stat_result | None = None
    path: str = ""
    folders: list[str] = field(default_factory=list)

    @property
    def is_folder(self) -> bool:
        """Whether it is one."""
        return self.found is not None and stat.S_ISDIR(self.found.st_mode)


class View:
    """The merged layers. trees: highest first."""

    def __init__(self, trees: Iterable[str]) -> None:
        trees = list(trees)
        self._known: dict[str, Shown] = {
            "": Shown(os.lstat(trees[0]) if trees else None, trees[0] if trees else "", trees)
        }

    def find(self, path: str) -> Shown:
        """What is at a path; no symbolic link is followed."""
        known = self._known.get(path)
        if known is None:
            parent, _, name = path.rpartition("/")
            known = below(self.find(parent).folders, name)
            if known.is_folder:
                self._known[path] = known
        return known

    def names(self, path: str) -> list[str]:
        """What is in a folder, sorted; nothing for what is none."""
        found = set()
        for folder in self.find(path).folders:
            found.update(os.listdir(folder))
        return sorted(name for name in found if self.find(f"{path}/{name}" if path else name).found is not None)

    def read(self, path: str, limit: int = 64 << 20) -> bytes | None:
        """The content of a regular file; None for anything else, or one that is larger."""
        shown = self.find(path)
        if shown.found is None or not stat.S_ISREG(shown.found.st_mode) or shown.found.st_size > limit:
            return None
        fd = os.open(shown.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            return file.read(limit)


def below(folders: Iterable[str], name: str) -> Shown:
    """What shows at a name in merged folders, highest first."""
    result = Shown()
    for folder in folders:
        path = f"{folder}/{name}"
        try:
            found = os.lstat(path)
        except OSError:
            continue
        if is_whiteout(found):
            break
        if result.found is None:
            result.found, result.path = found, path
        if not stat.S_ISDIR(found.st_mode):
            break
        result.folders.append(path)
        if is_opaque(path):
            break
    return result


def is_opaque(path: str | int) -> bool:
    """Whether a folder of a tree hides what is below it."""
    try:
        return os.getxattr(path, OPAQUE) == b"y"
    except OSError:
        return False
