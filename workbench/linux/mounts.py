"""Mounts as data: each can be described, and executed below the root of a container that is being laid out.

A root is prepared by a worker that has joined the container's namespaces (never by the container itself).
Sources outside are opened as detached trees before the worker joins (open_tree(2), id-mapped where the
host's user is root, mount_setattr(2)); targets are resolved inside the new root only (openat2(2)), whatever
links an image ships there.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from workbench.linux import syscalls as sc

#: How the new root is reached while it is laid out, in the container's own mount namespace.
STAGING_CANDIDATES = ("/tmp", "/run", "/mnt", "/var")
# With userxattr the kernel itself follows no redirects; to say so with redirect_dir=off is refused where the
# module is set to follow by default.
OVERLAY_OPTIONS = "userxattr,metacopy=off,index=off"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(slots=True)
class Root:
    """The root being laid out: its descriptor, and the detached sources by host path (of a bind, by its key)."""

    staging: str = ""
    fd: int = -1
    sources: dict[str, int] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    files: int = 0

    def put(self, path: str, content: bytes, read_only: bool) -> None:
        """Bind a small file of ours over ``path``."""
        self.files += 1
        name = f"{self.staging}/f{self.files}"
        with open(name, "wb", opener=lambda path, flags: os.open(path, flags, 0o644)) as file:
            file.write(content)
        tree = sc.open_tree(sc.AT_FDCWD, name, sc.OPEN_TREE_CLONE)
        with _fd(tree), _fd(self.target(path, directory=False)) as fd:
            sc.move_mount(tree, fd)
            attributes = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV
            attributes |= sc.MOUNT_ATTR_RDONLY if read_only else 0
            sc.mount_setattr(tree, attr_set=attributes, recursive=False)

    def target(self, path: str, directory: bool) -> int:
        """An O_PATH descriptor of ``path`` inside; what is missing is made. The caller closes it."""
        try:
            return sc.openat2(self.fd, path, os.O_PATH)
        except FileNotFoundError:
            pass
        parent, name = os.path.split(path.rstrip("/"))
        above = self.target(parent, directory=True)
        try:
            try:
                found = os.lstat(name, dir_fd=above)
            except FileNotFoundError:
                found = None
            if found is not None:  # a dangling link: follow it inside and make what it names
                link = os.readlink(name, dir_fd=above)
                return self.target(os.path.join(parent, link), directory)
            if directory:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=above)
            else:
                # Never one that somebody else made meanwhile: opening a FIFO would wait for its writer.
                with suppress(FileExistsError):
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=above))
        finally:
            os.close(above)
        return sc.openat2(self.fd, path, os.O_PATH)


class Mount(Protocol):
    """One step of laying out a root."""

    def describe(self) -> str:
        """One line for people, as ``--debug`` prints it."""

    def execute(self, root: Root) -> None:
        """Do it. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """The root: layers, highest first, over a throw-away lowest one that holds the mount points.

    writable: host folder with ``upper/`` and ``work/`` (overlayfs.rst, "userxattr").
    """

    layers: tuple[str, ...]
    writable: str
    mount_points: tuple[tuple[str, bool], ...] = ()  # path, is it a folder

    def describe(self) -> str:
        """One line for people."""
        return f"overlay / of {len(self.layers)} layers, changes in {self.writable}/upper"

    @property
    def sources(self) -> tuple[str, ...]:
        """The host folders to be opened: one mount shows all layers that lie in a folder, be they hundreds."""
        return (self.writable, *dict.fromkeys(map(os.path.dirname, self.layers)))

    def execute(self, root: Root) -> None:
        """Mount it and make it the root of what follows."""
        # Relative names keep host paths out of mountinfo, and 500 layers inside mount(2)'s one page of options.
        os.chdir(root.staging)
        for name in ("w", "r", "l", "l/s", "f"):
            os.mkdir(name, 0o755)
        _attach(root.sources[self.writable], "w")
        below = Root(root.staging, os.open("l/s", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        for path, is_folder in self.mount_points:
            os.close(below.target(path, is_folder))
        os.close(below.fd)
        os.chmod("l/s/tmp", 0o1777)
        folders = {path: f"f/{number}" for number, path in enumerate(self.sources[1:])}
        for path, name in folders.items():
            os.mkdir(name)
            _attach(root.sources[path], name)
        for number, layer in enumerate(self.layers):
            folder, _, name = layer.rpartition("/")
            os.symlink(f"../{folders[folder]}/{name}", f"l/{number}")
        lower = ":".join([*(f"l/{number}" for number in range(len(self.layers))), "l/s"])
        sc.mount(
            "overlay", "r", "overlay", sc.MS_NODEV,
            f"lowerdir={lower},upperdir=w/upper,workdir=w/work,{OVERLAY_OPTIONS}",
        )  # fmt: skip
        root.fd = os.open("r", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system of the kernel's own: tmpfs, proc, sysfs, devpts, mqueue."""

    fstype: str
    path: str
    options: str = ""
    flags: int = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC

    def describe(self) -> str:
        """One line for people."""
        return f"{self.fstype} {self.path}" + (f" ({self.options})" if self.options else "")

    def execute(self, root: Root) -> None:
        """Mount it."""
        with _fd(root.target(self.path, directory=True)) as fd:
            sc.mount(self.fstype, f"/proc/self/fd/{fd}", self.fstype, self.flags, self.options or None)


@dataclass(frozen=True, slots=True)
class Bind:
    """A host folder, file or device seen inside; ``source`` was opened before the worker joined."""

    source: str
    path: str
    read_only: bool = False
    directory: bool = True
    device: bool = False

    @property
    def key(self) -> str:
        """Under which its tree is found; one folder may be seen in two places."""
        return f"{self.source}\0{self.path}"

    def describe(self) -> str:
        """One line for people."""
        return f"bind {self.path} from {self.source}" + (" (read-only)" if self.read_only else "")

    def execute(self, root: Root) -> None:
        """Attach it with set-uid programs and (other) devices off."""
        tree = root.sources[self.key]
        attributes = sc.MOUNT_ATTR_NOSUID | (0 if self.device else sc.MOUNT_ATTR_NODEV)
        attributes |= sc.MOUNT_ATTR_RDONLY if self.read_only else 0
        with _fd(root.target(self.path, self.directory)) as fd:
            sc.move_mount(tree, fd)
        # After the move: a tree from the host's own namespace takes attributes from its new owner.
        sc.mount_setattr(tree, attr_set=attributes, recursive=True)


@dataclass(frozen=True, slots=True)
class Text:
    """A small file with our content over whatever the image has there; changes to it stay outside the layer."""

    path: str
    content: str
    read_only: bool = False

    def describe(self) -> str:
        """One line for people."""
        return f"text {self.path} ({len(self.content)} characters)"

    def execute(self, root: Root) -> None:
        """Write it beside the root and bind it."""
        root.put(self.path, self.content.encode(), self.read_only)


@dataclass(frozen=True, slots=True)
class Copy:
    """A host file's content, read before the worker joined: unlike a bind it tells nobody where it came from."""

    source: str
    path: str

    def describe(self) -> str:
        """One line for people."""
        return f"copy {self.path} of {self.source} (read-only)"

    def execute(self, root: Root) -> None:
        """Write it beside the root and bind it."""
        root.put(self.path, root.contents[self.source], read_only=True)


@dataclass(frozen=True, slots=True)
class Links:
    """Symbolic links in a folder that is ours (``/dev/fd`` and its kin)."""

    path: str
    links: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """One line for people."""
        return f"links in {self.path}: " + ", ".join(name for name, _ in self.links)

    def execute(self, root: Root) -> None:
        """Make them."""
        with _fd(sc.openat2(root.fd, self.path, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            for name, goal in self.links:
                os.symlink(goal, name, dir_fd=fd)


@dataclass(frozen=True, slots=True)
class Pin:
    """A folder that can be neither renamed nor removed from inside, since it is a mount point (rename(2), EBUSY)."""

    path: str

    def describe(self) -> str:
        """One line for people."""
        return f"pin {self.path}"

    def execute(self, root: Root) -> None:
        """Bind it to itself; one that is missing needs nothing."""
        _on_itself(root, self.path, 0)


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """A part of the tree that may be read but not written; one that is missing needs nothing."""

    path: str

    def describe(self) -> str:
        """One line for people."""
        return f"read-only {self.path}"

    def execute(self, root: Root) -> None:
        """Bind it to itself without the right to write."""
        _on_itself(root, self.path, sc.MOUNT_ATTR_RDONLY)


def _on_itself(root: Root, path: str, attributes: int) -> None:
    try:
        fd = sc.openat2(root.fd, path, os.O_PATH)
    except OSError as error:
        if error.errno in _MISSING:
            return
        raise
    with _fd(fd):
        tree = sc.open_tree(fd, "", sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE | sc.AT_EMPTY_PATH)
        with _fd(tree):
            sc.move_mount(tree, fd)
            if attributes:
                sc.mount_setattr(tree, attr_set=attributes, recursive=True)


@dataclass(frozen=True, slots=True)
class Hide:
    """Something that must not be seen: an empty read-only folder, or nothing in place of a file."""

    path: str

    def describe(self) -> str:
        """One line for people."""
        return f"hide {self.path}"

    def execute(self, root: Root) -> None:
        """Cover it; what is missing needs nothing. A link is followed inside the root."""
        try:
            fd = sc.openat2(root.fd, self.path, os.O_PATH)
        except OSError as error:
            if error.errno in _MISSING:
                return
            raise
        with _fd(fd):
            goal = f"/proc/self/fd/{fd}"
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                flags = sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
                sc.mount("tmpfs", goal, "tmpfs", flags, "size=0k,mode=555,nr_inodes=2")
            else:
                empty = f"{root.staging}/empty"
                os.close(os.open(empty, os.O_CREAT | os.O_CLOEXEC, 0o444))
                tree = sc.open_tree(sc.AT_FDCWD, empty, sc.OPEN_TREE_CLONE)
                with _fd(tree):
                    sc.move_mount(tree, fd)
                    sc.mount_setattr(tree, attr_set=sc.MOUNT_ATTR_RDONLY, recursive=False)


class _fd:  # noqa: N801 - reads like a statement
    """Closes a descriptor at the end of a block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def open_source(path: str, userns_fd: int = -1, *, follow: bool = True) -> int:
    """A detached copy of the tree at a host path, id-mapped by ``userns_fd`` when that is given.

    follow: whether a part of the path may be a symbolic link; not where another container could have put it.
    Recursive, since a user namespace may not uncover what lies below a mount (mount_namespaces(7)).
    Raises OSError; EINVAL from a file system that knows no id-mapped mounts.
    """
    resolve = 0 if follow else sc.RESOLVE_NO_SYMLINKS
    with _fd(sc.openat2(sc.AT_FDCWD, path, os.O_PATH, resolve=resolve)) as fd:
        tree = sc.open_tree(fd, "", sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE | sc.AT_EMPTY_PATH)
    try:
        # A copy of a shared mount is its peer: what is mounted on it inside, to cover something, would appear on
        # the host as well, and what the host mounts later inside (mount_namespaces(7), systemd shares all).
        sc.mount_setattr(tree, propagation=sc.MS_PRIVATE, userns_fd=userns_fd, recursive=True)
    except OSError as error:
        os.close(tree)
        what = "id-mapping the mount" if userns_fd >= 0 else "making the mount private"
        raise OSError(error.errno, f"{error.strerror} ({what})", path) from None
    return tree


def lone_file(name: str, content: bytes, mode: int) -> int:
    """A descriptor, for reading, of a file that is all there is on a read-only file system that nobody can reach."""
    context = sc.fsopen("tmpfs")
    with _fd(context):
        sc.fsconfig(context, "size", str(len(content) + (64 << 10)))
        tree = sc.fsmount(context, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    with _fd(tree):
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=tree)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)
        sc.mount_setattr(tree, attr_set=sc.MOUNT_ATTR_RDONLY, recursive=False)
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)


def open_in(folder: str, name: str, flags: int, mode: int) -> int:
    """Open a file for a container: its descriptor then says ``/name`` and not where the folder is (proc(5), fd)."""
    tree = sc.open_tree(sc.AT_FDCWD, folder, sc.OPEN_TREE_CLONE)
    with _fd(tree):
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=tree)


def begin() -> Root:
    """In a fresh mount namespace: nothing spreads to the host, and a private tmpfs to lay the root out in."""
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    staging = next(path for path in STAGING_CANDIDATES if os.path.isdir(path))
    sc.mount("tmpfs", staging, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=755,size=4m")
    return Root(staging)


def finish(root: Root) -> None:
    """Make the new root ``/`` of the namespace and of everything in it; the host's tree is gone from it.

    pivot_root(2) onto itself, then detach what was above, as the man page's notes describe.
    """
    os.fchdir(root.fd)
    sc.pivot_root(".", ".")
    sc.umount2(".", sc.MNT_DETACH)
    os.chdir("/")


def _attach(tree: int, path: str) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    with _fd(fd):
        sc.move_mount(tree, fd)
