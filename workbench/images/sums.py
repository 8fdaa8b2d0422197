"""What two layers differ in, told by path: from their trees, or from a short summary of one of them.

The functions without underscore run through ``userns.call``.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator
from typing import Any

from workbench.images import tar
from workbench.images.layer import entries, read_owners
from workbench.images.tree import walk


def summary(tree: str, groups: list[str] | None = None, most: int = 256) -> dict[str, str]:
    """What a layer's tree holds, so that another can be held against it: path -> 8 hex digits of a sha256.

    Each stands for what is at its path and for all below that no longer path stands for, in everything that the
    tar has of it. groups: the paths; by default about ``most``, so that each stands for as few files as can be.
    """
    found = [(path.split(b"/"), digest) for path, digest in _digests(tree)]
    wanted = _groups([parts for parts, _ in found], most) if groups is None else {*map(_parts, groups)}
    sums: dict[str, Any] = {}
    for parts, digest in found:
        at = next((parts[:end] for end in range(len(parts), 0, -1) if tuple(parts[:end]) in wanted), [])
        name = os.fsdecode(b"/".join(at))
        sums.setdefault(name, hashlib.sha256()).update(b"/".join(parts) + b"\0" + digest)
    return {name: value.hexdigest()[:8] for name, value in sums.items()}


def _parts(path: str) -> tuple[bytes, ...]:
    return tuple(os.fsencode(path).split(b"/"))


def _groups(paths: list[list[bytes]], most: int) -> set[tuple[bytes, ...]]:
    """The folder that stands for the most is split into what it holds, again and again."""
    below: dict[tuple[bytes, ...], dict[tuple[bytes, ...], None]] = {}
    size: dict[tuple[bytes, ...], int] = {}
    for parts in paths:
        for end in range(len(parts) + 1):
            at = tuple(parts[:end])
            size[at] = size.get(at, 0) + 1
            if end:
                below.setdefault(at[:-1], {})[at] = None
    chosen: set[tuple[bytes, ...]] = set()
    heap: list[tuple[int, tuple[bytes, ...]]] = [(0, ())]
    while heap:
        _, at = heapq.heappop(heap)
        inner = below.get(at, {})
        if len(chosen) + len(inner) > most:
            continue
        chosen |= inner.keys()
        for one in inner:
            if one in below:
                heapq.heappush(heap, (-size[one], one))
    return chosen


def differing(one: str, other: str) -> list[str]:
    """Paths of two trees that are not the same in everything that a tar has of them, sorted."""
    here, there = dict(_digests(one)), dict(_digests(other))
    return sorted(os.fsdecode(path) for path in here | there if here.get(path) != there.get(path))


def told(paths: list[str], most: int = 20) -> str:
    """Them in one line, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


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
