"""A list on the disk: for what an archive may make longer than memory is to hold."""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


class Spool:
    """Values of Python's plain types, put down one after another and read once from the first.

    Its file has no name and goes with the process. marshal is what neither costs an import nor asks for types of ours,
    and it reads its own bytes alone here.
    """

    def __init__(self, folder: str) -> None:
        """folder: on whose disk they are to lie. Raises OSError, as ``append`` does."""
        path = os.path.join(folder, f".spool-{os.urandom(8).hex()}")
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b")
        os.unlink(path)

    def append(self, value: Any) -> None:
        """The last of them, so far."""
        self._file.write(marshal.dumps(value))

    def __iter__(self) -> Iterator[Any]:
        self._file.seek(0)
        while True:
            try:
                value = marshal.load(self._file)
            except EOFError:
                return
            yield value

    def close(self) -> None:
        """Nothing of it stays."""
        with suppress(OSError):  # a full disk has no room for what is no longer needed
            self._file.close()
