"""What a writable layer holds over an image, or over its own last snapshot, as one tar.

The container stands still while its files are looked at; where they are many they are read ahead (``ahead``). What
has not changed since the last snapshot (inode, ctime, size, mode) is not read again: an *index* says what was captured
then, and where in which tar it lies. ``capture`` runs apart, through ``userns.call``.

A layer holds exactly what changed: copies that changed nothing are left out, folders come along with what is in them,
``opaque`` stands only where a folder is hidden, and hard links are together in one layer or in none.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from workbench.containers.pause import paused
from workbench.history.ahead import Ahead, Assembly
from workbench.images import layer, tar
from workbench.images.files import clear_errors
from workbench.images.sink import Sink
from workbench.images.tree import below, is_whiteout, walk
from workbench.images.view import Shown, is_opaque
from workbench.images.view import below as shown_below
from workbench.linux import syscalls as sc
from workbench.model import WorkbenchError

#: A file may be written twice within one tick of its file system's clock (jiffies; Linux 6.13 is finer).
_TICK = 0.012

# An index's entry: what a look can tell of a file, then where its captured form lies.
_INODE, _CTIME, _SIZE, _MODE, _TAR, _START, _LENGTH = range(7)
# (Of a folder the size says whether it hides what is below.)
#: No tar: it was as in the layers below.
_BELOW = -1
#: Bytes that are read before the container stands still, if there are more of them.
_MUCH = 8 << 20


def capture(upper: str, lowers: list[str], out: str, index: str, new_index: str, *rest: Any) -> dict[str, Any]:
    """Write what changed to a new file ``out``, durably; the index of what is there now to ``new_index``.

    upper: overlayfs's, of one container; lowers: the trees below, highest first; index: that of the last snapshot, or
    empty. rest: rules of what to leave out (paths relative to ``/``, with a trailing slash all below); the descriptor
    of the container's guard (``pause``), or -1 for one that does not run; the tars of its earlier snapshots, in the
    index's order.
    Returns ``diff_id``, ``size`` (bytes of the tar), ``changes`` (number of entries but folders that only lead
    there), ``paths`` (the first 50,000), ``skipped`` (what a rule left out) and ``paused`` (seconds). Raises
    InvalidInput for what no layer may hold, Conflict, HostLacks without space.
    """
    rules, guard, tars = rest
    before, running, stood = _load(index), guard >= 0, 0.0
    ahead: Ahead | None = None
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        work = _Capture(upper, lowers, rules, before, tars)
        if running and not before:  # all is new, and perhaps much
            ahead = work.read_ahead(fd, out, looked=False)
        elif running:
            sc.syncfs(fd)  # most of it; what is left is little
        tried = not running or not before
        while True:
            with paused(guard) if running else nullcontext():
                began = time.monotonic()
                # What is mapped and written through memory changes its ctime only when its pages are clean before.
                sc.syncfs(fd)
                work = _Capture(upper, lowers, rules, before, tars)
                work.look()
                much = work.bulk(out) > _MUCH
                if tried or not much:
                    sink = _written(work, out, ahead)
                stood += time.monotonic() - began
            if tried or not much:
                break
            ahead, tried = work.read_ahead(fd, out, looked=True), True
        with clear_errors("write a snapshot", out):
            try:
                found = sink.finish()
            finally:
                sink.close()
    finally:
        os.close(fd)
    with clear_errors("write a snapshot", new_index), open(new_index, "x") as file:
        file.write(json.dumps({"entries": work.now}))  # in C, unlike json.dump
        file.flush()
        os.fsync(file.fileno())
    return found | {
        "changes": len(work.changed), "paths": work.changed[:50_000], "skipped": sorted(work.skipped), "paused": stood,
    }  # fmt: skip


def progress(out: str) -> tuple[int, int]:
    """Of a ``capture`` that another process is at: bytes written, and those to be written, 0 while that is unknown."""
    written = [os.stat(path).st_size for path in (out, f"{out}.ahead") if os.path.exists(path)]
    try:
        with open(f"{out}.bulk") as file:
            bulk = int(file.read() or 0)
    except FileNotFoundError:
        bulk = 0
    return min(max(written, default=0), bulk), bulk


def look(upper: str, lowers: list[str], index: str, *rest: Any) -> dict[str, int]:
    """What ``capture`` of the same arguments would find, while the container goes on and without a word written.

    rest: rules and tars, as there. Returns ``changes`` and ``size`` (bytes of the files). What changes meanwhile is
    counted or not. Raises OSError where files go while they are looked at.
    """
    rules, tars = rest
    work = _Capture(upper, lowers, rules, _load(index), tars)
    work.look()
    return {"changes": len(work.changed), "size": work.bulk()}


def _written(work: _Capture, out: str, ahead: Ahead | None) -> Sink | Assembly:
    with clear_errors("write a snapshot", out):
        sink = Assembly(ahead, out) if ahead else Sink(out)
        try:
            work.write(sink, ahead)
        except BaseException:
            sink.close()
            raise
    return sink


def _load(index: str) -> dict[str, list[int]]:
    if not index:
        return {}
    with open(index) as file:
        entries: dict[str, list[int]] = json.load(file)["entries"]
    return entries


class _Capture:
    """One look at a writable layer, and the writing of what is new in it. Paths are text with surrogate escapes."""

    def __init__(
        self, upper: str, lowers: list[str], rules: Iterable[str], before: dict[str, list[int]], tars: list[str]
    ) -> None:
        self.upper, self.before, self.tars = upper, before, tars
        self.exact = {rule for rule in rules if not rule.endswith("/")}
        self.under = {rule.rstrip("/") for rule in rules if rule.endswith("/")}
        self.below: dict[str, Shown] = {"": Shown(None, "", list(lowers))}
        self.fresh: set[str] = set()  # folders that are not those of the last snapshot
        self.hiding: set[str] = set()  # folders whose ``opaque`` means something
        self.now: dict[str, list[int]] = {}
        self.wanted: set[str] = set()
        self.changed: list[str] = []
        self.skipped: list[str] = []
        self.removed: dict[str, list[str]] = {}  # by folder, the names that the last snapshot had
        self.links: dict[tuple[int, int], list[str]] = {}
        self.newest = 0.0

    # First all is looked at

    def look(self) -> None:
        """Decide what is written."""
        pending_folders: list[str] = []
        for raw, at, _, found in walk(self.upper, self._counts):
            path = os.fsdecode(raw)
            self.newest = max(self.newest, found.st_ctime)
            if path:
                self._look(path, at, found)
            if stat.S_ISDIR(found.st_mode):
                pending_folders.append(path)
        for members in self.links.values():
            if any(path in self.wanted for path in members):  # all or none
                self.wanted.update(members)
        self._find_removed(pending_folders)
        self.changed += sorted(self.wanted)
        for path in [*self.wanted, *(f"{folder}/" for folder in self.removed)]:  # what leads there
            while path:
                path = path.rpartition("/")[0]
                self.wanted.add(path)
        wait = self.newest + _TICK - time.time()
        if 0 < wait <= _TICK:
            time.sleep(wait)

    def _counts(self, raw: bytes) -> bool:
        """Whether no rule leaves a path out."""
        path = os.fsdecode(raw)
        left_out = path in self.exact or path.rpartition("/")[0] in self.under
        if left_out:
            self.skipped.append(path)
        return not left_out

    def _look(self, path: str, at: int, found: os.stat_result) -> None:
        if stat.S_ISSOCK(found.st_mode):
            return  # it is nothing without the process behind it
        parent, _, name = path.rpartition("/")
        seen = [found.st_ino, found.st_ctime_ns, found.st_size, found.st_mode, _BELOW, 0, 0]
        self.now[path] = seen
        old = None if parent in self.fresh else self.before.get(path)
        folder = stat.S_ISDIR(found.st_mode)
        below = shown_below(self.below[parent].folders, name)
        if folder:
            opaque = is_opaque(at)
            self.below[path] = Shown(below.found, below.path, [] if opaque else below.folders)
            seen[_SIZE] = int(opaque)
            # One that was removed and made again may have the number of the old one; that it hides tells it.
            if old is None or not stat.S_ISDIR(old[_MODE]) or (opaque and not old[_SIZE]):
                self.fresh.add(path)
                was_folder = bool(below.folders) or (
                    (earlier := self.before.get(path)) is not None and stat.S_ISDIR(earlier[_MODE])
                )
                if opaque and was_folder:
                    self.hiding.add(path)
                    self.wanted.add(path)
        if found.st_nlink > 1 and not folder and not is_whiteout(found):
            self.links.setdefault((found.st_dev, found.st_ino), []).append(path)
        # Marks of what is gone are links of one, so that their ctime says nothing.
        marked = old is not None and is_whiteout(found) and _was_whiteout(old)
        if old is not None and (old[:4] == seen[:4] or marked):
            self.now[path] = old
            return
        if self._is_new(path, at, name, found, old, below):
            self.wanted.add(path)
        elif old is not None:
            self.now[path] = seen[:4] + old[4:]

    def _is_new(
        self, path: str, at: int, name: str, found: os.stat_result, old: list[int] | None, below: Shown
    ) -> bool:
        """Whether what a look cannot tell apart from before, or tells to be new, is other than before."""
        if is_whiteout(found):
            was = self.before.get(path)  # the folder may have been replaced since
            return below.found is not None or (was is not None and not _was_whiteout(was))
        raw, raw_name = os.fsencode(path), os.fsencode(name)
        if old is not None and old[_TAR] != _BELOW:
            return not self._same_as_captured(raw, at, raw_name, found, old)
        if below.found is None and path in self.under:
            return False  # a folder for what is left out
        if below.found is None or stat.S_IFMT(below.found.st_mode) != stat.S_IFMT(found.st_mode):
            return True
        return not _same_as_below(raw, at, raw_name, found, below)

    def _same_as_captured(self, raw: bytes, at: int, name: bytes, found: os.stat_result, old: list[int]) -> bool:
        """Against the bytes in the tar of an earlier snapshot; unknown where that is gone."""
        try:
            with open(self.tars[old[_TAR]], "rb") as file:
                file.seek(old[_START])
                left = old[_LENGTH]
                for piece in pieces(raw, at, name, found, folder_time=stat.S_ISDIR(found.st_mode)):
                    if stat.S_ISDIR(found.st_mode):
                        return _without_time(file.read(left)) == piece
                    left -= len(piece)
                    if left < 0 or file.read(len(piece)) != piece:
                        return False
                return left == 0
        except (OSError, IndexError):
            return False

    def _find_removed(self, folders: Iterable[str]) -> None:
        """What the last snapshot had and nothing is there now, not even a mark."""
        present = set(folders)
        for path, old in self.before.items():
            parent = path.rpartition("/")[0]
            if path in self.under:  # /tmp of a container that was stopped
                continue
            if path not in self.now and parent in present and parent not in self.fresh and not _was_whiteout(old):
                self.removed.setdefault(parent, []).append(path)
                self.changed.append(path)

    # Then it is written

    def bulk(self, out: str = "") -> int:
        """Bytes of the files that are wanted; much is told beside ``out``, if that is given, for ``progress``."""
        looks = (self.now[path] for path in self.wanted if path in self.now)
        bulk = sum(look[_SIZE] for look in looks if stat.S_ISREG(look[_MODE]))
        if out and bulk > _MUCH:
            with open(f"{out}.bulk", "w") as file:
                file.write(str(bulk))
        return bulk

    def write(self, sink: Sink | Assembly, ahead: Ahead | None = None) -> None:
        """The tar: what is wanted, in the order of every layer, which is the one that it was looked at in."""
        number, start = len(self.tars), 0
        links: dict[tuple[int, int], bytes] = {}
        linked = {path: key for key, members in self.links.items() for path in members}
        with _Folders(self.upper) as folders:
            for path in ("", *self.now) if self.wanted else ():
                if path not in self.wanted:
                    continue
                raw, seen = os.fsencode(path), self.now.get(path)
                part = ahead.part(path, seen[:_TAR]) if ahead and seen else None
                if part and (path not in linked or links.setdefault(linked[path], raw) == raw):
                    assert seen and isinstance(sink, Assembly)
                    sink.reuse(*part)
                    seen[_TAR:] = [number, start, part[1]]
                    start += part[1]
                    continue
                at, name, found = folders.look(raw, not seen or stat.S_ISDIR(seen[_MODE]))
                lengths = [
                    sink.entry(entry, fd, raw) for entry, fd in layer.entries(raw, at, name, found, links, {})
                    if path in self.hiding or not entry.name.endswith(layer.OPAQUE_MARK)
                ]  # fmt: skip
                if seen:  # of a folder without its mark
                    length = lengths[0] if stat.S_ISDIR(found.st_mode) else sum(lengths)
                    seen[_TAR:] = [number, start, length]
                for gone in sorted(map(os.fsencode, self.removed.get(path, ()))):
                    folder, slash, gone_name = gone.rpartition(b"/")
                    mark = tar.Entry(folder + slash + layer.WHITEOUT + gone_name, tar.FILE)
                    lengths.append(sink.entry(mark, -1, gone))
                start += sum(lengths)
        sink.write(bytes(2 * tar.BLOCK))

    def read_ahead(self, fd: int, out: str, *, looked: bool) -> Ahead | None:
        """What is wanted, read while the container runs; None where it is little, or changes too much for that.

        fd: of the writable layer; looked: whether ``look`` was called already, while the container stood still.
        """
        stable = float("inf") if looked else time.time() - _TICK
        path = f"{out}.ahead"
        try:
            if not looked:
                self.look()
            sc.syncfs(fd)  # between the look and the reading, see ``ahead``
            if self.bulk(out) <= _MUCH:
                return None
            sink = Sink(path)
            try:
                self.write(sink)
                found = sink.finish(durable=False)
            finally:
                sink.close()
        except (OSError, WorkbenchError):
            return None
        linked = {path for members in self.links.values() for path in members}
        return Ahead(path, {
            path: (look[:_TAR], look[_START], look[_LENGTH]) for path, look in self.now.items()
            if look[_TAR] == len(self.tars) and look[_CTIME] < stable * 1e9
            and not stat.S_ISDIR(look[_MODE]) and not _was_whiteout(look)
            # A name that was written as a link to another may be the first one now.
            and (path not in linked or look[_LENGTH] > look[_SIZE] > 0)
        }, found)  # fmt: skip


class _Folders:
    """Files by path, one folder after the other as in a walk, none of them led out of the tree."""

    def __init__(self, tree: str) -> None:
        self._root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._path, self._at = b"", os.dup(self._root)

    def __enter__(self) -> _Folders:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._at)
        os.close(self._root)

    def look(self, path: bytes, is_folder: bool) -> tuple[int, bytes, os.stat_result]:
        """The descriptor of the folder that a path is in (of a folder its own), its name, lstat(2)."""
        parent, _, name = path.rpartition(b"/")
        folder = path if is_folder else parent
        if folder != self._path:
            fd = below(self._root, folder, os.O_RDONLY | os.O_DIRECTORY)
            os.close(self._at)
            self._path, self._at = folder, fd
        found = os.fstat(self._at) if is_folder else os.stat(name, dir_fd=self._at, follow_symlinks=False)
        return self._at, name, found


def _was_whiteout(old: list[int]) -> bool:
    return stat.S_ISCHR(old[_MODE])


def pieces(raw: bytes, at: int, name: bytes, found: os.stat_result, *, folder_time: bool) -> Iterator[bytes]:
    """What a file is in a tar, without what links and marks add. folder_time: leave out a folder's time."""
    for entry, fd in layer.entries(raw, at, name, found, {}, {}):
        if folder_time:
            entry.mtime = 0
        yield tar.header(entry)
        left = entry.size
        while left:
            data = os.read(fd, min(left, tar.CHUNK))
            if not data:
                return
            left -= len(data)
            yield data
        if entry.size % tar.BLOCK:
            yield bytes(-entry.size % tar.BLOCK)
        if folder_time:
            return


