"""Which layer a step made: one small file for each key, and a lock so that no step is built twice at once.

::

    cache/<key>.json    the layer and what it took; useless, and overwritten, once the layer is gone
    cache/<key>.lock    held (flock(2)) while the step is built
    cache/logs/         the logs of steps that failed
    cache/downloads/    files by sha256, uv's own cache of what it read, bytecode; shared by builds, which hold its lock
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench.linux import userns

_ABANDONED = 3600.0  # seconds after which nobody is still writing a small file


class Cache:
    """The build cache of one store."""

    def __init__(self, home: str | Path) -> None:
        self.folder = Path(home) / "cache"
        self.logs = self.folder / "logs"
        self._downloads = self.folder / "downloads"
        for folder in (self.folder, self.logs, self._downloads):
            folder.mkdir(0o700, parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """What is known under a key; None when nothing, or nothing readable, is."""
        try:
            value = json.loads((self.folder / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(value, dict) and all(name in value for name in ("diff_id", "epoch", "lock"))
        return value if whole else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Remember, by an atomic rename; losing it in a crash costs a rebuild and nothing else."""
        path = self.folder / f"{key}.json"
        new = self.folder / f"{key}.{os.getpid()}.new"
        new.write_text(json.dumps(value))
        new.rename(path)

    @contextmanager
    def lock(self, key: str, wait: Callable[[], None]) -> Iterator[None]:
        """Hold a key's lock; ``wait`` is called once when somebody else holds it now."""
        path = self.folder / f"{key}.lock"
        fd = self._take(path, wait)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.close(fd)

    @staticmethod
    def _take(path: Path, wait: Callable[[], None]) -> int:
        while True:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    wait()
                    fcntl.flock(fd, fcntl.LOCK_EX)
                # The last holder removed the file: what we hold then is nobody's lock any more.
                if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def prune(self, has_layer: Callable[[str], bool]) -> None:
        """Forget steps whose layer is gone, and leftovers of builds that were killed."""
        for path in self.folder.glob("*.json"):
            known = self.get(path.stem)
            if known is None or not has_layer(known["diff_id"]):
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*.new"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    @contextmanager
    def downloads(self) -> Iterator[Path]:
        """The folder with ``sha256/`` and ``uv/``, for as long as a build uses it; nobody drops it meanwhile."""
        fd = os.open(self._downloads, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            files = self._downloads / "files"
            for name in ("sha256", "uv"):
                (files / name).mkdir(0o700, parents=True, exist_ok=True)
            yield files
        finally:
            os.close(fd)

    def drop_downloads(self) -> int:
        """Empty it, which only saves downloads; bytes that went, 0 while a build uses it."""
        fd = os.open(self._downloads, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = sum(
                os.lstat(os.path.join(folder, name)).st_size
                for folder, _, names in os.walk(self._downloads) for name in names
            )  # fmt: skip
            if size:
                userns.call("workbench.images.layer:remove", str(self._downloads / "files"))
            return size
        except BlockingIOError:
            return 0
        finally:
            os.close(fd)
