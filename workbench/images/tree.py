"""What apply, pack and normalise share: walking a layer's tree without being led out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from workbench.linux import syscalls as sc

#: overlayfs's own attributes with the option ``userxattr`` (overlayfs.rst).
OVERLAY = "user.overlay."
OPAQUE = "user.overlay.opaque"
#: How an attribute of that name that a file itself has is kept, as overlayfs does for nested overlays.
ESCAPED = "user.overlay.overlay."

_LARGE = 10_000

_INSIDE = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS | sc.RESOLVE_NO_MAGICLINKS | sc.RESOLVE_NO_XDEV


def kept_xattrs(name: str) -> bool:
    """Whether an attribute belongs to an environment. Labels of the host's security modules do not."""
    return name.startswith(("user.", "system.posix_acl_")) or name == "security.capability"


def is_whiteout(found: os.stat_result) -> bool:
    """Whether a file of a tree says that a file below it is gone."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def below(root: int, path: bytes, flags: int) -> int:
    """Open ``path`` below a folder, through real folders of the same mount only (openat2(2))."""
    return sc.openat2(root, path or b".", flags, resolve=_INSIDE)


def walk(
    tree: str, wanted: Callable[[bytes], bool] = lambda _path: True
) -> Iterator[tuple[bytes, int, bytes, os.stat_result]]:
    """Every file of a tree in the order of its tar: path, folder, name, lstat(2).

    wanted: whether a path is told, and what is below it; the root always is.

    For a folder the descriptor is its own, for others that of the folder they are in; both hold until the
    next step. A folder comes before what is in it: whiteouts, other files, then folders, each sorted by
    bytes. Neither depth nor the number of files costs descriptors; of memory each name of the folders on the way
    takes its bytes and some 50.
    """
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pending = [(b"", [b""])]  # of each folder on the way: its path, and which of its folders are to be entered
        while pending:
            start, folders = pending[-1]
            if not folders:
                pending.pop()
                continue
            path = start + folders.pop()
            fd = below(root, path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield path, fd, path.rpartition(b"/")[2], os.fstat(fd)
                start = path + b"/" if path else b""
                folders, whiteouts, others = list[bytes](), list[bytes](), list[bytes]()
                known: dict[bytes, os.stat_result] = {}  # not of every file of a large folder: half a kilobyte each
                with os.scandir(fd) as entries:
                    for entry in entries:
                        found = entry.stat(follow_symlinks=False)
                        name = os.fsencode(entry.name)
                        if not wanted(start + name):
                            continue
                        if stat.S_ISDIR(found.st_mode):
                            folders.append(name)
                            continue
                        (whiteouts if is_whiteout(found) else others).append(name)
                        if len(known) < _LARGE:
                            known[name] = found
                for names in (whiteouts, others):
                    names.sort()
                    for name in names:
                        seen = known.get(name) or os.stat(name, dir_fd=fd, follow_symlinks=False)
                        yield start + name, fd, name, seen
                folders.sort(reverse=True)
                pending.append((start, folders))
            finally:
                os.close(fd)
    finally:
        os.close(root)
