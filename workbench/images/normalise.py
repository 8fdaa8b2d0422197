"""Makes what a recipe's step left in its writable layer the same on every machine and at every time.

Snapshots are never normalised: there a file is what its user made of it.
"""

from __future__ import annotations

import os
import stat

from workbench.images.files import clear_errors
from workbench.images.tree import ESCAPED, OPAQUE, OVERLAY, is_whiteout, kept_xattrs
from workbench.linux import trees
from workbench.model import Conflict

SECOND = 10**9
_CHUNK = 1 << 20


def normalise(tree: str, lowers: list[str], clamp: int, exclude: list[str]) -> list[str]:
    """Reduce a step's upper folder to what it changed over the layers below.

    tree: overlayfs's upper, no longer mounted. lowers: the trees below, highest first. clamp: newest
    modification time, in seconds since 1970. exclude: paths relative to ``/``; with a trailing slash what
    lies below them.

    Out go excluded paths, copies that changed nothing but a folder's time, whiteouts of what is not there;
    ``opaque`` stays only where a layer below has that folder (overlayfs marks each new one, to save itself
    look-ups); overlayfs's notes on where a file came from go too. Returns the paths that were removed,
    sorted.
    """
    work = _Normaliser(tree, clamp, exclude)
    with clear_errors("normalise a layer", tree):
        work.folder("", [lower for lower in lowers if os.path.isdir(lower)])
    return sorted(work.removed)


class _Normaliser:
    def __init__(self, tree: str, clamp: int, exclude: list[str]) -> None:
        self.tree, self.clamp = tree, clamp * SECOND
        self.files = {path.strip("/") for path in exclude if not path.endswith("/")}
        self.folders = {path.strip("/") for path in exclude if path.endswith("/")}
        self.removed: list[str] = []

    def folder(self, path: str, lowers: list[str]) -> None:
        """Normalise what is in a folder; ``lowers`` are the folders that it is merged with, highest first."""
        here = os.path.join(self.tree, path) if path else self.tree
        before = os.lstat(here).st_mtime_ns
        _forget_origins(here)
        opaque = _is_opaque(here)
        if opaque and not lowers:
            os.removexattr(here, OPAQUE)
        below = [] if opaque else lowers
        for name in sorted(os.listdir(here)):
            inner = f"{path}/{name}" if path else name
            if path in self.folders or inner in self.files:
                self.remove(inner)
            else:
                self.entry(inner, name, below)
        self.time(here, before)

    def entry(self, path: str, name: str, lowers: list[str]) -> None:
        """Normalise one file or folder."""
        here = os.path.join(self.tree, path)
        found = os.lstat(here)
        beneath, merged = _lookup(name, lowers)
        if is_whiteout(found):
            if beneath is None:
                self.remove(path)
            return
        if stat.S_ISDIR(found.st_mode):
            self.folder(path, merged)
            if merged and not _is_opaque(here) and not os.listdir(here) and _same_marks(here, merged[0]):
                self.remove(path)
            return
        self.time(here, found.st_mtime_ns)
        if stat.S_ISREG(found.st_mode):
            _forget_origins(here)
        if beneath is not None and _same_file(here, beneath):
            self.remove(path)

    def remove(self, path: str) -> None:
        """Take a file or a whole tree out of the layer."""
        here = os.path.join(self.tree, path)
        if stat.S_ISDIR(os.lstat(here).st_mode):
            trees.remove(here)
        else:
            os.unlink(here)
        self.removed.append(path)

    def time(self, here: str, before: int) -> None:
        """Set a file's time: what it was before this walk, whole seconds, not newer than the clamp."""
        wanted = min(before // SECOND * SECOND, self.clamp)
        if os.lstat(here).st_mtime_ns != wanted:
            os.utime(here, ns=(wanted, wanted), follow_symlinks=False)


def _lookup(name: str, lowers: list[str]) -> tuple[str | None, list[str]]:
    """What a name is in merged folders: its path (None: nothing), and the folders that it merges."""
    merged: list[str] = []
    for lower in lowers:
        path = os.path.join(lower, name)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        if is_whiteout(found):
            break
        if not stat.S_ISDIR(found.st_mode):
            return (merged[0], merged) if merged else (path, [])
        merged.append(path)
        if _is_opaque(path):
            break
    return (merged[0] if merged else None), merged


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _forget_origins(path: str) -> None:
    """Drop overlayfs's own notes (origin, impure, nlink…), which mean nothing in a layer."""
    for name in os.listxattr(path, follow_symlinks=False):
        if name in (OVERLAY + "redirect", OVERLAY + "metacopy"):
            raise Conflict(
                "normalise a layer",
                f"{path} lies elsewhere ({name})",
                "mount the overlay with redirect_dir=off,metacopy=off",
            )
        if name.startswith(OVERLAY) and name != OPAQUE and not name.startswith(ESCAPED):
            os.removexattr(path, name, follow_symlinks=False)


def _marks(path: str) -> tuple[object, ...]:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return stat.S_IFLNK, found.st_uid, found.st_gid, os.readlink(path)
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name != OPAQUE]
    kept = sorted(n for n in names if kept_xattrs(n) and (n.startswith(ESCAPED) or not n.startswith(OVERLAY)))
    values = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in kept]
    return found.st_mode, found.st_uid, found.st_gid, values


def _same_marks(one: str, other: str) -> bool:
    return _marks(one) == _marks(other)


def _same_file(one: str, other: str) -> bool:
    """Whether two files are the same in everything that a layer keeps, content included."""
    first, second = os.lstat(one), os.lstat(other)
    if (first.st_mtime_ns, first.st_size) != (second.st_mtime_ns, second.st_size) or not _same_marks(one, other):
        return False
    if not stat.S_ISREG(first.st_mode):
        return True
    with open(one, "rb") as a, open(other, "rb") as b:
        while chunk := a.read(_CHUNK):
            if chunk != b.read(_CHUNK):
                return False
    return True
