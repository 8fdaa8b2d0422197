"""A layer's two forms: its tar, whose sha256 is its ``diff_id``, and its tree as overlayfs wants it.

In a tree a removed file is a character device 0:0 and a replaced folder carries ``user.overlay.opaque``
(overlayfs.rst); in a tar they are ``.wh.<name>`` and ``.wh..wh..opq`` (OCI image spec, layer.md). The
functions without underscore run through ``userns.call``: JSON arguments and results, container ids as seen
from there.

Nothing in an archive is trusted. Each path is walked below the tree by openat2(2) that follows no link,
files are made new and never opened over others, and what a layer may not hold is refused rather than
mended.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

from workbench.images import tar
from workbench.images.files import clear_errors
from workbench.images.normalise import normalise as normalise
from workbench.images.sink import Sink
from workbench.images.spool import Spool
from workbench.images.tree import ESCAPED, OPAQUE, OVERLAY, below, is_whiteout, kept_xattrs, walk
from workbench.linux.trees import remove as remove
from workbench.model import Conflict, Corrupt, InvalidInput, WorkbenchError

WHITEOUT = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
_AUFS = b".wh..wh."  # bookkeeping of aufs that old Docker layers carry; says nothing about files
_APPLY, _PACK = "apply a layer's archive", "write a layer's archive"

Owners = dict[str, Any]


def owners_file(tree: str) -> str:
    """Where the owners and attributes stand that this user may not give to the files of a tree."""
    return f"{tree.rstrip('/')}.owners"


def apply(source: str | int, tree: str, limit: int | None = None) -> dict[str, Any]:
    """Lay out an uncompressed OCI tar (a path, or an open descriptor of which it is the next ``limit`` bytes) as a
    new tree.

    Returns ``diff_id`` and ``size`` (bytes) of the tar, and its ``form`` (``tar.Form``). Owners that cannot be had here
    go to ``owners_file(tree)``. Raises InvalidInput for an archive that is hostile or broken, HostLacks without space.
    What was laid out by then stays for the caller to remove.
    """
    with clear_errors(_APPLY, tree):
        os.makedirs(tree, mode=0o700, exist_ok=True)
        if os.listdir(tree):
            raise Conflict(_APPLY, f"{tree} is not empty", "give a new folder")
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if isinstance(source, str) else os.dup(source)
        target, reader = _Target(tree), tar.Reader(fd, limit=limit)
        try:
            for entry in reader:
                target.add(entry, reader)
            target.finish()
        finally:
            reader.close()
            target.close()
            os.close(fd)
        if target.owners:
            with open(owners_file(tree), "x") as file:
                json.dump(target.owners, file, sort_keys=True)
        return {"diff_id": reader.digest, "size": reader.size, "form": reader.form}


class _Target:
    """The tree that is being laid out. Whiteouts come last, then the modes and times of folders."""

    def __init__(self, tree: str) -> None:
        self.root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.owners: Owners = {}
        # A root that the archive doesn't mention is as every root is, whatever this process's umask.
        # Both may be longer than memory is to hold.
        place = os.path.dirname(os.path.abspath(tree))
        self._folders, self._whiteouts = Spool(place), Spool(place)
        self._later(b"", tar.Entry(b"", tar.FOLDER, 0o755))
        self._parent, self._parent_fd = b"", os.dup(self.root)

    def close(self) -> None:
        os.close(self._parent_fd)
        os.close(self.root)
        self._folders.close()
        self._whiteouts.close()

    def add(self, entry: tar.Entry, reader: tar.Reader) -> None:
        path = _clean(entry.name)
        shown = os.fsdecode(path)
        parent, _, name = path.rpartition(b"/")
        try:
            if name.startswith(WHITEOUT):
                self._whiteout(parent, name, entry)
                return
            if entry.kind == tar.FOLDER:
                self._later(path, entry, new=self._folder(parent, name))
                return
            if not name:
                raise tar.bad("its root is no folder")
            at = self._open(parent)
            if entry.kind == tar.FILE:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=at)
                try:
                    reader.copy(entry, path, fd)
                    self._attributes(fd, path, entry)
                finally:
                    os.close(fd)
            elif entry.kind == tar.SYMLINK:
                if not entry.link:
                    raise tar.bad(f"the symbolic link {shown} names nothing")
                os.symlink(entry.link, name, dir_fd=at)
                self._own(path, name, entry, dir_fd=at)
                os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=at, follow_symlinks=False)
            elif entry.kind == tar.HARD_LINK:
                self._hard_link(entry, path, name, at)
            elif entry.kind == tar.FIFO:
                os.mkfifo(name, 0o600, dir_fd=at)
                self._own(path, name, entry, dir_fd=at)
                os.chmod(name, entry.mode, dir_fd=at)
                os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=at, follow_symlinks=False)
            elif entry.kind in (tar.CHARACTER, tar.BLOCK_DEVICE):
                raise tar.bad(f"{shown} is a device, which no layer may hold")
            else:
                raise tar.bad(f"{shown} is of a kind ({os.fsdecode(entry.kind)}) that no layer holds")
        except FileExistsError:
            raise tar.bad(f"it names {shown} twice") from None
        except OSError as error:
            raise _refused(error, shown) from None

    def finish(self) -> None:
        """Whiteouts, then what folders are to be: nothing is made in them afterwards."""
        shown = ""
        try:
            for path in self._whiteouts:
                shown, (parent, _, name) = os.fsdecode(path), path.rpartition(b"/")
                try:
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=self._open(parent))
                except FileExistsError:
                    # layer.md: a whiteout hides what lies below, never what its own layer brings.
                    if stat.S_ISDIR(os.lstat(name, dir_fd=self._open(parent)).st_mode):
                        self._opaque(path)
            for new, fields in self._folders:
                entry = tar.Entry(*fields)
                shown, path = os.fsdecode(entry.name), entry.name
                fd = below(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if not new:
                        self._bare(fd, path)
                    self._attributes(fd, path, entry)
                finally:
                    os.close(fd)
        except OSError as error:
            raise _refused(error, shown) from None

    def _later(self, path: bytes, entry: tar.Entry, new: bool = True) -> None:
        """A folder gets its attributes once nothing is made in it any more; new: it has none of an earlier entry."""
        fields = (path, entry.kind, entry.mode, entry.uid, entry.gid, 0, entry.mtime, b"", entry.xattrs)
        self._folders.append((new, fields))

    def _bare(self, fd: int, path: bytes) -> None:
        """Take away what an earlier entry of the same folder gave it: the last one counts."""
        self.owners.pop(_text(path), None)
        for name in os.listxattr(fd):
            if name != OPAQUE and kept_xattrs(name):
                os.removexattr(fd, name)

    def _opaque(self, path: bytes) -> None:
        self._open(path)  # the archive may name an opaque folder by its mark alone
        fd = below(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.setxattr(fd, OPAQUE, b"y")
        finally:
            os.close(fd)

    def _whiteout(self, parent: bytes, name: bytes, entry: tar.Entry) -> None:
        if name == OPAQUE_MARK:
            self._opaque(parent)
        elif name.startswith(_AUFS):
            return
        elif name[len(WHITEOUT) :] in (b"", b".", b".."):
            raise tar.bad("a whiteout names no file")
        else:
            self._whiteouts.append((parent + b"/" if parent else b"") + name[len(WHITEOUT) :])
        if entry.kind != tar.FILE or entry.size:
            raise tar.bad("a whiteout is no empty file")

    def _open(self, path: bytes) -> int:
        """The descriptor of a folder, made with those above it where the archive names none."""
        if path != self._parent:
            try:
                fd = below(self.root, path, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                fd = self._make(path)
            os.close(self._parent_fd)
            self._parent, self._parent_fd = path, fd
        return self._parent_fd

    def _make(self, path: bytes) -> int:
        """``_open`` where that or a folder above it is to be made: from one to the next, for there may be thousands."""
        fd, end = os.dup(self.root), -1
        for name in path.split(b"/"):
            end += 1 + len(name)
            above = fd
            try:
                try:
                    fd = below(above, name, os.O_PATH | os.O_DIRECTORY)
                except FileNotFoundError:
                    os.mkdir(name, 0o700, dir_fd=above)
                    self._later(path[:end], tar.Entry(b"", tar.FOLDER, 0o755))
                    fd = below(above, name, os.O_PATH | os.O_DIRECTORY)
            finally:
                os.close(above)
        return fd

    def _folder(self, parent: bytes, name: bytes) -> bool:
        """Make the folder of an entry; False where it is there."""
        if not name:
            return False
        at = self._open(parent)
        try:
            os.mkdir(name, 0o700, dir_fd=at)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=at).st_mode):
                raise
            return False
        return True

    def _hard_link(self, entry: tar.Entry, path: bytes, name: bytes, at: int) -> None:
        goal = _clean(entry.link)
        parent, _, old = goal.rpartition(b"/")
        try:
            source = below(self.root, parent, os.O_PATH | os.O_DIRECTORY)
            try:
                os.link(old, name, src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)
                if first := self.owners.get(_text(goal)):
                    self.owners[_text(path)] = first  # either may come first in our own order
            finally:
                os.close(source)
        except FileExistsError:
            raise
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise tar.bad(
                f"{os.fsdecode(path)} is a hard link to {os.fsdecode(goal)}, which is no file of it"
            ) from None

    def _own(self, path: bytes, target: bytes | int, entry: tar.Entry, dir_fd: int | None = None) -> None:
        try:
            if isinstance(target, int):
                os.fchown(target, entry.uid, entry.gid)
            else:
                os.chown(target, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):  # an id that is not ours to give
                raise
            self._aside(path)["owner"] = [entry.uid, entry.gid]

    def _attributes(self, fd: int, path: bytes, entry: tar.Entry) -> None:
        self._own(path, fd, entry)  # first: it clears set-uid bits and capabilities
        os.fchmod(fd, entry.mode)
        for name, value in entry.xattrs.items():
            if not kept_xattrs(name):
                continue
            try:
                os.setxattr(fd, ESCAPED + name[len(OVERLAY) :] if name.startswith(OVERLAY) else name, value)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
                self._aside(path).setdefault("xattrs", {})[name] = base64.b64encode(value).decode()
            except ValueError:
                raise tar.bad("an attribute's name holds a zero byte") from None
        os.utime(fd, ns=(entry.mtime, entry.mtime))

    def _aside(self, path: bytes) -> Owners:
        found: Owners = self.owners.setdefault(_text(path), {})
        return found


def _text(path: bytes) -> str:
    """A path as JSON holds it, whatever this process's locale."""
    return path.decode("utf-8", "surrogateescape")


