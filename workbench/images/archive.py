"""Images in one file: the OCI image layout as a tar or a folder, and what ``docker save`` writes.

Sources: OCI image spec (image-layout.md, manifest.md, layer.md); Docker's image specification v1.2. Nothing in an
archive is trusted: every blob is held against its digest, every layer against the ``diff_id`` of the config, and
what it unpacks to is laid out by ``Store.add_tar``.
"""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from workbench.images import config, together
from workbench.images.files import clear_errors
from workbench.images.source import MEMBERS, TRIED, Checked, Source, opened, packed, unpack
from workbench.images.store import Store
from workbench.images.together import GoOn
from workbench.model import Corrupt, HostLacks, Image, InvalidInput, Meter, NotFound

_ALONG = 64 << 20  # bytes of a file that comes along
#: Bytes of memory for all that lay out layers together, for a stranger's archive says how much that takes: some 50
#: for each name of a layer's largest folder, and 300 for each file with several names.
_MEMORY = 192 << 20
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_SHOWN = 10  # names in an error


class _Annotations(msgspec.Struct):
    name: str = msgspec.field(name="org.opencontainers.image.ref.name", default="")


class _Platform(msgspec.Struct):
    os: str = ""
    architecture: str = ""


class _Descriptor(msgspec.Struct, rename="camel"):
    """descriptor.md. What is not said here is passed over without being kept, however much it is."""

    digest: str
    size: int | None = None
    media_type: str = ""
    annotations: _Annotations | None = None
    platform: _Platform | None = None

    @property
    def name(self) -> str:
        return self.annotations.name if self.annotations else ""


class _Document(msgspec.Struct, rename="camel"):
    """An index or a manifest: media types are often missing."""

    media_type: str = ""
    manifests: list[_Descriptor] | None = None
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None


