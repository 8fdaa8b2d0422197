"""What tests do to a container's writable layer from outside, where its files are the user's to change."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