def _clean(name: bytes) -> bytes:
    """A name of the archive as a path below its root; empty for the root itself."""
    if name[:1] == b"/":
        raise tar.bad(f"the name {os.fsdecode(name[:80])} is absolute")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise tar.bad(f"the name {os.fsdecode(name[:80])} leads out of it")
    if len(name) > tar.LONGEST_PATH or any(len(part) > tar.LONGEST_NAME for part in parts):
        raise tar.bad(f"a name is too long ({os.fsdecode(name[:40])}…)")
    return b"/".join(parts)


def _refused(error: OSError, shown: str) -> Exception:
    if error.errno == errno.ELOOP:
        return tar.bad(f"{shown} leads through a symbolic link")
    if error.errno == errno.ENOTDIR:
        return tar.bad(f"{shown} lies below something that is no folder")
    if error.errno in (errno.ENAMETOOLONG, errno.ERANGE, errno.E2BIG):
        return tar.bad(f"{shown}: {error.strerror}")
    return error


def pack(tree: str, out: str | int | None = None, clamp: int | None = None) -> dict[str, Any]:
    """The deterministic OCI tar of a tree: hashed, and written durably to a path, or to a descriptor, if that is given.

    clamp: newest modification time in seconds since 1970; with it times are whole seconds, without it to
    the nanosecond. Returns ``diff_id`` and ``size`` in bytes. Raises InvalidInput for what no layer may
    hold (devices, names that begin with ``.wh.``), Conflict when a file changes meanwhile, HostLacks
    without space.
    """
    owners = read_owners(tree)
    links: dict[tuple[int, int], bytes] = {}
    with clear_errors(_PACK, out if isinstance(out, str) else tree):
        sink = Sink(out)
        try:
            for path, at, name, found in walk(tree):
                for entry, fd in entries(path, at, name, found, links, owners):
                    if clamp is not None and entry.mtime:
                        entry.mtime = min(entry.mtime // tar.SECOND, clamp) * tar.SECOND
                    sink.entry(entry, fd, path)
            sink.write(bytes(2 * tar.BLOCK))
            return sink.finish()
        finally:
            sink.close()


def entries(
    path: bytes,
    at: int,
    name: bytes,
    found: os.stat_result,
    links: dict[tuple[int, int], bytes],
    owners: Owners,
) -> Iterator[tuple[tar.Entry, int]]:
    """What one file of a tree is in the tar, with a descriptor where there is content."""
    mode, kind = found.st_mode, stat.S_IFMT(found.st_mode)
    if is_whiteout(found):
        # Before the look at links: overlayfs makes all its whiteouts links of one (overlayfs.rst).
        yield tar.Entry(path[: -len(name)] + WHITEOUT + name, tar.FILE), -1
        return
    if name.startswith(WHITEOUT):
        raise InvalidInput(_PACK, f"/{os.fsdecode(path)} has a name that means a removed file", "rename it")
    entry = tar.Entry(path, tar.FILE, stat.S_IMODE(mode), found.st_uid, found.st_gid, 0, found.st_mtime_ns)
    aside = owners.get(_text(path)) if owners else None
    if aside and "owner" in aside:
        entry.uid, entry.gid = aside["owner"]
    if kind == stat.S_IFDIR:
        entry.name, entry.kind = path + b"/" if path else b"./", tar.FOLDER
        opaque = _read_xattrs(entry, at, aside)
        yield entry, -1
        if opaque:
            yield tar.Entry((path + b"/" if path else b"") + OPAQUE_MARK, tar.FILE), -1
        return
    if found.st_nlink > 1:
        first = links.setdefault((found.st_dev, found.st_ino), path)
        if first != path:
            entry.kind, entry.link = tar.HARD_LINK, first
            yield entry, -1
            return
    if kind == stat.S_IFREG:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=at)
        try:
            entry.size = found.st_size
            _read_xattrs(entry, fd, aside)
            yield entry, fd
        finally:
            os.close(fd)
    elif kind == stat.S_IFLNK:
        entry.kind, entry.mode, entry.link = tar.SYMLINK, 0o777, os.fsencode(os.readlink(name, dir_fd=at))
        yield entry, -1
    elif kind == stat.S_IFIFO:
        entry.kind = tar.FIFO
        yield entry, -1
    elif kind != stat.S_IFSOCK:  # a socket is nothing without the process behind it
        raise InvalidInput(_PACK, f"/{os.fsdecode(path)} is a device, which no layer may hold", "remove it")


