"""Files by hash: those that are here already, in a vendored folder, or fetched from where they are offered.

What is kept was checked against its sha256 and size while it came in; the folder needs no trust in its source.
Several are fetched at once, before their step needs them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from workbench.build.news import Progress
from workbench.model import Settings, format_size

if TYPE_CHECKING:
    import urllib3

#: How many files are fetched at once.
PARALLEL = 8
_CHUNK = 1 << 18
_INTERVAL = 1.0


@dataclass(frozen=True)
class File:
    """A file that a build takes. size: bytes; what: for people; offered: addresses, asked for when needed."""

    sha256: str
    size: int
    name: str
    what: str
    offered: Callable[[], Iterable[str]]


class Unavailable(Exception):
    """Files that cannot be had, each with the reason."""

    def __init__(self, missing: Sequence[tuple[File, str]]) -> None:
        super().__init__(", ".join(file.what for file, _ in missing))
        self.missing = list(missing)


class Fetcher:
    """Files below ``shelf`` under their sha256; ``staging`` holds what is on its way and is the caller's to remove.

    vendored: a folder that holds files under their own names; offline: nothing is fetched.
    """

    def __init__(
        self, shelf: Path, staging: Path, settings: Settings, progress: Progress, *,
        vendored: Path | None = None, offline: bool = False,
    ) -> None:  # fmt: skip
        self.shelf, self._staging, self._progress = shelf, staging, progress
        self._vendored, self._offline = vendored, offline
        self.web = Web(settings)
        self._pool = ThreadPoolExecutor(PARALLEL, "workbench-fetch")
        self._jobs: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()
        self._counts = {"files": 0, "bytes": 0, "of": 0, "size": 0}
        self._began = self._said = 0.0
        self._parts = 0
        self._ended = False

    def close(self) -> None:
        """Give up what is on its way."""
        self._ended = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def here(self, file: File) -> Path | None:
        """Where a file is, if it is here."""
        return self._shelved(file)

    def find(self, file: File) -> Path | None:
        """Where a file is, if it is here or in the vendored folder."""
        with suppress(Unreachable):
            return self._local(file)
        return None

    def adopt(self, path: Path) -> tuple[str, int]:
        """Keep a copy of a file that was made here: its sha256 and size (bytes)."""
        digest = _digest(path)
        part = self._part()
        shutil.copyfile(path, part)
        self._keep(part, digest)
        with self._lock:
            self._jobs.pop(digest, None)  # one that failed to fetch it
        return digest, path.stat().st_size

    def start(self, files: Iterable[File]) -> None:
        """Begin to fetch what is not here; ``take`` waits for it."""
        for file in files:
            with self._lock:
                if file.sha256 not in self._jobs:
                    if not self.here(file):
                        self._counts["of"] += 1
                        self._counts["size"] += file.size
                    self._began = self._began or time.monotonic()
                    self._jobs[file.sha256] = self._pool.submit(self._get, file)

    def take(self, files: Sequence[File]) -> dict[str, Path]:
        """Each file's path by sha256. Raises Unavailable."""
        self.start(files)
        found: dict[str, Path] = {}
        missing: list[tuple[File, str]] = []
        for file in files:
            try:
                found[file.sha256] = self._jobs[file.sha256].result()
            except Unreachable as error:
                missing.append((file, str(error)))
        if missing:
            for file, _ in missing:  # a later attempt asks again
                self._jobs.pop(file.sha256, None)
            raise Unavailable(missing)
        return found

    def told(self) -> str:
        """What was fetched, for people; empty when nothing was."""
        if not self._counts["files"]:
            return ""
        seconds = max(time.monotonic() - self._began, 0.001)
        size = self._counts["bytes"]
        return f"{self._counts['files']} files, {format_size(size)}, {format_size(int(size / seconds))}/s"

    # One file, in a thread

    def _get(self, file: File) -> Path:
        found = self._local(file)
        if found is not None:
            return found
        if self._offline:
            raise Unreachable(f"there is no {self._vendored / file.name}" if self._vendored else "it is not here")
        self._keep(self._download(file, self._part()), file.sha256)
        with self._lock:
            self._counts["files"] += 1
        self._tell(0)
        return self.shelf / file.sha256

    def _local(self, file: File) -> Path | None:
        if (target := self._shelved(file)) is not None:
            return target
        source = self._vendored / file.name if self._vendored else None
        if source is None or not source.is_file():
            return None
        part = self._part()
        shutil.copyfile(source, part)
        if _digest(part) != file.sha256:
            part.unlink()
            raise Unreachable(f"{source} has another content")
        return self._keep(part, file.sha256)

    def _shelved(self, file: File) -> Path | None:
        """The file on the shelf, as long as it should be: after a loss of power it may not be."""
        path = self.shelf / file.sha256
        try:
            return path if path.stat().st_size == file.size else None
        except FileNotFoundError:
            return None

    def _part(self) -> Path:
        """A name of one's own for what is on its way: the same file may be wanted twice at once."""
        with self._lock:
            self._parts += 1
            return self._staging / f"{self._parts}.part"

    def _keep(self, part: Path, sha256: str) -> Path:
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        return part.replace(self.shelf / sha256)

    def _download(self, file: File, part: Path) -> Path:
        reason = "nobody offers it"
        try:
            for address in file.offered():
                try:
                    return self._stream(file, address, part)
                except Unreachable as error:
                    reason = str(error)
        except Unreachable as error:
            reason = str(error)
        raise Unreachable(reason)

    def _stream(self, file: File, address: str, part: Path) -> Path:
        sha256, size = hashlib.sha256(), 0
        with self.web.open(address) as answer, open(part, "wb") as out:
            for chunk in self.web.chunks(answer, address):
                if self._ended:
                    raise Unreachable("the build was ended")
                sha256.update(chunk)
                size += len(chunk)
                if size > file.size:
                    break
                out.write(chunk)
                self._tell(len(chunk))
        if (size, sha256.hexdigest()) != (file.size, file.sha256):
            self._tell(-size)
            raise Unreachable(f"{shown(address)} has another content")
        return part

    def _tell(self, size: int) -> None:
        with self._lock:
            self._counts["bytes"] += size
            now = time.monotonic()
            if now - self._said < _INTERVAL:
                return
            self._said = now
            counts = dict(self._counts)
        speed = format_size(int(counts["bytes"] / max(now - self._began, 0.001)))
        self._progress(
            f"  fetching: {counts['files']} of {counts['of']} files, "
            f"{format_size(counts['bytes'])} of {format_size(counts['size'])}, {speed}/s"
        )


