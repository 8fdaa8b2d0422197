"""The files of an archive by name, wherever they lie: in a folder or a tar, plain or compressed. None is trusted."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from workbench.images.tree import below
from workbench.model import Corrupt, HostLacks, InvalidInput, NotFound

TRIED = "read an image's archive"
#: Files of an archive: a layer is one, and overlayfs takes some hundred.
MEMBERS = 10_000
#: Bytes of extended headers in all.
_EXTENDED = 16 << 20
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
    with ExitStack() as stack:
        stack.enter_context(file)
        folder = stack.enter_context(staging())
        if packed(file.read(4)):
            plain = folder / "archive.tar"
            file.seek(0)
            unpack(Checked(file), plain)
            file = stack.enter_context(open(plain, "rb"))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Plain) as archive:
                source = _Tar(archive, file)
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            raise InvalidInput(
                TRIED, f"{os.path.basename(path)} is no tar archive ({error})", "give an OCI archive"
            ) from None
        yield source


def unpack(checked: Checked, target: Path, meanwhile: Callable[[], None] | None = None) -> None:
    """A file's bytes, decompressed if they are, into another. Raises HostLacks, Corrupt.

    meanwhile: called for each megabyte; what it raises ends it.
    """
    with open(target, "wb") as out:
        for chunk in _plain(checked):
            if shutil.disk_usage(target.parent).free - len(chunk) < _SPARE:  # before the disk is full for everybody
                raise HostLacks(TRIED, "it unpacks to more than the disk has left", "free some, or distrust it")
            out.write(chunk)
            if meanwhile:
                meanwhile()
    checked.rest(meanwhile)


class Source:
    """The files of one archive."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        """A file of it. Raises Corrupt when there is none, InvalidInput for a name that leads out."""
        raise NotImplementedError

    def place(self, name: str) -> tuple[int, int]:
        """A descriptor that stands at the first byte of a file of it, the caller's to close, and its size.

        Raises as ``open`` does.
        """
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
    """Nothing is reached through a link."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _open(self, name: str, flags: int) -> int:
        root = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return below(root, os.fsencode(name), flags)
        finally:
            os.close(root)

    def has(self, name: str) -> bool:
        try:
            fd = self._open(name, os.O_PATH)
        except OSError:
            return False
        os.close(fd)
        return True

    def open(self, name: str) -> IO[bytes]:
        try:
            fd = self._open(_inside(name), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            raise Corrupt(TRIED, f"it lacks {name}", "get the archive again") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Corrupt(TRIED, f"{name} is no file", "do not trust it")
        return open(fd, "rb")

    def place(self, name: str) -> tuple[int, int]:
        with self.open(name) as file:
            fd = os.dup(file.fileno())
        return fd, os.fstat(fd).st_size

    def names(self, folder: str) -> list[str]:
        try:
            fd = self._open(folder.rstrip("/"), os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)


class _Plain(tarfile.TarInfo):
    """A header whose extensions (pax(1)) are not read into memory when they are larger than any in use."""

    def _proc_pax(self, archive: tarfile.TarFile) -> Any:
        return self._small(archive)._proc_pax(archive)

    def _proc_gnulong(self, archive: tarfile.TarFile) -> Any:
        return self._small(archive)._proc_gnulong(archive)

    def _small(self, archive: Any) -> Any:
        held = archive.extended = getattr(archive, "extended", 0) + self.size
        if held > _EXTENDED:
            raise InvalidInput(TRIED, f"its headers take {held} bytes", "do not trust it")
        return super()


@dataclass(frozen=True, slots=True)
class _Member:
    """What is kept of a header. link: the name of another member, for links."""

    start: int
    size: int
    plain: bool
    link: str


class _Tar(Source):
    def __init__(self, archive: tarfile.TarFile, file: IO[bytes]) -> None:
        self._file = file
        self._members: dict[str, _Member] = {}
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all, with all that they say
            if len(self._members) >= MEMBERS:
                raise InvalidInput(TRIED, f"it holds more than {MEMBERS} files", "get another archive")
            if member.issparse():
                raise InvalidInput(TRIED, f"{member.name[:80]} is sparse, as no file of an image is", "do not trust it")
            link = ""
            if member.islnk() or member.issym():
                above = os.path.dirname(member.name) if member.issym() else ""
                link = os.path.normpath(os.path.join(above, member.linkname))
            self._members[os.path.normpath(member.name)] = _Member(
                member.offset_data, member.size, member.isfile(), link
            )

    def has(self, name: str) -> bool:
        return name in self._members

    def names(self, folder: str) -> list[str]:
        found = [name[len(folder) :] for name in self._members if name.startswith(folder)]
        return sorted(name for name in found if name and "/" not in name)

    def open(self, name: str) -> IO[bytes]:
        member = self._member(name)
        return cast(IO[bytes], io.BufferedReader(_Part(self._file, member.start, member.size)))

    def place(self, name: str) -> tuple[int, int]:
        member = self._member(name)
        # By the descriptor that is being read: its name may mean another file by now.
        fd = os.open(f"/proc/self/fd/{self._file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(fd, member.start, os.SEEK_SET)
        return fd, member.size

    def _member(self, name: str) -> _Member:
        member = self._members.get(os.path.normpath(_inside(name)))
        if member is not None and member.link:  # Docker writes a layer that it has twice as a link
            member = self._members.get(member.link)
        if member is None or not member.plain:
            raise Corrupt(TRIED, f"it lacks {name}", "get the archive again")
        return member


class _Part(io.RawIOBase):
    """A piece of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._at, self._end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._file.fileno(), min(len(buffer), self._end - self._at), self._at)
        if not data and self._at < self._end:
            raise Corrupt(TRIED, "it ends early", "get the archive again")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidInput(TRIED, f"it names {name!r}, which leads out of it", "do not trust it")
    return name


class Checked:
    """A file whose bytes are hashed as they are read; ``peek`` once, before anything else."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._ahead = file, hashlib.sha256(), b""
        self.size = 0  # bytes read so far

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
        self.size += len(data)
        self._hash.update(data)
        return data

    def rest(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Hash what was not read. meanwhile: as of ``unpack``."""
        while self.read(_CHUNK):
            if meanwhile:
                meanwhile()

    @property
    def digest(self) -> str:
        """Of what was read so far."""
        return f"sha256:{self._hash.hexdigest()}"


def _plain(file: Checked) -> Iterator[bytes]:
    """Decompressed by what the bytes themselves say (RFC 1952, RFC 8878): media types are often wrong."""
    kind = packed(file.peek(4))
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


def packed(head: bytes) -> str:
    """How a file is compressed, by its first four bytes; empty for one that is not."""
    return "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else ""
