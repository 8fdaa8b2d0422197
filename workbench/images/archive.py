"""Images in one file: the OCI image layout as a tar or a folder, and what ``docker save`` writes.

Sources: OCI image spec (image-layout.md, manifest.md, layer.md); Docker's image specification v1.2. Nothing in an
archive is trusted: every blob is held against its digest, every layer against the ``diff_id`` of the config, and
what it unpacks to is laid out by ``Store.add_tar``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from workbench.images import config
from workbench.images.files import clear_errors
from workbench.images.store import Store
from workbench.model import Corrupt, HostLacks, Image, InvalidInput, NotFound

_TRIED = "read an image's archive"
_CHUNK = 1 << 20
#: Files of an archive: a layer is one, and overlayfs takes some hundred.
_MEMBERS = 10_000
_ALONG = 64 << 20  # bytes of a file that comes along
#: Bytes of the disk that stay free.
_SPARE = 256 << 20
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


def load(store: Store, path: Path | str, ref: str = "") -> Image:
    """Take the image of an archive into the store.

    ref: which one, where it holds several (the annotation ``org.opencontainers.image.ref.name``, or Docker's
    name:tag). Raises NotFound, InvalidInput, Corrupt, HostLacks; in none of these cases anything stays but layers
    that nothing names, which gc takes.
    """
    path = Path(path)
    with clear_errors(_TRIED, str(path)), _open(path) as source:
        try:
            if source.has("index.json"):
                data, layers = _of_layout(source, ref)
            elif source.has("manifest.json"):
                data, layers = _of_docker(source, ref)
            else:
                raise InvalidInput(_TRIED, f"{path} holds neither index.json nor manifest.json", "give an OCI archive")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise Corrupt(_TRIED, f"{path}: its manifest is malformed ({error!r})", "get it again") from None
        wanted = config.decode(data).diff_ids
        if len(wanted) != len(layers):
            raise Corrupt(_TRIED, f"the config names {len(wanted)} layers, the manifest {len(layers)}", "get it again")
        with store.lease(*wanted), store.staging() as staging:
            for diff_id, (name, digest) in zip(wanted, layers, strict=True):
                if not store.has_layer(diff_id):
                    tar = staging / "layer.tar"
                    _unpack(source, name, digest, tar)
                    store.add_tar(tar, diff_id)
            image = store.add_image(data)
            _take_ancestors(source, store, image)
            return image


def _take_ancestors(source: _Source, store: Store, image: Image) -> None:
    """The configs of the images that it stands on, where they lie beside it (``export``): its history."""
    for _ in range(_MEMBERS):
        if not image.parent or not source.has(_path(image.parent)):
            return
        try:
            image = store.add_image(_blob(source, image.parent))
        except (NotFound, InvalidInput):  # it is no config of ours, or stands on other layers
            return


def names(path: Path | str) -> list[str]:
    """What an archive calls its images, first its own order. Raises as ``load`` does."""
    with _open(Path(path)) as source:
        try:
            if source.has("index.json"):
                entries = _json(source, "index.json").get("manifests", [])
                return [
                    str(name) for entry in entries
                    if (name := entry.get("annotations", {}).get("org.opencontainers.image.ref.name"))
                ]  # fmt: skip
            return [str(name) for entry in _json(source, "manifest.json") for name in entry.get("RepoTags") or ()]
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(_TRIED, f"{path}: its manifest is malformed ({error!r})", "get it again") from None


def along(path: Path | str, folder: str) -> dict[str, bytes]:
    """The files that came along in an archive below a folder of it, by name; small ones only."""
    with _open(Path(path)) as source:
        return {name: source.read(folder + name, _ALONG) for name in source.names(folder)}


def _of_layout(source: _Source, ref: str) -> tuple[bytes, list[tuple[str, str]]]:
    entries = _json(source, "index.json").get("manifests", [])
    named = {entry.get("annotations", {}).get("org.opencontainers.image.ref.name", ""): entry for entry in entries}
    if ref and ref not in named:
        raise NotFound(_TRIED, f"it holds no {ref}", f"it has {', '.join(filter(None, named)) or 'one without a name'}")
    if not ref and len(entries) != 1:
        raise InvalidInput(_TRIED, f"it holds {len(entries)} images", f"name one of {', '.join(filter(None, named))}")
    entry = named[ref] if ref else entries[0]
    manifest = json.loads(_blob(source, entry["digest"]))
    while manifest.get("mediaType", entry.get("mediaType")) in _INDEXES or "manifests" in manifest:
        entry = _for_this_machine(manifest["manifests"])
        manifest = json.loads(_blob(source, entry["digest"]))
    layers = [(_path(layer["digest"]), layer["digest"]) for layer in manifest["layers"]]
    return _blob(source, manifest["config"]["digest"]), layers


def _of_docker(source: _Source, ref: str) -> tuple[bytes, list[tuple[str, str]]]:
    entries = _json(source, "manifest.json")
    found = [entry for entry in entries if not ref or ref in (entry.get("RepoTags") or ())]
    if len(found) != 1:
        names = [name for entry in entries for name in entry.get("RepoTags") or ()]
        raise InvalidInput(_TRIED, f"{len(found)} images of it fit", f"name one of {', '.join(names)}")
    return source.read(found[0]["Config"], config.MAX_SIZE), [(name, "") for name in found[0]["Layers"]]


def _for_this_machine(entries: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    for entry in entries:
        about = entry.get("platform", {})
        if (about.get("os"), about.get("architecture")) == ("linux", wanted):
            return entry
    raise NotFound(_TRIED, f"it holds no image for linux/{wanted}", "get one for this machine")


def _unpack(source: _Source, name: str, digest: str, target: Path) -> None:
    """A layer's blob as a plain tar; the blob is held against its digest, where there is one."""
    with source.open(name) as file, open(target, "wb") as out:
        checked = _Checked(file)
        room = shutil.disk_usage(target.parent).free - _SPARE
        for chunk in _plain(checked):
            room -= len(chunk)
            if room < 0:  # before the disk is full for everybody
                raise HostLacks(_TRIED, "its layers unpack to more than the disk has left", "free some, or distrust it")
            out.write(chunk)
        checked.rest()
    if digest and checked.digest != digest:
        raise Corrupt(_TRIED, f"blob {digest[:19]} is {checked.digest[:19]}", "get the archive again")


