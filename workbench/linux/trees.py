"""Trees of files that somebody else may have filled: removing them whatever is in there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from itertools import islice

_DEEP = 64
#: Names of a folder that are held at a time, on each level: there may be a million.
_SOME = 1000


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
        moved, found = 0, True
        while found:
            found = False
            for name in _names(root):
                moved, found = _remove(root, root, name, 0, moved), True
    finally:
        os.close(root)
    os.rmdir(path)


def _names(fd: int) -> Iterator[str]:
    """What is in a folder, each of which may go while the next is read."""
    with os.scandir(fd) as entries:
        while names := [entry.name for entry in islice(entries, _SOME)]:
            yield from names


def _remove(root: int, at: int, name: str, depth: int, moved: int) -> int:
    if not stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=at)
        return moved
    if depth == _DEEP:
        while True:
            try:
                os.rename(name, f".deep-{moved}", src_dir_fd=at, dst_dir_fd=root)
                return moved + 1
            except OSError as error:  # the name is taken; an empty folder of that name is no loss
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                moved += 1
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=at)
    try:
        for inner in _names(fd):
            moved = _remove(root, fd, inner, depth + 1, moved)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=at)
    return moved
