"""Images in one file: written by others' tools, and by somebody who means no good."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import tarfile
from pathlib import Path

import pytest

from tests.images.archives import make_tar, member
from workbench.images import archive
from workbench.images.store import Store
from workbench.model import Corrupt, InvalidInput, NotFound, WorkbenchError

#: Bytes of memory that are too few for one who lays out a layer, while twice as many are enough.
SCANT = 16 << 20
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home").open()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def zstd(data: bytes) -> bytes:
    try:
        from compression import zstd as module
    except ImportError:
        from backports import zstd as module
    return module.compress(data)


def layout(folder: Path, compress=lambda data: data, *, platforms: bool = False, more=(), **wrong) -> Path:
    """An OCI image layout with one layer. more: members of it; wrong: what to write in place of what is right."""
    layer = make_tar(
        folder / "layer", member("etc/", tarfile.DIRTYPE), member("etc/hello", data=b"hello\n"), *more
    ).read_bytes()
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest(layer)]}}
    config |= wrong.get("config", {})
    blob = compress(layer)
    data = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2, "config": {"digest": digest(data), "size": len(data)},
        "layers": [{"digest": wrong.get("digest", digest(blob)), "size": len(blob), "mediaType": "whatever"}],
    }  # fmt: skip
    manifest |= wrong.get("manifest", {})
    text = json.dumps(manifest).encode()
    entry = {"digest": digest(text), "size": len(text), "annotations": {"org.opencontainers.image.ref.name": "one"}}
    place = folder / "layout"
    (place / "blobs" / "sha256").mkdir(parents=True)
    blobs = [data, text, blob]
    if platforms:
        index = json.dumps({"manifests": [
            entry | {"platform": {"os": "linux", "architecture": "s390x"}, "digest": digest(b"elsewhere")},
            entry | {"platform": {"os": "linux", "architecture": MACHINE}},
        ]}).encode()  # fmt: skip
        blobs.append(index)
        entry = {"digest": digest(index), "mediaType": "application/vnd.oci.image.index.v1+json"}
    for content in blobs:
        (place / "blobs" / "sha256" / digest(content)[7:]).write_bytes(
            wrong.get("blob", content) if content is blob else content
        )
    (place / "index.json").write_text(json.dumps({"manifests": [entry] * wrong.get("times", 1)}))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return place


def packed(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as out:
        for entry in sorted(folder.rglob("*")):
            out.add(entry, entry.relative_to(folder), recursive=False)
    return path


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("tar", [False, True], ids=["folder", "tar"])
def test_a_layout(tmp_path, store, compress, tar):
    place = layout(tmp_path, compress)
    image = archive.load(store, packed(place) if tar else place)
    assert (store.layer(image.diff_ids[0]) / "etc" / "hello").read_text() == "hello\n"
    assert archive.load(store, place, "one").id == image.id
    with pytest.raises(NotFound, match="it holds no two; it has one"):
        archive.load(store, place, "two")


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_compressed_as_a_whole(tmp_path, store, compress):
    path = tmp_path / "whole"
    path.write_bytes(compress(packed(layout(tmp_path)).read_bytes()))
    image = archive.load(store, path)
    assert (store.layer(image.diff_ids[0]) / "etc" / "hello").read_text() == "hello\n"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Corrupt, match="it is broken"):
        archive.load(store, path)
    assert list((store.home / "tmp").iterdir()) == []


def test_the_one_for_this_machine(tmp_path, store):
    assert archive.load(store, layout(tmp_path, platforms=True)).diff_ids


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
def test_what_a_layer_may_take_of_memory(tmp_path, store, monkeypatch, compress, pieces):
    """One that takes more than its share has all of it to itself; with more than that, it is refused."""
    large = [member(f"{number}", pax_headers={"comment": "x" * 1_000_000}) for number in range(64)]
    place = layout(tmp_path, compress, more=large)
    monkeypatch.setattr(archive.together, "width", lambda _most=0: pieces)
    monkeypatch.setattr(archive, "_MEMORY", pieces * SCANT)
    if pieces == 1:
        with pytest.raises(InvalidInput, match="a layer takes more than 16 MB of memory to lay out"):
            archive.load(store, place)
        assert store.layers() == [] and list((store.home / "tmp").iterdir()) == []
    else:
        assert (store.layer(archive.load(store, place).diff_ids[0]) / "16").exists()


HOSTILE = [
    ({"digest": digest(b"other")}, Corrupt, "it lacks blobs/sha256"),
    ({"blob": b"other"}, Corrupt, "blob"),
    ({"manifest": {"layers": []}}, Corrupt, "the config names 1 layers, the manifest 0"),
    ({"manifest": {"layers": [{"digest": "../../../etc/passwd"}]}}, InvalidInput, "is no sha256 digest"),
    ({"manifest": {"config": {}}}, Corrupt, "its manifest is malformed"),
    ({"manifest": {"layers": 3}}, Corrupt, "its manifest is malformed"),
    ({"config": {"os": "windows"}}, InvalidInput, "it is an image of windows"),
    ({"config": {"rootfs": {"type": "layers", "diff_ids": [digest(b"x")]}}}, Corrupt, "the archive is sha256"),
    ({"times": 2}, InvalidInput, "it holds 2 images"),
]


@pytest.mark.parametrize(("wrong", "kind", "said"), HOSTILE, ids=[said for _, _, said in HOSTILE])
def test_what_is_wrong_is_refused_and_leaves_nothing(tmp_path, store, wrong, kind, said):
    with pytest.raises(kind) as caught:
        archive.load(store, layout(tmp_path, **wrong))
    assert said in str(caught.value)
    assert store.images() == []
    assert list((store.home / "tmp").iterdir()) == []
    assert store.check(deep=False) == []


def test_no_link_of_an_archive_leads_out(tmp_path, store):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as out:
        info = tarfile.TarInfo("index.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(info)
    with pytest.raises(WorkbenchError):
        archive.load(store, path)


def test_no_archive_at_all(tmp_path, store):
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(InvalidInput, match="is no tar archive"):
        archive.load(store, tmp_path / "text")
    with pytest.raises(NotFound, match="there is no"):
        archive.load(store, tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=r"holds neither index\.json nor manifest\.json"):
        archive.load(store, make_tar(tmp_path / "a.tar", member("x")))
