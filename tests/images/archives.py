"""Archives for tests, by the standard library's writer and reader, which share no line with ours."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

from workbench.linux import userns


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """An archive of these members."""
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def listing(path: Path) -> dict[str, tarfile.TarInfo]:
    """An archive's members by name."""
    with tarfile.open(path, "r:") as archive:
        return {info.name: info for info in archive}


def call(name: str, *args: object) -> dict[str, Any]:
    """A function of layer.py, run where its ids mean something."""
    plain = (os.fspath(arg) if isinstance(arg, os.PathLike) else arg for arg in args)
    return userns.call(f"workbench.images.layer:{name}", *plain)


def held(source: str, tree: str) -> int:
    """Bytes of memory that Python counts at the most while a layer is laid out and looked at (``layer.lay_out``)."""
    from workbench.images import layer, tar
    from workbench.images import tree as trees

    trees._LARGE, tar.CHUNK = 100, 1 << 13  # what is of one size is to be small beside what grows with the members
    tracemalloc.start()
    try:
        layer.apply(source, tree)
        layer._form(tree)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