def _read_xattrs(entry: tar.Entry, fd: int, aside: Owners | None) -> bool:
    """Fill in what of a file's attributes belongs to the layer; whether it is opaque."""
    opaque = False
    for name in os.listxattr(fd):
        if name == OPAQUE:
            opaque = os.getxattr(fd, name) == b"y"
        elif name.startswith(ESCAPED):
            entry.xattrs[OVERLAY + name[len(ESCAPED) :]] = os.getxattr(fd, name)
        elif not name.startswith(OVERLAY) and kept_xattrs(name):
            entry.xattrs[name] = os.getxattr(fd, name)
    for name, value in ((aside or {}).get("xattrs") or {}).items():
        entry.xattrs[name] = base64.b64decode(value)
    return opaque


def read_owners(tree: str) -> Owners:
    """What stands beside a tree of the owners that its files could not be given. Raises Corrupt."""
    try:
        with open(owners_file(tree)) as file:
            found: Owners = json.load(file)
            return found
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Corrupt("read a layer", f"{owners_file(tree)} is damaged", "build or pull the image again") from None


def move(source: str, target: str) -> None:
    """rename(2) where every id of a tree is the caller's to move."""
    os.rename(source, target)


def lay_out(source: str | int, tree: str, record: str, limit: int | None = None) -> dict[str, Any]:
    """``apply``, then a look whether ``pack`` gives the same bytes; only if not, ``record`` is written.

    source: to be read twice. For the look no content is read: it was just written.
    """
    start = 0 if isinstance(source, str) else os.lseek(source, 0, os.SEEK_CUR)
    found = apply(source, tree, limit)
    if found.pop("form") != _form(tree):
        if isinstance(source, int):
            os.lseek(source, start, os.SEEK_SET)
        _take_down(source, record, limit)
        if remake(tree, record)["diff_id"] != found["diff_id"]:
            raise tar.bad("its files cannot be kept as they are")
    return found


