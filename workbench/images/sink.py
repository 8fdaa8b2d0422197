"""Where the bytes of a layer's archive go."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

from workbench.images import tar
from workbench.images.aside import Aside
from workbench.model import Conflict


class Sink:
    """Where an archive's bytes go: through the hash, and into a file where one is wanted.

    A thread hashes and writes one piece while the next is gathered; both calls leave the interpreter's lock. Where a
    descriptor is given, bytes are added where it stands, and what becomes of them is for its owner to see to.
    """

    def __init__(self, out: str | int | None) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._path = out if isinstance(out, str) else None
        self._fd = os.open(out, flags, 0o600) if isinstance(out, str) else -1 if out is None else os.dup(out)
        self._done = False
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._aside = Aside("tar")
        self.size = 0

    def write(self, data: bytes) -> None:
        """The next bytes."""
        self._buffer += data
        if len(self._buffer) >= tar.CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._aside.start(self._pass_on, self._buffer)
        self.size += len(self._buffer)
        self._buffer = bytearray()

    def _pass_on(self, data: bytearray) -> None:
        self._hash.update(data)
        if self._fd >= 0:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]

    def content(self, fd: int, size: int, shown: bytes) -> None:
        """The whole content of an open file, which must be ``size`` bytes still."""
        left = size
        while left:
            data = os.read(fd, min(left, tar.CHUNK))
            if not data:
                raise Conflict("read a layer", f"/{os.fsdecode(shown)} changed meanwhile", "stop what writes to it")
            left -= len(data)
            self.write(data)

    def entry(self, entry: tar.Entry, fd: int, shown: bytes) -> int:
        """A header, and the content of an open file where it has some; the bytes that this takes."""
        header, padding = tar.header(entry), -entry.size % tar.BLOCK
        self.write(header)
        if entry.size:
            self.content(fd, entry.size, shown)
            self.write(bytes(padding))
        return len(header) + entry.size + padding

    def finish(self, *, durable: bool = True) -> dict[str, Any]:
        """All is there: ``diff_id`` and ``size``, durable when this returns unless that is not asked for."""
        self._flush()
        self._aside.wait()
        if self._path is not None and durable:
            os.fsync(self._fd)
        self._done = True
        return {"diff_id": "sha256:" + self._hash.hexdigest(), "size": self.size}

    def close(self) -> None:
        """Close the file; one that was not finished goes."""
        self._aside.close()
        if self._path is not None:
            unwanted = not self._done and stat.S_ISREG(os.fstat(self._fd).st_mode)
            if unwanted:
                os.unlink(self._path)
        if self._fd >= 0:
            os.close(self._fd)
