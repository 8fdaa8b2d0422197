"""Thin wrappers around system calls that Python does not offer (or only from 3.12 on).

Each wrapper raises ``OSError`` through the one ``_check``. Numbers are those of the generic table
(``asm-generic/unistd.h``), equal on x86_64 and aarch64, unless ``_NR`` names both. Flags carry the names of
their man pages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Any

# clone(2), setns(2), unshare(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# mount(2), umount2(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 0x2

# open_tree(2), move_mount(2), mount_setattr(2)
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
AT_FDCWD = -100
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x00100000

# fsopen(2), fsconfig(2), fsmount(2)
FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

# openat2(2)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# keyctl(2)
KEYCTL_JOIN_SESSION_KEYRING = 1

_MACHINE = os.uname().machine
_NR: dict[str, int] = {
    "clone": {"x86_64": 56, "aarch64": 220}[_MACHINE],
    "setns": {"x86_64": 308, "aarch64": 268}[_MACHINE],
    "pivot_root": {"x86_64": 155, "aarch64": 41}[_MACHINE],
    "capset": {"x86_64": 126, "aarch64": 91}[_MACHINE],
    "keyctl": {"x86_64": 250, "aarch64": 219}[_MACHINE],
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
}

#: capabilities(7), in the order of their numbers.
CAPABILITIES: tuple[str, ...] = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, *names: Any) -> int:
    """The result, or the ``OSError`` of errno with the paths that were meant."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *(os.fspath(n) for n in names if isinstance(n, str | bytes)))
    return result


def _path(path: str | bytes | None) -> bytes | None:
    return path if path is None else os.fsencode(path)


def _syscall(name: str, *args: Any) -> int:
    # A plain int passes as a 32 bit C int and leaves the upper half of a register undefined.
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return int(_libc.syscall(ctypes.c_long(_NR[name]), *wide))


def clone(flags: int, exit_signal: int) -> int:
    """fork(2) into new namespaces at once: the child's pid, or 0 in the child (clone(2)).

    Only for a process with one thread: the child goes on as a copy of the interpreter.
    """
    return _check(_syscall("clone", flags | exit_signal, 0, 0, 0, 0))


def setns(fd: int, flags: int) -> None:
    """Join the namespaces of a pidfd or of a namespace file (setns(2))."""
    _check(_syscall("setns", fd, flags))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (unshare(2))."""
    _check(_libc.unshare(ctypes.c_int(flags)))


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    _check(_libc.mount(_path(source), _path(target), _path(fstype), ctypes.c_ulong(flags), _path(data)), target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(_path(target), ctypes.c_int(flags)), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _check(_syscall("pivot_root", _path(new_root), _path(put_old)), new_root)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """A descriptor of a mount; with OPEN_TREE_CLONE, of a detached copy (open_tree(2))."""
    return _check(_syscall("open_tree", dirfd, _path(path), flags | OPEN_TREE_CLOEXEC), path)


def move_mount(from_fd: int, to_fd: int, to_path: str = "") -> None:
    """Attach a detached mount at ``to_path`` below ``to_fd``, or on ``to_fd`` itself (move_mount(2))."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if to_path else MOVE_MOUNT_T_EMPTY_PATH)
    _check(_syscall("move_mount", from_fd, b"", to_fd, _path(to_path), flags), to_path)


def mount_setattr(
    fd: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0, userns_fd: int = -1, recursive: bool
) -> None:
    """Change a mount's attributes, its id map among them (mount_setattr(2)).

    propagation: MS_PRIVATE, MS_SLAVE, or 0 to leave it; userns_fd: a user namespace whose id map the mount
    takes, -1 for none.
    """
    if userns_fd >= 0:
        attr_set |= MOUNT_ATTR_IDMAP
    attr = struct.pack("QQQQ", attr_set, attr_clr, propagation, max(userns_fd, 0))
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_syscall("mount_setattr", fd, b"", flags, attr, len(attr)))


def fsopen(fstype: str) -> int:
    """A context to configure a file system in (fsopen(2))."""
    return _check(_syscall("fsopen", fstype.encode(), FSOPEN_CLOEXEC), fstype)


def fsconfig(fd: int, key: str, value: str | None = None) -> None:
    """Set a string option, or a flag when there is no value (fsconfig(2))."""
    if value is None:
        _check(_syscall("fsconfig", fd, FSCONFIG_SET_FLAG, key.encode(), None, 0), key)
    else:
        _check(_syscall("fsconfig", fd, FSCONFIG_SET_STRING, key.encode(), _path(value), 0), key)


def fsmount(fd: int, attributes: int = 0) -> int:
    """Create the configured file system; a detached mount of it (fsmount(2)).

    Raises OSError with what the kernel wrote into the context's log.
    """
    try:
        _check(_syscall("fsconfig", fd, FSCONFIG_CMD_CREATE, None, None, 0))
        return _check(_syscall("fsmount", fd, FSMOUNT_CLOEXEC, attributes))
    except OSError as error:
        raise OSError(error.errno, " ".join(filter(None, (error.strerror, _fs_log(fd))))) from None


def _fs_log(fd: int) -> str:
    lines = []
    try:
        while True:
            lines.append(os.read(fd, 1024).decode(errors="replace").strip())
    except OSError:  # ENODATA once the log is empty
        return " ".join(lines)


def openat2(dirfd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """open(2) below ``dirfd`` that cannot be led outside by links (openat2(2))."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    while True:
        try:
            return _check(_syscall("openat2", dirfd, _path(path), how, len(how)), path)
        except OSError as error:
            # A rename elsewhere can make the walk uncertain; the man page asks to try again.
            if error.errno != errno.EAGAIN:
                raise


def syncfs(fd: int) -> None:
    """Bring everything that is still to be written to a descriptor's file system onto the disk (syncfs(2))."""
    _check(_libc.syncfs(ctypes.c_int(fd)))


def close_range(first: int, last: int = 0x7FFFFFFF) -> None:
    """Close each descriptor from first to last (close_range(2))."""
    _check(_syscall("close_range", first, last, 0))


def close_all_but(*kept: int) -> None:
    """Close each descriptor from 3 on that is not among these."""
    first = 3
    for fd in sorted(set(kept)):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def prctl(option: int, value: int = 0) -> int:
    """prctl(2)."""
    zero = ctypes.c_ulong(0)
    return _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))


def set_capabilities(names: frozenset[str]) -> None:
    """Keep these capabilities, permitted and effective, and none that an exec inherits or regains.

    The bounding set is narrowed first, while that is still allowed (capabilities(7), capset(2)).
    """
    keep = 0
    for number, name in enumerate(CAPABILITIES):
        if name in names:
            keep |= 1 << number
            continue
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a capability that this kernel does not know yet
                raise
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    low, high = keep & 0xFFFFFFFF, keep >> 32
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _check(_syscall("capset", header, struct.pack("IIIIII", low, low, 0, high, high, 0)))


def new_session_keyring() -> None:
    """Leave the caller's session keyring for an empty one (keyctl(2)); kernels without keyrings have none."""
    try:
        _check(_syscall("keyctl", KEYCTL_JOIN_SESSION_KEYRING, None, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EDQUOT):
            raise
