"""Images in one file: the OCI image layout as a tar or a folder, and what ``docker save`` writes.

Sources: OCI image spec (image-layout.md, manifest.md, layer.md); Docker's image specification v1.2. Nothing in an
archive is trusted: every blob is held against its digest, every layer against the ``diff_id`` of the config, and
what it unpacks to is laid out by ``Store.add_tar``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.images import config
from workbench.images.files import clear_errors
from workbench.images.source import MEMBERS, TRIED, Checked, Source, opened, unpack
from workbench.images.store import Store
from workbench.model import Corrupt, Image, InvalidInput, NotFound

_ALONG = 64 << 20  # bytes of a file that comes along
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


def load(store: Store, path: Path | str, ref: str = "") -> Image:
    """Take the image of an archive into the store, as ``take`` does."""
    with opened(path, store.staging) as source:
        return take(store, source, ref)


def take(store: Store, source: Source, ref: str = "") -> Image:
    """Take the image of an opened archive into the store.

    ref: which one, where it holds several (the annotation ``org.opencontainers.image.ref.name``, or Docker's
    name:tag). Raises NotFound, InvalidInput, Corrupt, HostLacks; in none of these cases anything stays but layers
    that nothing names, which gc takes.
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
        for diff_id, (name, digest) in zip(wanted, layers, strict=True):
            if not store.has_layer(diff_id):
                tar = staging / "layer.tar"
                _layer(source, name, digest, tar)
                store.add_tar(tar, diff_id)
        image = store.add_image(data)
        _take_ancestors(source, store, image)
        return image


@contextmanager
def _well_formed() -> Iterator[None]:
    """JSON that is not of the shape that the specification says."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise Corrupt(TRIED, f"its manifest is malformed ({error!r})", "get it again") from None


def _take_ancestors(source: Source, store: Store, image: Image) -> None:
    """The configs of the images that it stands on, where they lie beside it (``export``): its history."""
    for _ in range(MEMBERS):
        if not image.parent or not source.has(_path(image.parent)):
            return
        try:
            image = store.add_image(_blob(source, image.parent))
        except (NotFound, InvalidInput):  # it is no config of ours, or stands on other layers
            return


def names(source: Source) -> list[str]:
    """What an archive calls its images, first its own order. Raises as ``take`` does."""
    with _well_formed():
        if source.has("index.json"):
            entries = _json(source, "index.json").get("manifests", [])
            return [
                str(name) for entry in entries
                if (name := entry.get("annotations", {}).get("org.opencontainers.image.ref.name"))
            ]  # fmt: skip
        return [str(name) for entry in _json(source, "manifest.json") for name in entry.get("RepoTags") or ()]


def along(source: Source, folder: str) -> dict[str, bytes]:
    """The files that came along in an archive below a folder of it, by name; small ones only."""
    return {name: source.read(folder + name, _ALONG) for name in source.names(folder)}


def _of_layout(source: Source, ref: str) -> tuple[bytes, list[tuple[str, str]]]:
    entries = _json(source, "index.json").get("manifests", [])
    named = {entry.get("annotations", {}).get("org.opencontainers.image.ref.name", ""): entry for entry in entries}
    if ref and ref not in named:
        raise NotFound(TRIED, f"it holds no {ref}", f"it has {', '.join(filter(None, named)) or 'one without a name'}")
    if not ref and len(entries) != 1:
        raise InvalidInput(TRIED, f"it holds {len(entries)} images", f"name one of {', '.join(filter(None, named))}")
    entry = named[ref] if ref else entries[0]
    manifest = json.loads(_blob(source, entry["digest"]))
    while manifest.get("mediaType", entry.get("mediaType")) in _INDEXES or "manifests" in manifest:
        entry = _for_this_machine(manifest["manifests"])
        manifest = json.loads(_blob(source, entry["digest"]))
    layers = [(_path(layer["digest"]), layer["digest"]) for layer in manifest["layers"]]
    return _blob(source, manifest["config"]["digest"]), layers


def _of_docker(source: Source, ref: str) -> tuple[bytes, list[tuple[str, str]]]:
    entries = _json(source, "manifest.json")
    found = [entry for entry in entries if not ref or ref in (entry.get("RepoTags") or ())]
    if len(found) != 1:
        names = [name for entry in entries for name in entry.get("RepoTags") or ()]
        raise InvalidInput(TRIED, f"{len(found)} images of it fit", f"name one of {', '.join(names)}")
    return source.read(found[0]["Config"], config.MAX_SIZE), [(name, "") for name in found[0]["Layers"]]


def _for_this_machine(entries: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    for entry in entries:
        about = entry.get("platform", {})
        if (about.get("os"), about.get("architecture")) == ("linux", wanted):
            return entry
    raise NotFound(TRIED, f"it holds no image for linux/{wanted}", "get one for this machine")


def _layer(source: Source, name: str, digest: str, target: Path) -> None:
    """A layer's blob as a plain tar; the blob is held against its digest, where there is one."""
    with source.open(name) as file:
        checked = Checked(file)
        unpack(checked, target)
    if digest and checked.digest != digest:
        raise Corrupt(TRIED, f"blob {digest[:19]} is {checked.digest[:19]}", "get the archive again")


def _json(source: Source, name: str) -> Any:
    try:
        return json.loads(source.read(name, config.MAX_SIZE))
    except ValueError as error:
        raise Corrupt(TRIED, f"{name} is no JSON ({error})", "get it again") from None


def _path(digest: str) -> str:
    if not config.DIGEST.fullmatch(digest):
        raise InvalidInput(TRIED, f"{digest!r} is no sha256 digest", "get another archive")
    return f"blobs/sha256/{digest[7:]}"


def _blob(source: Source, digest: str) -> bytes:
    data = source.read(_path(digest), config.MAX_SIZE)
    if config.digest_of(data) != digest:
        raise Corrupt(TRIED, f"blob {digest[:19]} is not what its digest says", "get the archive again")
    return data
