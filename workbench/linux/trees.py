"""Trees of files that somebody else may have filled: removing them whatever is in there."""

from __future__ import annotations

import os
import stat

_DEEP = 64


def remove(path: str) -> None:
    """Delete a tree, however deep it is; nothing there is fine.

    Through ``userns.call`` also what containers have made. A folder deep down is first moved up to the tree's own, so
    that neither descriptors nor the stack run out. Raises OSError.
    """
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except NotADirectoryError:  # a file, or a link, which is not followed
        os.unlink(path)
        return
    try:
        moved = 0
        while names := os.listdir(root):
            for name in names:
                moved = _remove(root, root, name, 0, moved)
    finally:
        os.close(root)
    os.rmdir(path)


def _remove(root: int, at: int, name: str, depth: int, moved: int) -> int:
    if not stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=at)
        return moved
    if depth == _DEEP:
        taken = set(os.listdir(root))
        while f".deep-{moved}" in taken:
            moved += 1
        os.rename(name, f".deep-{moved}", src_dir_fd=at, dst_dir_fd=root)
        return moved + 1
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=at)
    try:
        for inner in os.listdir(fd):
            moved = _remove(root, fd, inner, depth + 1, moved)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=at)
    return moved
