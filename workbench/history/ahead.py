"""What of a container's files is read while it still runs, so that it stands still for a look and little more.

A file whose look (inode, ctime, size, mode) is the same when everything stands still is in the tar as it was read
ahead. Three things make that certain. The look comes first, then the file system is synchronised, then the file is
read: who writes through memory afterwards finds its pages clean and so changes the ctime, and what was written before
is read. A file whose ctime is too young to tell two changes apart is not reused. And whatever goes wrong in a tree
that changes meanwhile only means that all is read again.
"""

from __future__ import annotations

import os
from typing import Any

from workbench.images import tar
from workbench.images.sink import Sink

#: Of an entry here: what a look tells (as in an index), then where its form lies in the tar that was written ahead.
Known = dict[str, tuple[list[int], int, int]]


class Ahead:
    """A whole tar that was written ahead, and which parts of it may be used."""

    def __init__(self, path: str, known: Known, found: dict[str, Any]) -> None:
        self.path, self.known, self.found = path, known, found

    def part(self, path: str, look: list[int]) -> tuple[int, int] | None:
        """Where a file's form lies (start, length) if it looks as it did; else None."""
        then = self.known.get(path)
        return then[1:] if then is not None and then[0] == look else None


class Assembly:
    """A tar put together from parts that were read ahead and from what is read now; takes what a ``Sink`` takes."""

    def __init__(self, ahead: Ahead, out: str) -> None:
        self._ahead, self._out = ahead, out
        self._now_path = f"{out}.now"
        self._now = Sink(self._now_path)
        self._now_size = 0
        self._parts: list[tuple[bool, int, int]] = []  # is it new, start, length

    def entry(self, entry: tar.Entry, fd: int, shown: bytes) -> int:
        """As ``Sink.entry``."""
        length = self._now.entry(entry, fd, shown)
        self._add(True, self._now_size, length)
        self._now_size += length
        return length

    def write(self, data: bytes) -> None:
        """As ``Sink.write``."""
        self._now.write(data)
        self._add(True, self._now_size, len(data))
        self._now_size += len(data)

    def reuse(self, start: int, length: int) -> None:
        """The next part is what was read ahead."""
        self._add(False, start, length)

    def _add(self, new: bool, start: int, length: int) -> None:
        if self._parts:
            was_new, was_start, was_length = self._parts[-1]
            if was_new == new and was_start + was_length == start:
                self._parts[-1] = new, was_start, was_length + length
                return
        self._parts.append((new, start, length))

    def finish(self) -> dict[str, Any]:
        """As ``Sink.finish``. What was written ahead is the tar itself when nothing has changed since."""
        self._now.finish(durable=False)
        with open(self._now_path, "rb") as now, open(self._ahead.path, "r+b") as ahead:
            files = {True: now.fileno(), False: ahead.fileno()}
            if self._unchanged(files):
                os.fsync(ahead.fileno())
                os.rename(self._ahead.path, self._out)
                return self._ahead.found
            sink = Sink(self._out)
            try:
                for new, start, length in self._parts:
                    os.lseek(files[new], start, os.SEEK_SET)
                    sink.content(files[new], length, b"")
                return sink.finish()
            finally:
                sink.close()

    def _unchanged(self, files: dict[bool, int]) -> bool:
        at, size = 0, int(self._ahead.found["size"])
        for new, start, length in self._parts:
            if new:
                if length > tar.CHUNK or os.pread(files[True], length, start) != os.pread(files[False], length, at):
                    return False
            elif start != at:
                return False
            at += length
        return at == size

    def close(self) -> None:
        """Nothing stays but the tar."""
        self._now.close()
        for path in (self._now_path, self._ahead.path):
            if os.path.exists(path):
                os.unlink(path)