def _form(tree: str) -> str:
    """That of the archive that ``pack`` would write."""
    owners, links, form = read_owners(tree), dict[tuple[int, int], bytes](), tar.Form()
    for path, at, name, found in walk(tree):
        for entry, _ in entries(path, at, name, found, links, owners):
            form.entry(entry)
    return form.finish()


def _take_down(source: str | int, record: str, limit: int | None) -> None:
    """Write the record of an archive that was applied."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if isinstance(source, str) else os.dup(source)
    writer = tar.Record(record)
    reader = tar.Reader(fd, writer, limit)
    try:
        for entry in reader:
            if entry.kind == tar.FILE and not _clean(entry.name).rpartition(b"/")[2].startswith(WHITEOUT):
                reader.copy(entry, _clean(entry.name), -1)
        writer.close()
    finally:
        reader.close()
        os.close(fd)


def remake(tree: str, record: str | None, out: str | int | None = None) -> dict[str, Any]:
    """The very tar that a tree was laid out from, with the record of its form where there is one.

    Hashed, and written to a path or a descriptor if that is given; result and errors as ``pack``'s.
    """
    if record is None:
        return pack(tree, out)
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with clear_errors(_PACK, out if isinstance(out, str) else tree):
        sink = Sink(out)
        try:
            for data, size in tar.read_record(record):
                if size < 0:
                    sink.write(data)
                    continue
                fd = below(root, data, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    sink.content(fd, size, data)
                finally:
                    os.close(fd)
            return sink.finish()
        finally:
            sink.close()
            os.close(root)


def wrong(layers: list[tuple[str, str | None, str]]) -> list[str]:
    """What is wrong with the files of each layer (its tree, its record, its diff_id), or nothing."""
    return [_wrong(*layer) for layer in layers]


def _wrong(tree: str, record: str | None, diff_id: str) -> str:
    try:
        found = remake(tree, record)
    except WorkbenchError as error:
        return error.obstacle
    except OSError as error:
        return str(error)
    except Exception as error:  # what stands beside it may be damaged as well, in any way
        return f"it cannot be read ({error})"
    return "" if found["diff_id"] == diff_id else "its files are not what its digest says"
