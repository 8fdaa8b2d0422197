"""``import`` of archives by somebody who means no good, through the command line: each is refused in one line or taken
harmlessly, nothing is written outside of the store, and memory stays small whatever an archive claims.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import make_tar, member
from test_archive import MACHINE, digest, zstd
from test_layer import DIR, FIFO, HOSTILE, SYM, link

from tests.faults import Commands, commands
from workbench.images import files
from workbench.images.store import Store
from workbench.linux import userns

#: Bytes of the largest process; an interpreter that has imported the command line takes 25 MB of it.
MOST = 256 << 20
#: A million takes a minute.
MANY = 1_000_000 if os.environ.get("WORKBENCH_TEST_POINTS") == "all" else 6_000
NAME = "org.opencontainers.image.ref.name"
DEEP = "[" * 200_000


@pytest.fixture(scope="module")
def command() -> Iterator[Commands]:
    with commands() as made:
        yield made


class Archive:
    """An OCI archive that is whole, to be spoilt before it is written."""

    def __init__(self, *layers: bytes, packed: bytes | None = None, **config: Any) -> None:
        """packed: the one layer as it travels; config: what the config says besides."""
        self.members: list[tuple[str, bytes | tarfile.TarInfo]] = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')]
        document = {"os": "linux", "architecture": MACHINE, "rootfs": {"type": "layers"}} | config
        document["rootfs"] = {"type": "layers", "diff_ids": [digest(layer) for layer in layers]} | document["rootfs"]
        self.config = self.add(json.dumps(document).encode())
        blobs = [packed] if packed is not None else layers
        self.manifest: Any = {"schemaVersion": 2, "config": self.config, "layers": [self.add(blob) for blob in blobs]}
        self.index: Any = None
        self.annotations: Any = {NAME: "evil"}

    def add(self, data: bytes) -> dict[str, Any]:
        """Another blob; its descriptor."""
        found = digest(data)
        self.members.append((f"blobs/sha256/{found[7:]}", data))
        return {"digest": found, "size": len(data), "mediaType": "application/octet-stream"}

    def write(self, path: Path) -> Path:
        """The whole as a tar."""
        if self.index is None:
            manifest = self.manifest if isinstance(self.manifest, bytes) else json.dumps(self.manifest).encode()
            self.index = {"manifests": [self.add(manifest) | {"annotations": self.annotations}]}
        self.members.append(
            ("index.json", self.index if isinstance(self.index, bytes) else json.dumps(self.index).encode())
        )
        with tarfile.open(path, "w") as out:
            for name, data in self.members:
                if isinstance(data, tarfile.TarInfo):
                    out.addfile(data)
                else:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
        return path

    def spread(self, folder: Path) -> Path:
        """The whole as a folder."""
        self.write(folder.with_suffix(".tmp"))
        with tarfile.open(folder.with_suffix(".tmp")) as archive:
            archive.extractall(folder)  # what this test has just written itself
        folder.with_suffix(".tmp").unlink()
        return folder


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


GOOD = layer(member("etc/", DIR), member("etc/hello", data=b"hello"))


class Victim:
    """A store, and beside it what nobody may touch."""

    def __init__(self, command: Commands, place: Path) -> None:
        self.command, self.place = command, place
        self.outside = place / "outside"
        self.outside.mkdir()
        (self.outside / "canary").write_text("alive")
        (place / "cwd").mkdir()
        self.store = Store(place / "home").open()
        self.peak = 0

    def tried(self, case: str, path: Path | str, home: Path | None = None) -> bool:
        """Import a file; whether it was taken. Fails when anything went wrong besides."""
        store = Store(home).open() if home else self.store
        env = {"WORKBENCH_HOME": str(store.home), "JUPYTER_DATA_DIR": str(self.place / "j")}
        before = self.seen()
        done = self.command.run("import", str(path), cwd=str(self.place / "cwd"), **env)
        self.peak = max(self.peak, done.peak)
        assert done.peak < MOST, f"{case}: {done.peak >> 20} MiB"
        assert done.code in (0, 1), f"{case}: {done.code} {done.err[:2000]}"
        assert done.err.count("\n") == done.code, f"{case}: {done.err[:2000]}"
        assert len(done.err) < 1500 and done.err.replace("\n", "").isprintable(), f"{case}: {done.err[:2000]!r}"
        assert self.seen() == before, case
        assert store.check() == [] and os.listdir(store.home / "tmp") == [], case
        if done.code:
            assert not os.path.exists(store.home / "refs" / "evil") and store.images() == [], case
        else:
            for words in (["images"], ["log", "evil"], ["show", "evil"], ["show", "--json", "evil"], ["rmi", "evil"]):
                after = self.command.run(*words, **env)
                assert after.code in (0, 1) and "Traceback" not in after.err, f"{case}: {words} {after.err[-2000:]}"
        collected = self.command.run("gc", **env)
        assert collected.code == 0 and store.layers() == [] and store.blobs() == [], f"{case}: {collected.err}"
        return done.code == 0

    def seen(self) -> dict[str, bytes]:
        """Every file outside of the store that could be changed."""
        return {
            str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            for folder in (self.outside, self.place / "cwd", Path("/tmp/out")) for path in [folder, *folder.rglob("*")]
            if path.exists()
        }  # fmt: skip


@pytest.fixture
def victim(command: Commands, place: Path) -> Victim:
    return Victim(command, place)


# --- layers --------------------------------------------------------------------------------------------------


def test_layers_that_lead_out(victim: Victim, place: Path) -> None:
    """All that the layer's own tests know, and with links to a folder that is there."""
    out = str(victim.outside)
    here = {
        "through a symlink": [link("a", out), member("a/new", data=b"x")],
        "through two": [link("b", out), link("a", "b"), member("a/canary", data=b"x")],
        "a folder over it": [link("a", out), member("a", DIR), member("a/canary", data=b"x")],
        "a file through a long way up": [link("a", "../" * 40 + out[1:]), member("a/new", data=b"x")],
        "a whiteout of what is there": [link("a", out), member("a/.wh.canary")],
        "a mark of what is there": [link("a", out), member("a/.wh..wh..opq")],
        "a hard link to it": [link("a", f"{out}/canary", tarfile.LNKTYPE), member("a", data=b"x")],
        "a pipe through it": [link("a", out), member("a/pipe", FIFO)],
        "a symlink through it": [link("a", out), link("a/new", "/etc/passwd")],
        "a hard link from there": [link("a", out), link("b", "a/canary", tarfile.LNKTYPE)],
        "a pipe, then written": [member("a", FIFO), member("a", data=b"x")],
    }
    for case, members in {**HOSTILE, **here}.items():
        data = make_tar(place / "x.tar", *members).read_bytes()
        assert not victim.tried(case, Archive(data).write(place / "evil.tar")), case
    print(f"{len(HOSTILE) + len(here)} layers refused; at most {victim.peak >> 20} MiB")