class _Checked:
    """A file whose bytes are hashed as they are read; ``peek`` once, before anything else."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._ahead = file, hashlib.sha256(), b""

    def peek(self, size: int) -> bytes:
        self._ahead = self.read(size)
        return self._ahead

    def read(self, size: int = -1) -> bytes:
        if self._ahead:
            cut = len(self._ahead) if size < 0 else size
            ahead, self._ahead = self._ahead[:cut], self._ahead[cut:]
            return ahead
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def rest(self) -> None:
        while self.read(_CHUNK):
            pass

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _plain(file: _Checked) -> Iterator[bytes]:
    """Decompressed by what the bytes themselves say (RFC 1952, RFC 8878): media types are often wrong."""
    head = file.peek(6)
    reader: Any = file
    if head[:2] == b"\x1f\x8b":
        reader = gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb")
    elif head[:4] == b"\x28\xb5\x2f\xfd":
        reader = _zstd(file)
    try:
        while data := reader.read(_CHUNK):
            yield data
    except (OSError, EOFError, ValueError, zlib.error, zstd_module().ZstdError) as error:
        raise Corrupt(_TRIED, f"a layer is broken ({error})", "get the archive again") from None


def zstd_module() -> Any:
    """The standard library's from Python 3.14 on, before that the same from PyPI."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd  # type: ignore[no-redef, unused-ignore]
    return zstd


def _zstd(file: _Checked) -> Any:
    return zstd_module().ZstdFile(file)


# Where it is read from


class _Source:
    """The files of an archive by name, wherever they lie."""

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def names(self, folder: str) -> list[str]:
        raise NotImplementedError

    def read(self, name: str, limit: int) -> bytes:
        with self.open(name) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidInput(_TRIED, f"{name} is larger than {limit} bytes")
        return data


class _Folder(_Source):
    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        try:
            fd = os.open(self._path / _inside(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Corrupt(_TRIED, f"it lacks {name}", "get the archive again") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Corrupt(_TRIED, f"{name} is no file", "do not trust it")
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
            raise InvalidInput(_TRIED, f"one of its headers takes {self.size} bytes", "do not trust it")
        return super()


class _Tar(_Source):
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        for member in archive:
            if len(self._members) >= _MEMBERS:
                raise InvalidInput(_TRIED, f"it holds more than {_MEMBERS} files", "get another archive")
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
            raise Corrupt(_TRIED, f"it lacks {name}", "get the archive again")
        file = self._archive.extractfile(member)
        assert file
        return file


@contextmanager
def _open(path: Path) -> Iterator[_Source]:
    if path.is_dir():
        yield _Folder(path)
        return
    if not path.exists():
        raise NotFound(_TRIED, f"there is no {path}", "correct the name")
    try:
        with tarfile.open(path, "r:", tarinfo=_Plain) as archive:
            yield _Tar(archive)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidInput(_TRIED, f"{path} is no tar archive ({error})", "give an OCI archive") from None


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InvalidInput(_TRIED, f"it names {name!r}, which leads out of it", "do not trust it")
    return name


def _json(source: _Source, name: str) -> Any:
    try:
        return json.loads(source.read(name, config.MAX_SIZE))
    except ValueError as error:
        raise Corrupt(_TRIED, f"{name} is no JSON ({error})", "get it again") from None


def _path(digest: str) -> str:
    if not config.DIGEST.fullmatch(digest):
        raise InvalidInput(_TRIED, f"{digest!r} is no sha256 digest", "get another archive")
    return f"blobs/sha256/{digest[7:]}"


def _blob(source: _Source, digest: str) -> bytes:
    data = source.read(_path(digest), config.MAX_SIZE)
    if config.digest_of(data) != digest:
        raise Corrupt(_TRIED, f"blob {digest[:19]} is not what its digest says", "get the archive again")
    return data
