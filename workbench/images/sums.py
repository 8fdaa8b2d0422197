"""What two layers differ in, told by path: from their trees, or from a short summary of one of them.

The functions without underscore run through ``userns.call``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from workbench.images import tar
from workbench.images.layer import entries, read_owners
from workbench.images.tree import walk


def summary(tree: str, depth: int | None = None, most: int = 96) -> dict[str, str]:
    """What a layer's tree holds, so that another can be held against it: path -> 8 hex digits of a sha256.

    Each stands for all that is at and below its path, in everything that the tar has of it. depth: how many
    parts a path has at the most; by default as many as give at most ``most`` paths.
    """
    found = [(path.split(b"/"), digest) for path, digest in _digests(tree)]
    if depth is None:
        depth = 1
        while depth < 32 and len({tuple(parts[: depth + 1]) for parts, _ in found}) <= most:
            depth += 1
    sums: dict[str, Any] = {}
    for parts, digest in found:
        name = os.fsdecode(b"/".join(parts[:depth]))
        sums.setdefault(name, hashlib.sha256()).update(b"/".join(parts) + b"\0" + digest)
    return {name: value.hexdigest()[:8] for name, value in sums.items()}


def differing(one: str, other: str) -> list[str]:
    """Paths of two trees that are not the same in everything that a tar has of them, sorted."""
    here, there = dict(_digests(one)), dict(_digests(other))
    return sorted(os.fsdecode(path) for path in here | there if here.get(path) != there.get(path))


def _digests(tree: str) -> Iterator[tuple[bytes, bytes]]:
    owners = read_owners(tree)
    links: dict[tuple[int, int], bytes] = {}
    for path, at, name, found in walk(tree):
        content = hashlib.sha256()
        for entry, fd in entries(path, at, name, found, links, owners):
            content.update(tar.header(entry))
            if entry.size:
                with open(fd, "rb", closefd=False) as file:
                    while data := file.read(tar.CHUNK):
                        content.update(data)
        yield path, content.digest()
