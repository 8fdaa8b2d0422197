"""What the store and the refs do to files: durable writes, locks, staging that dies with its holder.

Locks are flock(2): held by an open file, gone with the process that opened it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from workbench.linux import trees, userns
from workbench.model import HostLacks, WorkbenchError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def clear_errors(tried: str, path: str) -> Iterator[None]:
    """Turns what the disk refuses into the one line that helps. Raises HostLacks."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise HostLacks(
                tried,
                f"no space left for {path}" if error.errno == errno.ENOSPC else f"the disk quota is used up for {path}",
                "free some, as `jupyter workbench gc` does, or set WORKBENCH_HOME to another disk",
            ) from error
        if error.errno == errno.EROFS:
            raise HostLacks(
                tried,
                f"{path} is on a read-only file system",
                "set WORKBENCH_HOME to a folder that can be written",
            ) from error
        if error.errno == errno.ENOTSUP:
            raise HostLacks(
                tried,
                f"the file system of {path} keeps no extended attributes",
                "set WORKBENCH_HOME to a folder on ext4, xfs or btrfs",
            ) from error
        raise


def sync_folder(path: str) -> None:
    """Make what was renamed into or out of a folder last (fsync(2) of the folder)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: str, data: bytes, mode: int = 0o600) -> None:
    """A new file, its bytes on the disk when this returns; its name is made durable by ``publish``."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


#: What a snapshot leaves, until a launch first needs its tree, stands beside where that will be.
TAR = ".tar"


def digest(path: str) -> str:
    """``sha256:<hex>`` of a file."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def copy_checked(source: str, target: int, expected: str, meanwhile: Callable[[], None] | None = None) -> bool:
    """Append a file to a descriptor's if its digest is as expected; else nothing is left of it, and False.

    meanwhile: called with each megabyte; what it raises ends it.
    """
    start = os.lseek(target, 0, os.SEEK_CUR)
    with open(source, "rb") as file, open(target, "wb", closefd=False) as copy:
        whole = hashlib.sha256()
        while data := file.read(1 << 20):
            whole.update(data)
            copy.write(data)
            if meanwhile is not None:
                meanwhile()
    if f"sha256:{whole.hexdigest()}" == expected:
        return True
    os.lseek(target, start, os.SEEK_SET)
    os.ftruncate(target, start)
    return False


def publish(source: str, target: str) -> None:
    """Rename into place and make the name last; readers see all of it or nothing."""
    os.rename(source, target)
    sync_folder(os.path.dirname(target))


@contextmanager
def locked(folder: str, *, exclusive: bool) -> Iterator[None]:
    """Hold a folder's lock, together with others or alone; waits for it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        # Said aloud, since a child that was forked meanwhile has the same open file.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def claim(tmp: str, name: str = "", *, folder: bool = True) -> tuple[str, int]:
    """A new entry below ``tmp`` and the descriptor whose lock says that its holder lives."""
    name = name or os.urandom(8).hex()
    path = os.path.join(tmp, name)
    # Under tmp's own lock nobody sees the entry before it is held.
    with locked(tmp, exclusive=True):
        if folder:
            os.mkdir(path, 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
    if folder:
        # A default ACL of a folder above would be inherited by every file of a layer (acl(5)).
        with suppress(OSError):
            os.removexattr(fd, "system.posix_acl_default")
        if os.fstat(fd).st_mode & stat.S_ISGID:
            os.chmod(fd, 0o700)
    return path, fd


def release(path: str, fd: int) -> None:
    """Give an entry back: what is left of it goes, then its lock."""
    try:
        discard(path)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def let_go(path: str, fd: int) -> None:
    """``release`` after work that is done, or has failed for a better reason: what resists is swept by the next one."""
    with suppress(OSError, WorkbenchError):
        release(path, fd)


@contextmanager
def staging(tmp: str) -> Iterator[str]:
    """A private folder below ``tmp``, held by this process and gone at the end."""
    path, fd = claim(tmp)
    try:
        yield path
    finally:
        let_go(path, fd)


def is_held(path: str) -> bool:
    """Whether a living process holds the lock of an entry."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def dead(tmp: str) -> list[tuple[str, int]]:
    """The entries below ``tmp`` whose holder is gone, locked by the caller now; ``release`` ends each."""
    found = []
    with locked(tmp, exclusive=True):
        for name in sorted(os.listdir(tmp)):
            path = os.path.join(tmp, name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # taken away meanwhile, or nothing that we make
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                continue
            found.append((path, fd))
    return found


def discard(path: str) -> None:
    """Delete a file or a tree of files, whoever owns what is in it; nothing there is fine."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        with suppress(OSError):
            os.rmdir(path)
            return
        if userns.host_ids().kind == "root":
            userns.call("workbench.images.layer:remove", path)
            return
        with suppress(OSError):
            trees.remove(path)
            return
        userns.call("workbench.images.layer:remove", path)
    except FileNotFoundError:
        return