def _without_time(header: bytes) -> bytes:
    """A folder's header as it would be with the time 0."""
    fd = os.memfd_create("header")
    try:
        os.write(fd, header + bytes(2 * tar.BLOCK))
        os.lseek(fd, 0, os.SEEK_SET)
        entry = next(iter(tar.Reader(fd)))
    finally:
        os.close(fd)
    entry.mtime = 0
    return tar.header(entry)


def shown_pieces(raw: bytes, shown: Shown, *, times: bool = True) -> Iterator[bytes]:
    """``pieces`` of what a view shows at a path, without a folder's time. times: with that of others."""
    assert shown.found is not None
    fd = os.open(shown.path if shown.is_folder else os.path.dirname(shown.path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        name = os.fsencode(os.path.basename(shown.path))
        yield from pieces(raw, fd, name, shown.found, folder_time=shown.is_folder or not times)
    finally:
        os.close(fd)


def equal(one: Iterable[bytes], other: Iterable[bytes]) -> bool:
    """Whether two files are the same in all that a layer holds of them, by their ``pieces``."""
    try:
        return all(a == b for a, b in zip(one, other, strict=True))
    except ValueError:
        return False


def _same_as_below(raw: bytes, at: int, name: bytes, found: os.stat_result, below: Shown) -> bool:
    """Whether a copy has changed nothing; of folders their time does not count."""
    assert below.found is not None
    folder = stat.S_ISDIR(found.st_mode)
    if not folder:
        if (below.found.st_mtime_ns, below.found.st_size) != (found.st_mtime_ns, found.st_size):
            return False
        if found.st_nlink > 1:
            return False
    return equal(pieces(raw, at, name, found, folder_time=folder), shown_pieces(raw, below))
