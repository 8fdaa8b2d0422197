"""An image in one file that others read as it is: an OCI image layout in a tar, which ``docker load`` takes as well.

Sources: OCI image spec (image-layout.md, manifest.md, descriptor.md); Docker's image specification v1.2. The same
image, name and form give the same bytes. Beside the image lie the configs of those that it stands on, so that its
history goes along; readers that know nothing of them pass them over.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from workbench.images import config, files, tar
from workbench.images.files import clear_errors
from workbench.images.source import zstd_module
from workbench.images.store import Store
from workbench.model import Corrupt, Image, InvalidInput, Meter, WorkbenchError

Form = Literal["none", "gzip", "zstd"]
FORMS: tuple[Form, ...] = ("none", "gzip", "zstd")
#: Where files that go along with an image lie in its archive.
ALONG = "workbench/"

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CHUNK = 1 << 20


def save(
    store: Store, image: Image, name: str, out: Path | str, *, form: Form = "none",
    along: Mapping[str, Path] | None = None, meter: Meter | None = None,
) -> int:  # fmt: skip
    """Write an image's archive, durably; its bytes. What is there under that name is replaced only by a whole one.

    name: ``name:tag``, by which readers find it; form: how layers are compressed (``none`` and ``gzip`` are read by
    all); along: files that go with it, by name; meter: may end it. Raises NotFound, Corrupt, InvalidInput
    for an ``out`` that cannot be, HostLacks without space.
    """
    out = Path(os.path.abspath(out))
    if out.is_dir():
        raise InvalidInput("write an image's archive", f"{out} is a folder", "name a file in it")
    new = out.with_name(f".{out.name}.{os.getpid()}")
    with (
        clear_errors("write an image's archive", str(out)),
        store.lease(image.id, *image.diff_ids),
        store.staging() as staging,
    ):
        file = _beside(new, out)
        try:
            with file:
                gauge = _Gauge(meter, store.size(image) if meter else 0)
                _write(file, store, image, name, staging, form, along or {}, gauge)
                file.write(bytes(2 * tar.BLOCK))
                file.flush()
                os.fsync(file.fileno())
            files.publish(str(new), str(out))
        finally:
            with suppress(FileNotFoundError):
                new.unlink()
    return out.stat().st_size


def _beside(new: Path, out: Path) -> IO[bytes]:
    """The file to write into, in the folder of what it is to be."""
    try:
        return open(new, "xb")
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise InvalidInput(
            "write an image's archive", f"{out}: {error.strerror}", "name a file in a folder that you may write"
        ) from None


class _Gauge:
    """How far it is, in bytes before compression: of a total that is known, and even while a layer is compressed."""

    def __init__(self, meter: Meter | None, total: int) -> None:
        self._meter, self._total = meter, total
        #: Bytes of the layers that are done.
        self.done = 0

    def reading(self, position: Callable[[], int]) -> Callable[[], None] | None:
        """What tells the meter when it is called, if there is one; position: how much of the layer is written."""
        if (meter := self._meter) is None:
            return None
        return lambda: meter("writing", min(self.done + position(), self._total), self._total)


def _write(
    archive: IO[bytes], store: Store, image: Image, name: str, staging: Path, form: Form,
    along: Mapping[str, Path], gauge: _Gauge,
) -> None:  # fmt: skip
    # Named as well, since skopeo gives folders that it makes by itself to root, which without root it may not.
    for folder in ("blobs", "blobs/sha256", *([ALONG.rstrip("/")] if along else [])):
        archive.write(tar.header(tar.Entry(f"{folder}/".encode(), tar.FOLDER, 0o755)))
    _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    data = store.config(image.id)
    blobs = {
        diff_id: _layer(archive, store, diff_id, staging, form, gauge) for diff_id in dict.fromkeys(image.diff_ids)
    }
    described = [blobs[diff_id] for diff_id in image.diff_ids]
    manifest = _json({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _described("application/vnd.oci.image.config.v1+json", data), "layers": described,
    })  # fmt: skip
    for blob in (data, manifest, *_ancestors(store, image)):
        _add(archive, _path(config.digest_of(blob)), blob)
    entry = _described("application/vnd.oci.image.manifest.v1+json", manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    _add(archive, "index.json", _json({"schemaVersion": 2, "manifests": [entry]}))
    docker = {"Config": _path(image.id), "RepoTags": [name], "Layers": [_path(layer["digest"]) for layer in described]}
    _add(archive, "manifest.json", _json([docker]))
    for file_name, path in sorted(along.items()):
        _add(archive, ALONG + file_name, path.read_bytes())


def _ancestors(store: Store, image: Image) -> Iterator[bytes]:
    seen = {image.id}
    while image.parent and image.parent not in seen:
        seen.add(image.parent)
        try:
            image = store.image(image.parent)
        except WorkbenchError:  # not here: the history ends there
            return
        yield store.config(image.id)


def _layer(archive: IO[bytes], store: Store, diff_id: str, staging: Path, form: Form, gauge: _Gauge) -> dict[str, Any]:
    """Write a layer's blob; its descriptor."""
    size = store.layer_size(diff_id)
    if form == "none" and size:
        archive.write(_header(_path(diff_id), size))
        archive.flush()
        fd, begin = archive.fileno(), archive.tell()
        store.append_tar(diff_id, fd, gauge.reading(lambda: os.fstat(fd).st_size - begin))
        if archive.seek(0, os.SEEK_END) != begin + size:
            raise Corrupt("export an image", f"layer {diff_id[:19]} is of another size", "jupyter workbench check")
        archive.write(bytes(-size % tar.BLOCK))
        described = {"mediaType": _LAYER, "digest": diff_id, "size": size}
    else:
        described = _staged(archive, store, diff_id, staging, form, gauge)
    gauge.done += size
    return described