def test_attributes_of_layers(victim: Victim, command: Commands, place: Path) -> None:
    """What overlayfs would obey means nothing; a set-uid bit and a capability are a program's own, as in its image."""
    capability = "\x01\x00\x00\x02\x00\x04\x00\x00" + "\x00" * 12
    xattrs = {f"SCHILY.xattr.{name}": value for name, value in (
        ("trusted.overlay.opaque", "y"), ("trusted.overlay.redirect", "/etc"), ("user.overlay.opaque", "y"),
        ("user.overlay.redirect", "/etc"), ("user.overlay.metacopy", ""), ("user.overlay.origin", "x"),
        ("security.selinux", "x"), ("security.ima", "x"), ("system.data", "x"), ("user.mine", "kept"),
    )}  # fmt: skip
    program = {"SCHILY.xattr.security.capability": capability, **xattrs}
    data = layer(
        member("etc/", DIR, pax_headers=xattrs), member("etc/program", data=b"x", mode=0o6755, pax_headers=program),
    )  # fmt: skip
    path = Archive(data).write(place / "evil.tar")
    env = {"WORKBENCH_HOME": str(victim.store.home), "JUPYTER_DATA_DIR": str(place / "j")}
    assert command.run("import", str(path), **env).code == 0
    tree = victim.store.layer(digest(data))
    if userns.host_ids().kind == "root":
        hidden = {f"user.overlay.overlay.{name}" for name in ("opaque", "redirect", "metacopy", "origin")}
        wanted = {"etc": hidden | {"user.mine"}, "etc/program": hidden | {"user.mine", "security.capability"}}
        for name, names in wanted.items():
            assert set(os.listxattr(tree / name)) - {"security.selinux"} == names
        assert os.stat(tree / "etc/program").st_mode & 0o7777 == 0o6755
    assert command.run("rmi", "evil", **env).code == 0
    assert victim.tried("attributes", path)


