"""Runs where container ids can be mapped: made trees are changed through an overlay, captured, and laid out again."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Sequence
from typing import Any

from tests.history import inside
from workbench.history.capture import capture
from workbench.images import layer
from workbench.linux import mounts
from workbench.linux import syscalls as sc

#: An operation's name, a path or the number of one that is there, and what else it is told.
Operation = Sequence[Any]
#: Folders below all: overlayfs wants two where none is to be written.
EMPTY = ("empty", "void")


def histories(folder: str, containers: list[list[list[Operation]]]) -> list[list[str]]:
    """For each container the snapshots of it: a line for each difference between what it had and what is launched.

    Each container stands on the last snapshot of the one before, the first on nothing.
    """
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    for name in EMPTY:
        os.makedirs(f"{folder}/{name}")
    trees: list[str] = []
    found: list[list[str]] = []
    for number, rounds in enumerate(containers):
        place, below = f"{folder}/{number}", list(trees)
        for name in ("upper", "work", "merged"):
            os.makedirs(f"{place}/{name}")
        _mount(f"{place}/merged", below, f"upperdir={place}/upper,workdir={place}/work,")
        index, tars = "", list[str]()
        for snapshot, operations in enumerate(rounds):
            for operation in operations:
                _do(f"{place}/merged", operation)
            wanted, out, new = listing(f"{place}/merged"), f"{place}/{snapshot}.tar", f"{place}/{snapshot}.json"
            taken = capture(f"{place}/upper", below, out, index, new, [], -1, tars)
            index = new
            if taken["changes"]:
                tars.append(out)
                trees.insert(0, f"{place}/{snapshot}")
                layer.lay_out(out, trees[0], f"{out}.record")
            found.append(_launched(f"{place}/shown", trees, wanted, inside.links(f"{place}/upper")))
            again = capture(f"{place}/upper", below, f"{out}.again", index, f"{new}.again", [], -1, tars)
            found[-1] += [f"taken again: {path!r}" for path in again["paths"]]
    return found


def _mount(target: str, trees: list[str], options: str = "") -> None:
    lower = ":".join([*trees, *(f"{target}/../../{name}" for name in EMPTY)])
    sc.mount("overlay", target, "overlay", sc.MS_NODEV, f"lowerdir={lower},{options}{mounts.OVERLAY_OPTIONS}")


def _launched(target: str, trees: list[str], wanted: dict[str, list[Any]], links: list[list[str]]) -> list[str]:
    os.makedirs(target, exist_ok=True)
    _mount(target, trees)
    try:
        shown, linked = listing(target), inside.links(target)
    finally:
        sc.umount2(target)
    names = sorted(wanted.keys() | shown.keys())
    found = [f"{name}: {wanted.get(name)} / {shown.get(name)}" for name in names if wanted.get(name) != shown.get(name)]
    # A copied file with several names is several until it is mounted anew: what counts is what lies in the layer.
    there = {frozenset(group) for group in linked}
    return found + [f"no links any more: {group}" for group in links if frozenset(group) not in there]


def listing(tree: str) -> dict[str, list[Any]]:
    """Every attribute of each file, but the times of folders."""
    found = {}
    root = os.fsencode(tree)
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            row: list[Any] = [oct(status.st_mode), status.st_uid, status.st_gid]
            if not stat.S_ISDIR(status.st_mode):
                row.append(status.st_mtime_ns)
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    row += [status.st_size, hashlib.sha256(file.read()).hexdigest()]
            if stat.S_ISLNK(status.st_mode):
                row.append(os.readlink(path))
            row += [
                (name, os.getxattr(path, name, follow_symlinks=False))
                for name in sorted(os.listxattr(path, follow_symlinks=False)) if name.startswith("user.")
            ]  # fmt: skip
            found[repr(path[len(root) :])] = row
    return found


def _do(tree: str, operation: Operation) -> None:
    """One operation; what cannot be done to what is there is not done."""
    kind, name, *rest = operation
    if isinstance(name, int):  # one of those that are there
        there = [f"{folder}/{found}" for folder, *names in os.walk(tree) for found in sorted(itertools.chain(*names))]
        name = os.path.relpath(there[name % len(there)], tree) if there else "a"
    path = os.path.join(os.fsencode(tree), os.fsencode(name))
    other = os.path.join(os.fsencode(tree), os.fsencode(rest[0])) if rest and isinstance(rest[0], str) else b""
    try:
        match kind:
            case "write":
                _write(path, b"x" * rest[0])
            case "append":
                with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK), "ab") as file:
                    file.write(b"more")
            case "unnoticed":  # the same size, and the time of before
                kept = os.lstat(path)
                _write(path, b"y" * kept.st_size)
                os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
            case "sparse":
                _write(path, b"")
                os.truncate(path, rest[0])
            case "remove" | "anew":
                folder = os.path.isdir(path) and not os.path.islink(path)
                (shutil.rmtree if folder else os.unlink)(path)
                if kind == "anew" and folder:
                    os.mkdir(path)
                elif kind == "anew":
                    _write(path, b"anew")
            case "folder":
                os.mkdir(path)
            case "fifo":
                os.mkfifo(path)
            case "rename":
                os.rename(path, other)
            case "link":
                os.link(path, other, follow_symlinks=False)
            case "symlink":
                os.symlink(os.fsencode(rest[0]), path)
            case "mode" if not os.path.islink(path):
                os.chmod(path, rest[0])
            case "owner":
                os.chown(path, rest[0], rest[0] // 2, follow_symlinks=False)
            case "attribute":
                os.setxattr(path, rest[0], b"value", follow_symlinks=False)
            case "time":
                os.utime(path, ns=(0, rest[0]), follow_symlinks=False)
    except OSError:
        pass


def _write(path: bytes, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o644), "wb") as file:
        file.write(data)