class _Docker(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _Layer(NamedTuple):
    """A layer's name in the archive, and the digest and size of that blob where they are known."""

    name: str
    digest: str = ""
    size: int | None = None


_T = TypeVar("_T")


def load(store: Store, path: Path | str, ref: str = "") -> Image:
    """Take the image of an archive into the store, as ``take`` does."""
    with opened(path, store.staging) as source:
        return take(store, source, ref)


def take(store: Store, source: Source, ref: str = "", meter: Meter | None = None) -> Image:
    """Take the image of an opened archive into the store.

    ref: which one, where it holds several (the annotation ``org.opencontainers.image.ref.name``, or Docker's
    name:tag); meter: is told how far it is, and may end it. Raises NotFound, InvalidInput, Corrupt, HostLacks; in none
    of these cases anything stays but layers that nothing names, which gc takes.
    """
    with clear_errors(TRIED, str(store.home)), _well_formed():
        if source.has("index.json"):
            data, layers = _of_layout(source, ref)
        elif source.has("manifest.json"):
            data, layers = _of_docker(source, ref)
        else:
            raise InvalidInput(TRIED, "it holds neither index.json nor manifest.json", "give an OCI archive")
        wanted = config.decode(data).diff_ids
        if len(wanted) != len(layers):
            raise Corrupt(TRIED, f"the config names {len(wanted)} layers, the manifest {len(layers)}", "get it again")
    with clear_errors(TRIED, str(store.home)), store.lease(*wanted), store.staging() as staging:
        missing: dict[str, _Layer] = {}
        for diff_id, blob in zip(wanted, layers, strict=True):
            if not store.has_layer(diff_id):
                missing.setdefault(diff_id, blob)
        _lay_out(store, source, missing, staging, meter)
        image = store.add_image(data)
        _take_ancestors(source, store, image)
        return image


@contextmanager
def _well_formed() -> Iterator[None]:
    """JSON that is not of the shape that the specification says."""
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(TRIED, f"its manifest is malformed ({error})", "get it again") from None


def _take_ancestors(source: Source, store: Store, image: Image) -> None:
    """The configs of the images that it stands on, where they lie beside it (``export``): its history."""
    for _ in range(MEMBERS):
        if not image.parent or not source.has(_path(image.parent)):
            return
        try:
            image = store.add_image(_blob(source, _Descriptor(image.parent)))
        except (NotFound, InvalidInput, Corrupt):  # it is no config, or stands on other layers
            return


def names(source: Source) -> list[str]:
    """What an archive calls its images, first its own order. Raises as ``take`` does."""
    with _well_formed():
        if source.has("index.json"):
            return [entry.name for entry in _index(source) if entry.name]
        return [name for entry in _dockers(source) for name in entry.repo_tags or ()]


def along(source: Source, folder: str, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The files that came along in an archive below a folder of it, by name, if that is ``wanted``.

    Raises InvalidInput when they are large.
    """
    found: dict[str, bytes] = {}
    left = _ALONG
    for name in source.names(folder):
        if wanted.fullmatch(name):
            found[name] = source.read(folder + name, left)
            left -= len(found[name])
    return found


def _index(source: Source) -> list[_Descriptor]:
    return _json(source.read("index.json", config.MAX_SIZE), _Document).manifests or []


def _dockers(source: Source) -> list[_Docker]:
    return _json(source.read("manifest.json", config.MAX_SIZE), list[_Docker])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more


def _of_layout(source: Source, ref: str) -> tuple[bytes, list[_Layer]]:
    entries = _index(source)
    named = [entry.name for entry in entries if entry.name]
    found = [entry for entry in entries if not ref or entry.name == ref]
    if not found and ref:
        raise NotFound(TRIED, f"it holds no {ref}", f"it has {_some(named) or 'one without a name'}")
    if len(found) != 1 and not ref:
        raise InvalidInput(TRIED, f"it holds {len(entries)} images", f"name one of {_some(named)}")
    entry = found[-1]
    while (manifest := _json(_blob(source, entry), _Document)).manifests is not None or (
        (manifest.media_type or entry.media_type) in _INDEXES
    ):
        entry = _for_this_machine(manifest.manifests or [])
    if manifest.config is None or manifest.layers is None:
        raise Corrupt(TRIED, "its manifest is malformed (it names no config or no layers)", "get it again")
    layers = [_Layer(_path(layer.digest), layer.digest, layer.size) for layer in manifest.layers]
    return _blob(source, manifest.config), layers


def _of_docker(source: Source, ref: str) -> tuple[bytes, list[_Layer]]:
    entries = _dockers(source)
    found = [entry for entry in entries if not ref or ref in (entry.repo_tags or ())]
    if len(found) != 1:
        names = [name for entry in entries for name in entry.repo_tags or ()]
        raise InvalidInput(TRIED, f"{len(found)} images of it fit", f"name one of {_some(names)}")
    return source.read(found[0].config, config.MAX_SIZE), [_Layer(name) for name in found[0].layers]


def _for_this_machine(entries: list[_Descriptor]) -> _Descriptor:
    wanted = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    for entry in entries:
        if entry.platform and (entry.platform.os, entry.platform.architecture) == ("linux", wanted):
            return entry
    raise NotFound(TRIED, f"it holds no image for linux/{wanted}", "get one for this machine")


def _lay_out(store: Store, source: Source, layers: dict[str, _Layer], staging: Path, meter: Meter | None) -> None:
    """Take layers, by their ``diff_id``, into the store: several at once, the largest first."""
    sizes = {diff_id: blob.size or 0 for diff_id, blob in layers.items()}  # Docker's archives name none
    unpacking, done = threading.Lock(), set[str]()

    def piece(diff_id: str, memory: int, go_on: GoOn) -> None:
        with clear_errors(TRIED, str(store.home)):
            _layer(store, source, layers[diff_id], diff_id, staging / diff_id[7:], unpacking, memory, go_on)
        done.add(diff_id)

    def tell(_number: int) -> None:
        if meter:
            meter("reading", sum(sizes[diff_id] for diff_id in list(done)), sum(sizes.values()))

    largest_first = sorted(sizes, key=sizes.__getitem__, reverse=True)
    share = _MEMORY // together.width()
    try:
        together.run([partial(piece, diff_id, share) for diff_id in largest_first], tell)
    except (HostLacks, MemoryError):  # there may be room for what one takes meanwhile, if not for what several do
        for diff_id in sizes.keys() - done:
            (staging / diff_id[7:]).unlink(missing_ok=True)
        rest = [diff_id for diff_id in sizes if diff_id not in done]
        try:
            together.run([partial(piece, diff_id, _MEMORY) for diff_id in rest], tell, most=1)
        except MemoryError:
            large = f"a layer takes more than {_MEMORY >> 20} MB of memory to lay out"
            raise InvalidInput(TRIED, large, "take it from somebody you trust, or of smaller layers") from None


def _layer(
    store: Store, source: Source, blob: _Layer, diff_id: str, unpacked: Path, unpacking: threading.Lock, memory: int,
    go_on: GoOn,
) -> None:  # fmt: skip
    """Take a layer from its blob, which is held against its digest and size, where they are known.

    unpacked: a new file for the plain tar of one that is compressed; another is read where it lies. unpacking: one at a
    time, for a stranger's archive says how much memory that takes.
    """
    name, digest = blob.name, blob.digest
    with source.open(name) as file:
        plain = not packed(file.read(4))
    if not plain or digest not in ("", diff_id):
        with source.open(name) as file:
            checked = Checked(file)
            with unpacking:
                unpack(checked, unpacked, go_on)
        _hold(checked, blob)
        store.add_tar(unpacked, diff_id, meanwhile=go_on, memory=memory)
        unpacked.unlink()
        return
    fd, length = source.place(name)
    try:
        if blob.size not in (None, length):
            raise Corrupt(TRIED, f"blob {digest[:19]} has {length} bytes, not {blob.size}", "get the archive again")
        store.add_tar(fd, diff_id, length, meanwhile=go_on, memory=memory)
    except (InvalidInput, Corrupt):
        with source.open(name) as file:  # damage is told from what was made so
            checked = Checked(file)
            checked.rest(go_on)
        _hold(checked, blob)
        raise
    finally:
        os.close(fd)


def _hold(checked: Checked, blob: _Layer) -> None:
    shown, again = f"blob {blob.digest[:19]}", "get the archive again"
    if blob.digest and checked.digest != blob.digest:
        raise Corrupt(TRIED, f"{shown} is {checked.digest[:19]}", again) from None
    if blob.size not in (None, checked.size):
        raise Corrupt(TRIED, f"{shown} has {checked.size} bytes, not {blob.size}", again) from None


def _json(data: bytes, kind: type[_T]) -> _T:
    return msgspec.json.decode(data, type=kind)


def _path(digest: str) -> str:
    if not config.DIGEST.fullmatch(digest):
        raise InvalidInput(TRIED, f"{digest[:100]!r} is no sha256 digest", "get another archive")
    return f"blobs/sha256/{digest[7:]}"


def _blob(source: Source, described: _Descriptor) -> bytes:
    digest = described.digest
    data = source.read(_path(digest), config.MAX_SIZE)
    if config.digest_of(data) != digest or described.size not in (None, len(data)):
        raise Corrupt(TRIED, f"blob {digest[:19]} is not what its digest and size say", "get the archive again")
    return data