class Unreachable(Exception):
    """Why something cannot be had from somewhere, as one line."""


class Web:
    """HTTP with the host's certificates and proxies. Safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._bundle = next((source for source, _ in settings.files), None)
        self._proxies = {
            name.lower().removesuffix("_proxy"): value
            if "://" in value or name.lower() == "no_proxy"
            else f"http://{value}"
            for name, value in settings.env
            if name.lower().endswith("_proxy")
        }
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def open(self, address: str, **headers: str) -> Any:
        """The answer to a GET, to be read piecemeal and closed. Raises Unreachable."""
        import urllib3

        plain, login = _without_login(address)
        if login:
            headers |= urllib3.make_headers(basic_auth=login)
        try:
            answer = self._pool(plain).request("GET", plain, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"{shown(address)} cannot be reached ({_why(error)})") from None
        if answer.status != 200:
            answer.drain_conn()
            raise Unreachable(f"{shown(address)} answers {answer.status}")
        return answer

    def size(self, address: str) -> int:
        """Bytes of what is there, by reading it."""
        with self.open(address) as answer:
            return sum(len(chunk) for chunk in self.chunks(answer, address))

    def chunks(self, answer: Any, address: str) -> Iterator[bytes]:
        """The body; a broken connection is Unreachable."""
        import urllib3

        try:
            yield from answer.stream(_CHUNK)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f"{shown(address)} broke off ({_why(error)})") from None

    def text(self, address: str, limit: int = 64 << 20, **headers: str) -> tuple[str, str]:
        """A document and its content type."""
        with self.open(address, **headers) as answer:
            data = b""
            for chunk in self.chunks(answer, address):
                data += chunk
                if len(data) > limit:
                    raise Unreachable(f"{shown(address)} is larger than {format_size(limit)}")
            return data.decode("utf-8", "replace"), answer.headers.get("content-type", "")

    def _pool(self, address: str) -> urllib3.PoolManager:
        import urllib3

        parts = urlsplit(address)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all") or ""
        bypass = {"no": self._proxies.get("no", "")}
        if proxy and urllib.request.proxy_bypass_environment(parts.netloc, bypass):  # type: ignore[attr-defined]
            proxy = ""
        with self._lock:
            if proxy not in self._pools:
                again = urllib3.Retry(3, backoff_factor=0.5, status_forcelist=(500, 502, 503), raise_on_status=False)
                timeout = urllib3.Timeout(connect=10, read=60)
                options: dict[str, Any] = {"maxsize": PARALLEL, "timeout": timeout, "retries": again}
                if self._bundle:
                    options["ca_certs"] = self._bundle
                plain, login = _without_login(proxy)
                if login:
                    options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=login)
                self._pools[proxy] = urllib3.ProxyManager(plain, **options) if proxy else urllib3.PoolManager(**options)
            return self._pools[proxy]


def _without_login(address: str) -> tuple[str, str]:
    """An address without the name and password in it, and those."""
    parts = urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    return (urlunsplit(parts._replace(netloc=host)), unquote(login)) if at else (address, "")


def shown(address: str) -> str:
    """An address as it may be printed: nobody's password."""
    return _without_login(address)[0].partition("?")[0].partition("#")[0]


def _why(error: Exception) -> str:
    """The innermost reason of urllib3's nested ones."""
    inner: Any = error
    while getattr(inner, "reason", None) is not None and isinstance(inner.reason, Exception):
        inner = inner.reason
    return str(inner).rpartition(": ")[2][:200] or type(inner).__name__


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
