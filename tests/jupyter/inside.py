"""Run by ``userns.call`` where a layer's files can be read; imports nothing of the tests."""

from __future__ import annotations

import os
from pathlib import Path


def files_with(upper: str, words: list[str]) -> list[str]:
    """Files that hold one of the words. A cache that does not belong to the environment may."""
    found = []
    for folder, _, names in os.walk(upper):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and "/var/lib/apt/lists/" not in path:
                content = Path(path).read_bytes()
                found += [path for word in words if word.encode() in content]
    return found