# --- JSON ----------------------------------------------------------------------------------------------------


def _manifest(**changes: Any) -> Archive:
    made = Archive(GOOD)
    made.manifest |= changes
    return made


def _index(value: Any) -> Archive:
    made = Archive(GOOD)
    made.index = value
    return made


def _annotated(*names: Any) -> Archive:
    made = Archive(GOOD)
    described = made.add(json.dumps(made.manifest).encode())
    made.index = {"manifests": [described | {"annotations": {NAME: name}} for name in names]}
    return made


def _chained(levels: int) -> Archive:
    """Indexes of indexes, each with as much beside as fits."""
    made = Archive(GOOD)
    ballast = "[" + "[]," * 1_300_000 + "[]]"
    inner = made.add(json.dumps(made.manifest).encode())
    for _ in range(levels):
        entry = json.dumps(inner | {"platform": {"os": "linux", "architecture": MACHINE}})
        inner = made.add(f'{{"manifests":[{entry[:-1]},"x":{ballast}}}]}}'.encode())
    made.index = (
        f'{{"manifests":[{json.dumps(inner)[:-1]},"annotations":{{"{NAME}":"evil"}},"x":{ballast}}}]}}'.encode()
    )
    return made


def _sized(**sizes: int) -> Archive:
    made = Archive(GOOD)
    made.manifest["layers"][0] |= {key: value for key, value in sizes.items() if key == "size"}
    return made


def _with_parent(data: bytes) -> Archive:
    labels = {"org.jupyter.workbench.parent": digest(data)}
    made = Archive(GOOD, config={"Labels": labels})
    made.add(data)
    return made


def _labelled(**labels: str) -> Archive:
    return Archive(GOOD, config={"Labels": {f"org.jupyter.workbench.{key}": text for key, text in labels.items()}})


def _config(data: bytes) -> Archive:
    made = Archive(GOOD)
    made.manifest["config"] = made.add(data)
    return made