def _staged(archive: IO[bytes], store: Store, diff_id: str, staging: Path, form: Form, gauge: _Gauge) -> dict[str, Any]:
    plain = staging / "layer.tar"
    store.write_tar(diff_id, plain, gauge.reading(lambda: 0))
    kept, digest, kind = plain, diff_id, _LAYER
    if form != "none":
        kept, kind = staging / "layer", f"{_LAYER}+{form}"
        _compress(plain, kept, form, gauge)
        digest = files.digest(str(kept))
    size = kept.stat().st_size
    archive.write(_header(_path(digest), size))
    with open(kept, "rb") as file:
        while data := file.read(_CHUNK):
            archive.write(data)
    archive.write(bytes(-size % tar.BLOCK))
    for path in {plain, kept}:
        path.unlink()
    return {"mediaType": kind, "digest": digest, "size": size}


def _compress(source: Path, target: Path, form: Form, gauge: _Gauge) -> None:
    """The same bytes each time: no name and no time in the header."""
    with open(source, "rb") as file, open(target, "wb") as out:
        tell = gauge.reading(file.tell)
        packed: Any
        if form == "gzip":
            packed = gzip.GzipFile("", "wb", 6, out, mtime=0)
        else:
            packed = zstd_module().ZstdFile(out, "wb", level=3)
        with packed:
            while data := file.read(_CHUNK):
                packed.write(data)
                if tell is not None:
                    tell()


def _described(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": config.digest_of(data), "size": len(data)}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _path(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _header(name: str, size: int) -> bytes:
    return tar.header(tar.Entry(name.encode(), tar.FILE, 0o644, size=size))


def _add(archive: IO[bytes], name: str, data: bytes) -> None:
    archive.write(_header(name, len(data)) + data + bytes(-len(data) % tar.BLOCK))


def form(text: str) -> Form:
    """The text, if it names a form. Raises InvalidInput."""
    for known in FORMS:
        if text == known:
            return known
    raise InvalidInput("export an image", f"{text!r} is no compression", f"known are {', '.join(FORMS)}")
