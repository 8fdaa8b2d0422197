"""What tests do to a container's writable layer from outside, where its files are the user's to change."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from workbench.history import inventory, owners
from workbench.images.view import View


def write(upper: str, paths: list[str], text: str = "x") -> None:
    """Files, with the folders that they need."""
    for path in paths:
        file = Path(upper, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def whiteout(upper: str, path: str) -> None:
    """As overlayfs marks what was removed."""
    os.makedirs(os.path.dirname(f"{upper}/{path}"), exist_ok=True)
    os.mknod(f"{upper}/{path}", stat.S_IFCHR, 0)


def links(upper: str) -> list[list[str]]:
    """The names, in hexadecimal digits, of each file that has several; marks of what is gone are links, too."""
    found: dict[int, list[str]] = {}
    for folder, _, names in os.walk(os.fsencode(upper)):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            inside = b"/" + os.path.relpath(path, os.fsencode(upper))
            if stat.S_ISREG(status.st_mode) and not inside.startswith((b"/tmp", b"/root/.cache")):
                found.setdefault(status.st_ino, []).append(inside.hex())
    return [members for members in found.values() if len(members) > 1]


def contents(upper: str, files: dict[str, str]) -> None:
    """Files, each with its own text."""
    for path, text in files.items():
        write(upper, [path], text)


def unowned(trees: list[str], most: int) -> dict[str, object]:
    """Of a whole image, and only so many of them."""
    view = View(trees)
    return owners.unowned(view, inventory.packages(view), most=most)


def owners_below(trees: list[str], folder: str) -> dict[str, str]:
    """The Debian package of each file of a folder that has one."""
    view = View(trees)
    who = owners.Owners(view, inventory.packages(view))
    found = {name: who.of(f"{folder}/{name}") for name in view.names(folder)}
    return {name: owner[1] for name, owner in found.items() if owner is not None and owner[0] == "deb"}


def text(tree: str, path: str) -> str:
    """A file's."""
    return Path(tree, path).read_text()