#: Whether each may be taken; None where either is well.
JSON: dict[str, tuple[Callable[[], Archive], bool | None]] = {
    "as it should be": (lambda: Archive(GOOD), True),
    "an index without end": (lambda: _index(b'{"manifests": [' + b'{"a": ' * 1000), False),
    "an index of brackets": (lambda: _index(DEEP.encode()), False),
    "an index that is a list": (lambda: _index([]), False),
    "an index that is null": (lambda: _index(b"null"), False),
    "an empty index": (lambda: _index(b""), False),
    "an index of 5 MB": (lambda: _index(b'{"x": "' + b"y" * (5 << 20) + b'"}'), False),
    "an index in UTF-16": (lambda: _index(json.dumps({"manifests": []}).encode("utf-16")), False),
    "an index of noise": (lambda: _index(os.urandom(5000)), False),
    "an index with numbers": (lambda: _index(b'{"manifests": ' + b"9" * 100_000 + b"}"), False),
    "entries that are none": (lambda: _index({"manifests": [None, 1, "x", []]}), False),
    "a manifest of brackets": (lambda: _index({"manifests": [{"digest": digest(b"x")}]}), False),
    "indexes in indexes": (lambda: _chained(1), None),
    "indexes in indexes in indexes": (lambda: _chained(8), None),
    "no layers": (lambda: _manifest(layers=None), False),
    "layers of a layer": (lambda: _manifest(layers={"digest": digest(GOOD)}), False),
    "a digest that is a path": (lambda: _manifest(layers=[{"digest": "sha256:../../../../etc/passwd"}]), False),
    "an absolute one": (lambda: _manifest(layers=[{"digest": "/etc/passwd"}]), False),
    "a digest with a line": (lambda: _manifest(layers=[{"digest": digest(GOOD) + "\n"}]), False),
    "a digest of another kind": (lambda: _manifest(layers=[{"digest": "sha512:" + "0" * 128}]), False),
    "a digest of capitals": (lambda: _manifest(layers=[{"digest": digest(GOOD).upper()}]), False),
    "a digest that is a number": (lambda: _manifest(layers=[{"digest": 7}]), False),
    "a digest that is a megabyte": (lambda: _manifest(layers=[{"digest": "\x1b[2J\n" * 200_000}]), False),
    "a config that is a path": (lambda: _manifest(config={"digest": "sha256:/../../index.json"}), False),
    "a wrong digest": (lambda: _manifest(layers=[{"digest": digest(b"other")}]), False),
    "a layer larger than said": (lambda: _sized(size=100), False),
    "a layer smaller than said": (lambda: _sized(size=1 << 50), False),
    "a config of brackets": (lambda: _config(DEEP.encode()), False),
    "a config with a history of brackets": (
        lambda: Archive(GOOD, history=json.loads("[" * 900 + "]" * 900)), None,
    ),
    "diff_ids of paths": (lambda: Archive(GOOD, rootfs={"diff_ids": ["../../x"]}), False),
    "a layer fifty thousand times": (
        lambda: _many_times(50_000), None,
    ),
    "a parent that is itself no image": (lambda: _with_parent(b"{}"), True),
    "a parent of brackets": (lambda: _with_parent(DEEP.encode()), True),
    "a parent of noise": (lambda: _with_parent(b"\xff" * 100), True),
    "a parent that is a path": (lambda: _labelled(parent="../../etc/passwd"), False),
    "a kernel of brackets": (lambda: _labelled(kernel=DEEP), False),
    "a machine of brackets": (lambda: _labelled(machine=DEEP, parent=digest(b"")), True),
    "a machine that is a number": (lambda: _labelled(machine="7", parent=digest(b"")), True),
    "a kernel of our folder": (lambda: _labelled(kernel=json.dumps({"argv": ["x"], "language": "../../x"})), True),
    "a name that leads out": (lambda: _annotated("../../outside/x"), False),
    "a name that clears the screen": (lambda: _annotated("\x1b[2J\nroot: yes"), False),
    "a name of a megabyte": (lambda: _annotated("x" * (1 << 20)), False),
    "a name that is a list": (lambda: _annotated(["evil"]), False),
    "two names that clear the screen": (lambda: _annotated("a\x1b[2J\n", "b\r\n"), False),
    "ten thousand names": (lambda: _annotated("evil", *(f"n{n}" for n in range(10_000))), True),
    "annotations that are none": (lambda: _index({"manifests": [{"annotations": None, "digest": digest(b"")}]}), False),
    "a date that clears the screen": (lambda: Archive(GOOD, created="\x1b[2J\n"), None),
    "a date of long ago": (lambda: Archive(GOOD, created="-9999-99-99T99:99:99Z"), None),
}  # fmt: skip


def _many_times(number: int) -> Archive:
    made = Archive(GOOD, rootfs={"diff_ids": [digest(GOOD)] * number})
    made.manifest["layers"] = [{"digest": digest(GOOD)}] * number
    return made


@pytest.mark.first
def test_manifests(victim: Victim, place: Path) -> None:
    for case, (make, wanted) in JSON.items():
        taken = victim.tried(case, make().write(place / "evil.tar"))
        assert wanted in (None, taken), case
    print(f"{len(JSON)} manifests; at most {victim.peak >> 20} MiB")


#: Clears the screen, ends or overwrites a line, rings, is a control sequence in one byte, turns the rest around.
ACTS = "\x1b[2J\r\x07\x9b31m\u202e\u2028"


