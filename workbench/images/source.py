"""The files of an archive by name, wherever they lie: in a folder or a tar, plain or compressed. None is trusted."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from workbench.images import config
from workbench.model import Corrupt, HostLacks, InvalidInput, NotFound

TRIED = "read an image's archive"
#: Files of an archive: a layer is one, and overlayfs takes some hundred.
MEMBERS = 10_000
_CHUNK = 1 << 20
#: Bytes of the disk that stay free.
_SPARE = 256 << 20


@contextmanager
def opened(path: Path | str, staging: Callable[[], AbstractContextManager[Path]]) -> Iterator[Source]:
    """The files of an archive. staging: gives a folder for the plain tar of one that is compressed as a whole
    (``docker save | gzip``), which is read here and there.

    Raises NotFound, InvalidInput, Corrupt, HostLacks without space.
    """
    path = Path(path)
    if path.is_dir():
        yield _Folder(path)
        return
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise NotFound(TRIED, f"there is no {path}", "correct the name") from None
    with file, staging() as folder:
        if _packed(file.read(4)):
            path = folder / "archive.tar"
            file.seek(0)
            unpack(Checked(file), path)
        try:
            with tarfile.open(path, "r:", tarinfo=_Plain) as archive:
                yield _Tar(archive)
        except (tarfile.TarError, EOFError) as error:
            raise InvalidInput(TRIED, f"{path} is no tar archive ({error})", "give an OCI archive") from None


def unpack(checked: Checked, target: Path) -> None:
    """A file's bytes, decompressed if they are, into another. Raises HostLacks, Corrupt."""
    room = shutil.disk_usage(target.parent).free - _SPARE
    with open(target, "wb") as out:
        for chunk in _plain(checked):
            room -= len(chunk)
            if room < 0:  # before the disk is full for everybody
                raise HostLacks(TRIED, "it unpacks to more than the disk has left", "free some, or distrust it")
            out.write(chunk)
    checked.rest()


class Source:
    """The files of one archive."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        """A file of it. Raises Corrupt when there is none, InvalidInput for a name that leads out."""
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        """The names in a folder, which ends in ``/``, sorted."""
        raise NotImplementedError

    def read(self, name: str, limit: int) -> bytes:
        """All of a file. Raises InvalidInput when it is larger than ``limit`` bytes."""
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidInput(TRIED, f"{name} is larger than {limit} bytes")
        return data


class _Folder(Source):
    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        try:
            fd = os.open(self._path / _inside(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Corrupt(TRIED, f"it lacks {name}", "get the archive again") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Corrupt(TRIED, f"{name} is no file", "do not trust it")
        return open(fd, "rb")

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path / folder))
        except OSError:
            return []


class _Plain(tarfile.TarInfo):
    """A header whose extensions (pax(1)) are not read into memory when they are larger than any in use."""

    def _proc_pax(self, archive: tarfile.TarFile) -> Any:
        return self._small()._proc_pax(archive)

    def _proc_gnulong(self, archive: tarfile.TarFile) -> Any:
        return self._small()._proc_gnulong(archive)

    def _small(self) -> Any:
        if self.size > config.MAX_SIZE:
            raise InvalidInput(TRIED, f"one of its headers takes {self.size} bytes", "do not trust it")
        return super()


class _Tar(Source):
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        for member in archive:
            if len(self._members) >= MEMBERS:
                raise InvalidInput(TRIED, f"it holds more than {MEMBERS} files", "get another archive")
            self._members[os.path.normpath(member.name)] = member

    def has(self, name: str) -> bool:
        return name in self._members

    def names(self, folder: str) -> list[str]:
        found = [name[len(folder) :] for name in self._members if name.startswith(folder)]
        return sorted(name for name in found if name and "/" not in name)

    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(os.path.normpath(_inside(name)))
        # Docker writes a layer that it has twice as a link.
        if member is not None and (member.islnk() or member.issym()):
            above = os.path.dirname(member.name) if member.issym() else ""
            member = self._members.get(os.path.normpath(os.path.join(above, member.linkname)))
        if member is None or not member.isfile():
            raise Corrupt(TRIED, f"it lacks {name}", "get the archive again")
        file = self._archive.extractfile(member)
        assert file
        return file


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidInput(TRIED, f"it names {name!r}, which leads out of it", "do not trust it")
    return name


class Checked:
    """A file whose bytes are hashed as they are read; ``peek`` once, before anything else."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._ahead = file, hashlib.sha256(), b""

    def peek(self, size: int) -> bytes:
        """Its first bytes, which are read again."""
        self._ahead = self.read(size)
        return self._ahead

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        if self._ahead:
            cut = len(self._ahead) if size < 0 else size
            ahead, self._ahead = self._ahead[:cut], self._ahead[cut:]
            return ahead
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def rest(self) -> None:
        """Hash what was not read."""
        while self.read(_CHUNK):
            pass

    @property
    def digest(self) -> str:
        """Of what was read so far."""
        return f"sha256:{self._hash.hexdigest()}"


def _plain(file: Checked) -> Iterator[bytes]:
    """Decompressed by what the bytes themselves say (RFC 1952, RFC 8878): media types are often wrong."""
    kind = _packed(file.peek(4))
    reader: Any = file
    if kind == "gzip":
        reader = gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb")
    elif kind == "zstd":
        reader = zstd_module().ZstdFile(file)
    try:
        while data := reader.read(_CHUNK):
            yield data
    except (OSError, EOFError, ValueError, zlib.error, zstd_module().ZstdError) as error:
        raise Corrupt(TRIED, f"it is broken ({error})", "get the archive again") from None


def zstd_module() -> Any:
    """The standard library's from Python 3.14 on, before that the same from PyPI."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd  # type: ignore[no-redef, unused-ignore]
    return zstd


def _packed(head: bytes) -> str:
    return "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else ""