def test_what_a_person_is_shown(victim: Victim, command: Commands, place: Path) -> None:
    """Nothing of a stranger's image acts on a terminal, in whatever it stands; a message keeps its lines."""
    name = f"x{ACTS}\n\udcff"
    above = layer(
        member(f"etc/{name}", data=b"x"),
        member("opt/venv/lib/python3.11/site-packages/x-1.dist-info/METADATA",
               data=f"Name: x{ACTS}\nVersion: 1{ACTS}\n".encode()),
    )  # fmt: skip
    parent = json.dumps({"os": "linux", "architecture": MACHINE, "created": ACTS,
                         "rootfs": {"type": "layers", "diff_ids": [digest(GOOD)]}}).encode()  # fmt: skip
    labels = {
        "org.jupyter.workbench.parent": digest(parent),
        "org.jupyter.workbench.kernel": json.dumps({"argv": ["x"], "display_name": f"k{ACTS}"}),
        "org.jupyter.workbench.machine": json.dumps({f"m{ACTS}": f"m{ACTS}"}),
    }
    said = {"author": f"A{ACTS}\nDate: x", "comment": f"One{ACTS}\n\n\tTwo\u00a0\N{WOMAN}\u200d\N{PERSONAL COMPUTER}"}
    made = Archive(GOOD, above, config={"Labels": labels}, history=[{}, said], created=ACTS)
    made.add(parent)
    path = made.write(place / "evil.tar")
    env = {"WORKBENCH_HOME": str(victim.store.home), "JUPYTER_DATA_DIR": str(place / "j")}
    for words in (
        ["import", str(path)], ["images"], ["log", "evil"], ["log", "--oneline", "evil"], ["log", "--graph", "evil"],
        ["log", "--graph", "--all"], ["show", "evil"], ["diff", "evil~1", "evil"], ["inventory", "evil"],
        ["diff", "--name-status", "evil~1", "evil"], ["diff", "--stat", "evil~1", "evil"], ["branch"],
        ["inventory", "--unowned", "evil"], ["freeze", "--no-build", "-o", str(place / "frozen"), "evil"],
    ):  # fmt: skip
        done = command.run(*words, **env)
        assert done.code == 0, (words, done.err)
        left = done.out.replace("\n", "").replace("\t", "").replace("\u00a0", "").replace("\u200d", "")
        assert left.isprintable(), (words, done.out)
    shown = command.run("log", "-n", "1", "evil", **env).out
    acts = r"\x1b[2J\r\x07\x9b31m\u202e\u2028"
    assert f"Author: A{acts}\\nDate: x\n" in shown
    assert f"    One{acts}\n\n    \tTwo\u00a0\N{WOMAN}\u200d\N{PERSONAL COMPUTER}\n" in shown
    status = command.run("diff", "--name-status", "evil~1", "evil", **env).out
    assert f"A\t/etc/x{acts}\\n\\xff\n" in status
    # to a program it is told as it is
    (entry, _) = json.loads(command.run("log", "--json", "evil", **env).out)
    assert (entry["author"], entry["message"]) == (said["author"], said["comment"])
    found = json.loads(command.run("diff", "--json", "evil~1", "evil", **env).out)["files"]
    assert f"etc/{name}" in [row["path"] for row in found]
    assert command.run("rmi", "evil", **env).code == 0


# --- archives ------------------------------------------------------------------------------------------------


def _docker(**changes: Any) -> Archive:
    made = Archive(GOOD)
    entry = {"Config": f"blobs/sha256/{made.config['digest'][7:]}", "RepoTags": ["evil:latest"],
             "Layers": [f"blobs/sha256/{digest(GOOD)[7:]}"]} | changes  # fmt: skip
    made.members.append(("manifest.json", json.dumps([entry]).encode()))
    made.index = b"taken away"
    return made


def _only_docker(**changes: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        _docker(**changes).write(path)
        whole = tarfile.open(path)
        members = [(info, whole.extractfile(info).read()) for info in whole if info.name != "index.json"]  # type: ignore[union-attr]
        whole.close()
        return make_tar(path, *members)

    return make


def _plus(*members: tuple[str, bytes | tarfile.TarInfo]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        made = Archive(GOOD)
        made.members += members
        return made.write(path)

    return make


def _linked(name: str, goal: str, kind: bytes = SYM) -> tuple[str, tarfile.TarInfo]:
    return name, link(name, goal, kind)[0]


def _sparse(path: Path, size: int) -> Path:
    """In the form of old GNU tar: the layer's blob is a hole of that size."""
    made = Archive(GOOD)
    made.members = [pair for pair in made.members if not pair[0].endswith(digest(GOOD)[7:])]
    made.write(path)
    header = bytearray(tarfile.TarInfo(f"blobs/sha256/{digest(GOOD)[7:]}").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = b"00000000000\0"
    header[398:410] = b"00000000000\0"
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes())
    return path


def _huge_headers(path: Path) -> Path:
    """A hundred headers of 4 MB, which a reader would keep."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for number in range(100):
            out.addfile(member(f"f{number}", pax_headers={"comment": "x" * (4_000_000)})[0])
    with open(Archive(GOOD).write(path.with_suffix(".rest")), "rb") as rest, open(path, "r+b") as whole:
        whole.seek(-os.path.getsize(path) % 512 - 10240, os.SEEK_END)
        whole.write(rest.read())
    return path


def _written(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


def _along(count: int, size: int) -> Callable[[Path], Path]:
    """Files that come along, packed as a whole so that they cost nothing."""

    def make(path: Path) -> Path:
        made = Archive(GOOD)
        made.members += [(f"workbench/{number}.bin", bytes(size)) for number in range(count)]
        plain = made.write(path.with_suffix(".plain"))
        with open(plain, "rb") as file, gzip.open(path, "wb", 1) as out:
            while data := file.read(1 << 20):
                out.write(data)
        plain.unlink()
        return path

    return make


ARCHIVES: dict[str, tuple[Callable[[Path], Path], bool | None]] = {
    "docker's": (_only_docker(), True),
    "docker's with a config of ours": (_only_docker(Config="/etc/passwd"), False),
    "docker's with a config above": (_only_docker(Config="../../../etc/passwd"), False),
    "docker's with a config that is a number": (_only_docker(Config=5), False),
    "docker's with a layer of ours": (_only_docker(Layers=["/etc/passwd"]), False),
    "docker's with a layer above": (_only_docker(Layers=["a/../../../etc/passwd"]), False),
    "docker's with no layers": (_only_docker(Layers=None), False),
    "two indexes": (_plus(("index.json", b"{}")), None),
    "a blob twice": (_plus((f"blobs/sha256/{digest(GOOD)[7:]}", b"other")), False),
    "a blob by a link to ours": (_plus(_linked(f"blobs/sha256/{digest(GOOD)[7:]}", "/etc/passwd")), False),
    "a blob by a link to itself": (
        _plus(_linked(f"blobs/sha256/{digest(GOOD)[7:]}", f"blobs/sha256/{digest(GOOD)[7:]}", tarfile.LNKTYPE)), False,
    ),
    "a blob that is a pipe": (_plus((f"blobs/sha256/{digest(GOOD)[7:]}", member("p", FIFO)[0])), None),
    "members that lead out": (_plus(("../../out", b"x"), ("/tmp/out", b"x"), ("a/../../../out", b"x")), True),
    "twelve thousand members": (_plus(*((f"f{number}", b"") for number in range(12_000))), False),
    "a hole of 8 TB": (lambda path: _sparse(path, 8 << 40), False),
    "headers without end": (_huge_headers, None),
    "nothing": (_written(b""), False),
    "zeros": (_written(bytes(1 << 20)), False),
    "noise": (_written(os.urandom(1 << 16)), False),
    "gzip of nothing": (_written(gzip.compress(b"")), False),
    "gzip of gzip of gzip": (_written(gzip.compress(gzip.compress(gzip.compress(b"x" * 5000)))), False),
    "half a gzip": (_written(gzip.compress(os.urandom(5000))[:2000]), False),
    "half a zstd": (_written(zstd(os.urandom(5000))[:2000]), False),
    "notebooks that lead out": (
        _plus(
            ("workbench/../outside/x.ipynb", b"{}"), ("workbench/..ipynb", b"{}"), ("workbench//tmp/out.ipynb", b"{}"),
            _linked("workbench/passwd.ipynb", "/etc/passwd"),
        ), None,
    ),
    "files of 300 MB that come along": (_along(5, 60 << 20), None),
    "a file of 70 MB that comes along": (_along(1, 70 << 20), None),
}  # fmt: skip


def test_archives(victim: Victim, place: Path) -> None:
    for case, (make, wanted) in ARCHIVES.items():
        taken = victim.tried(case, make(place / "evil.tar"))
        assert wanted in (None, taken), case
    whole = Archive(GOOD).write(place / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, end // 40):  # in front of its last file's last byte
        assert not victim.tried(f"cut at {cut}", _written(whole[:cut])(place / "evil.tar"))
    for special in ("/dev/null", "/dev/zero", str(place / "cwd"), "/proc/self/mem"):
        assert not victim.tried(special, special)
    print(f"{len(ARCHIVES) + 44} archives; at most {victim.peak >> 20} MiB")


def test_folders(victim: Victim, place: Path) -> None:
    """A layout that lies there as files is read no further than it reaches."""
    (victim.outside / "mine.ipynb").write_text("{}")
    (victim.outside / digest(GOOD)[7:]).write_bytes(GOOD)
    blob = f"blobs/sha256/{digest(GOOD)[7:]}"

    def swapped(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            path = folder / name
            if path.is_dir():
                path.rename(folder / "aside")
            else:
                path.unlink(missing_ok=True)
            make(path)

        return spoil

    cases = {
        "a blob by a link": swapped(blob, lambda path: path.symlink_to(victim.outside / digest(GOOD)[7:])),
        "a blob that is a pipe": swapped(blob, os.mkfifo),
        "a blob that is a folder": swapped(blob, os.mkdir),
        "an index by a link": swapped("index.json", lambda path: path.symlink_to("/etc/passwd")),
        "an index that is a pipe": swapped("index.json", os.mkfifo),
        "blobs by a link": swapped("blobs", lambda path: path.symlink_to("aside")),
    }
    for case, spoil in cases.items():
        folder = Archive(GOOD).spread(place / "layout")
        spoil(folder)
        assert not victim.tried(case, folder), case
        files.discard(str(folder))
    folder = Archive(GOOD).spread(place / "layout")
    (folder / "workbench").symlink_to(victim.outside)
    assert victim.tried("what comes along by a link", folder)
    assert os.listdir(place / "cwd") == []


# --- bombs ---------------------------------------------------------------------------------------------------


def _zeros(count: int) -> bytes:
    """A gzip of so many zeros."""
    packer = zlib.compressobj(1, wbits=31)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(count >> 20)), packer.flush()])


def _trailing(count: int) -> Archive:
    """A layer with zeros behind its end, which belong to its digest."""
    whole = hashlib.sha256(GOOD)
    for _ in range(count >> 20):
        whole.update(bytes(1 << 20))
    packed = gzip.compress(GOOD) + _zeros(count)  # two members are one stream (RFC 1952)
    return Archive(packed=packed, rootfs={"diff_ids": [f"sha256:{whole.hexdigest()}"]})


def _packed(data: bytes) -> Archive:
    return Archive(packed=gzip.compress(data, 1), rootfs={"diff_ids": [digest(data)]})


def _headers(kind: bytes, count: int) -> Archive:
    """Extended headers of a megabyte in a row, each with another key."""
    out = io.BytesIO()
    for number in range(count):
        body = b"%07d k%05d=" % (1_000_000, number)
        body = body + b"v" * (1_000_000 - len(body) - 1) + b"\n"
        info = tarfile.TarInfo("h")
        info.type, info.size = kind, len(body)
        out.write(info.tobuf() + body + bytes(-len(body) % 512))
    return _packed(out.getvalue() + GOOD)


def _folders_with_attributes(count: int) -> Archive:
    return _packed(layer(*(
        member(f"d{number}", DIR, pax_headers={"SCHILY.xattr.user.x": "y" * 900_000}) for number in range(count)
    )))  # fmt: skip


def _entries(make: Callable[[int], tuple[tarfile.TarInfo, bytes]], count: int = MANY) -> Archive:
    return _packed(layer(*(make(number) for number in range(count))))


BOMBS: dict[str, tuple[Callable[[], Archive], bool | None]] = {
    "zeros behind the end": (lambda: _trailing(300 << 20), None),
    "zstd with a window of 128 MB": (lambda: _windowed(27), None),
    "zstd with a window of 2 GB": (lambda: _windowed(31), False),
    "gzip in gzip": (
        lambda: Archive(packed=gzip.compress(_zeros(64 << 20)), rootfs={"diff_ids": [digest(GOOD)]}), False,
    ),
    "headers for all": (lambda: _headers(b"g", 300), False),
    "headers for one": (lambda: _headers(b"x", 300), False),
    "folders with attributes": (lambda: _folders_with_attributes(300), False),
    "a file of 8 TB": (lambda: _packed(layer(member("a", pax_headers={"size": str(8 << 40)}))), False),
    "a hole of 8 TB": (
        lambda: _packed(layer(member("a", pax_headers={
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(8 << 40),
        }))), False,
    ),
    "many files in one folder": (lambda: _entries(lambda number: member(f"d/{number}")), True),
    "many folders": (lambda: _entries(lambda number: member(f"{number}/", DIR)), True),
    "many folders that nobody names": (lambda: _entries(lambda number: member(f"{number}/.wh..wh..opq")), True),
    "many whiteouts": (lambda: _entries(lambda number: member(f".wh.{number}")), True),
    "many whiteouts of folders": (
        lambda: _entries(lambda n: member(f".wh.{n // 2}") if n % 2 else member(f"{n // 2}", DIR)), True,
    ),
    "many files with two names": (
        lambda: _entries(lambda n: link(f"{n}", f"{n - 1}", tarfile.LNKTYPE) if n % 2 else member(f"{n}")), True,
    ),
    "many long names": (lambda: _entries(lambda number: member(f"d/{'n' * 240}{number}")), None),
    "many owners that nobody has": (lambda: _entries(lambda number: member(f"{number}", uid=70_000_000)), None),
    "many links of one": (
        lambda: _entries(lambda n: link(f"{n}", "0", tarfile.LNKTYPE) if n else member("0"), 20_000), None,
    ),
}  # fmt: skip


def _windowed(log: int) -> Archive:
    """A zstd frame that asks its reader for 2**log bytes (RFC 8878, 3.1.1.1.2), with a block of each kind."""
    data = GOOD + bytes(10240)
    header = b"\x28\xb5\x2f\xfd" + bytes([0x00, (log - 10) << 3])
    raw = (len(GOOD) << 3 | 0).to_bytes(3, "little") + GOOD
    zeros = (10240 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    return Archive(packed=header + raw + zeros, rootfs={"diff_ids": [digest(data)]})


@pytest.mark.first
def test_bombs(victim: Victim, place: Path) -> None:
    for case, (make, wanted) in BOMBS.items():
        victim.peak = 0
        taken = victim.tried(case, make().write(place / "evil.tar"))
        print(f"{case}: {'taken' if taken else 'refused'}, {victim.peak >> 20} MiB")
        assert wanted in (None, taken), case


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to make a small disk")
def test_more_than_the_disk_has(victim: Victim, place: Path) -> None:
    """A gigabyte out of five megabytes: refused before the disk is full for everybody."""
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", str(disk)], check=True)
    try:
        path = Archive(packed=_zeros(1 << 30), rootfs={"diff_ids": [digest(b"")]}).write(place / "evil.tar")
        assert not victim.tried("zeros", path, disk / "home")
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize > 300 << 20
    finally:
        subprocess.run(["umount", str(disk)], check=True)
