"""Trees and tars: what is refused, what is kept, and that the bytes are always the same."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import stat
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path

import pytest
from archives import call, listing, make_tar, member
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.images import files, layer, tar
from workbench.linux import userns
from workbench.model import Conflict, InvalidInput, WorkbenchError

SYM, LNK, DIR, CHR, BLK, FIFO = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


def link(name: str, goal: str, kind: bytes = SYM) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind, linkname=goal)


HOSTILE = {
    "parent folder": [member("../out", data=b"x")],
    "parent folder inside": [member("a/../../out", data=b"x")],
    "absolute": [member("/tmp/out", data=b"x")],
    "symlink to outside, then through it": [link("a", "../.."), member("a/out", data=b"x")],
    "absolute symlink, then through it": [link("a", "/tmp"), member("a/out", data=b"x")],
    "symlink inside as parent": [member("b", DIR), link("a", "b"), member("a/out", data=b"x")],
    "folder over symlink": [link("a", "../.."), member("a", DIR), member("a/out", data=b"x")],
    "file over symlink": [link("a", "../../out"), member("a", data=b"x")],
    "symlink swapped for a folder": [member("a", DIR), link("a", "/tmp"), member("a/out", data=b"x")],
    "hard link by parent folder": [link("a", "../../canary", LNK)],
    "hard link absolute": [link("a", "/etc/passwd", LNK)],
    "hard link through symlink": [link("s", "../.."), link("a", "s/canary", LNK)],
    "hard link to nothing": [link("a", "b", LNK)],
    "hard link to a folder": [member("b", DIR), link("a", "b", LNK)],
    "hard link to itself": [link("a", "a", LNK)],
    "whiteout through symlink": [link("s", "../.."), member("s/.wh.canary")],
    "opaque mark through symlink": [link("s", "../.."), member("s/.wh..wh..opq")],
    "whiteout of the parent": [member("a/.wh...")],
    "whiteout of itself": [member(".wh..")],
    "whiteout of nothing": [member(".wh.")],
    "whiteout with content": [member(".wh.a", data=b"x")],
    "whiteout as symlink": [link(".wh.a", "/etc")],
    "character device": [member("null", CHR, devmajor=1, devminor=3)],
    "fake whiteout": [member("a", CHR, devmajor=0, devminor=0)],
    "block device": [member("sda", BLK, devmajor=8)],
    "same name twice": [member("a", data=b"1"), member("a", data=b"2")],
    "file below a file": [member("a", data=b"1"), member("a/b", data=b"2")],
    "name of 256 bytes": [member("n" * 256, data=b"x")],
    "path of 5000 bytes": [member("/".join(["d" * 99] * 50), data=b"x")],
    "path of 1 MB": [member("d/" * 500000 + "x", data=b"x")],
    "root as a file": [member(".", data=b"x")],
    "root as a symlink": [link("./", "/tmp")],
    "unknown kind": [member("a", b"Z")],
    "sparse": [member("a", data=b"x", pax_headers={"GNU.sparse.major": "1"})],
    "time without end": [member("a", pax_headers={"mtime": "1e99999999"})],
    "time out of range": [member("a", pax_headers={"mtime": "9" * 19})],
    "owner out of range": [member("a", uid=1 << 40)],
    "size of a lie": [member("a", data=b"x", pax_headers={"size": "1" + "0" * 15})],
    "zero byte in a link": [link("a", "b", SYM), member("c", SYM, linkname="x", pax_headers={"linkpath": "x\0y"})],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(case: str, place: Path) -> None:
    """One clear line, and not a byte outside the tree."""
    outside = place / "outside"
    outside.mkdir()
    (outside / "canary").write_text("alive")
    archive = make_tar(place / "x.tar", *HOSTILE[case])
    before = sorted(os.listdir("/tmp"))
    with pytest.raises(InvalidInput) as refused:
        call("apply", archive, outside / "layers" / "tree")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert (outside / "canary").read_text() == "alive" and os.stat(outside / "canary").st_nlink == 1
    assert sorted(os.listdir(outside)) == ["canary", "layers"] and not (outside / ".wh.canary").exists()
    assert "out" not in set(os.listdir("/tmp")) - set(before)


def damaged(name: str, data: bytes) -> bytes:
    return {
        "cut in a header": data[:300],
        "cut in content": data[:1700],
        "cut before the padding": data[: 512 + 1800],
        "flipped bit": bytes([data[0] ^ 1]) + data[1:],
        "noise": random.Random(1).randbytes(4096),
        "files behind the end": data + bytes(512) + data,
    }[name]


@pytest.mark.parametrize(
    "how",
    ["cut in a header", "cut in content", "cut before the padding", "flipped bit", "noise", "files behind the end"],
)
def test_damaged_archives_are_refused(how: str, place: Path) -> None:
    good = make_tar(place / "good.tar", member("a", data=b"x" * 1800)).read_bytes()
    good = good[: 512 + 2048]  # without the end
    call("apply", (place / "good.tar"), place / "tree")
    (place / "bad.tar").write_bytes(damaged(how, good))
    with pytest.raises(InvalidInput):
        call("apply", place / "bad.tar", place / "tree2")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 8))
def test_a_damaged_archive_is_read_or_refused(seed: int, flips: int, place: Path) -> None:
    """Whatever bytes: laid out, or one of the named errors; no other exception, nothing outside."""
    data = bytearray(make_tar(place / "x.tar", *SAMPLE).read_bytes()[: 512 * 40])
    dice = random.Random(seed)
    for _ in range(flips):
        at = dice.randrange(len(data)) // 512 * 512 + dice.choice(
            [0, 100, 108, 116, 124, 130, 136, 156, 157, dice.randrange(512)]
        )
        if at < len(data):
            data[at] = dice.choice(b"0123457xgLKS./\0\xff\x80")
        if dice.random() < 0.7:  # with a checksum that holds
            start = at // 512 * 512
            block = data[start : start + 512]
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            data[start : start + 512] = block
    (place / "x.tar").write_bytes(data)
    name = uuid.uuid4().hex
    try:
        if userns.host_ids().kind == "root":
            layer.apply(str(place / "x.tar"), str(place / name / "tree"))
        else:  # reading needs no ids: walk it here, applying is tried by the other tests
            with open(place / "x.tar", "rb") as file:
                for entry in tar.Reader(file.fileno()):
                    assert entry.size >= 0
    except WorkbenchError as error:
        assert "\n" not in str(error)
    finally:
        files.discard(str(place / name))
    assert set(os.listdir(place)) == {"x.tar"}


SAMPLE = [
    member("./", DIR, mtime=1500000000),
    member("etc", DIR, mtime=1.5, mode=0o1777, uid=3, gid=4),
    member("etc/passwd", data=b"root\n" * 300, uid=0, gid=42, mtime=1600000000.25),
    member("etc/.wh.gone"),
    member("usr", DIR),
    member("usr/.wh..wh..opq"),
    member("usr/ping", data=b"ELF", mode=0o4755, uid=6, gid=7),
    link("usr/zz", "usr/ping", LNK),
    link("usr/link", "../../../../etc/shadow"),
    member("usr/pipe", FIFO, mode=0o622),
    member("ünï", data=b"utf-8"),
    member("raw-\udcff\udcfe", data=b"not utf-8"),
    member("l/" + "o" * 200, data=b"long", mtime=-1),
    member("empty", mode=0o000),
]


def test_a_layer_round_trip(place: Path, ids: str) -> None:
    """From another writer's tar to a tree, to our tar, and to a tree again; each as the kernel shows it."""
    archive = make_tar(place / "x.tar", *SAMPLE)
    data = archive.read_bytes()
    found = call("lay_out", archive, place / "one", place / "record")
    assert found == {"diff_id": "sha256:" + hashlib.sha256(data).hexdigest(), "size": len(data)}
    again = call("remake", place / "one", place / "record", place / "again.tar")
    assert again == found and (place / "again.tar").read_bytes() == data
    packed = call("pack", place / "one", place / "ours.tar")
    second = call("lay_out", place / "ours.tar", place / "two", place / "record2")
    assert second == packed and not (place / "record2").exists()
    assert call("pack", place / "two") == packed

    theirs = listing(place / "x.tar")
    ours = listing(place / "ours.tar")
    assert set(ours) == set(theirs) | {"l"}
    for name, info in theirs.items():
        twin = ours[name]
        if "/.wh." in name:
            continue
        assert (twin.type, twin.linkname) == (info.type, info.linkname), name
        if info.type != LNK:
            assert (twin.uid, twin.gid, twin.size) == (info.uid, info.gid, info.size), name
            assert twin.mtime == pytest.approx(info.mtime, abs=1e-6), name
            assert info.type == SYM or twin.mode == info.mode, name
    assert (place / "one.owners").exists() == (ids == "single")


def test_a_tree_as_overlayfs_wants_it(place: Path) -> None:
    """Whiteouts and opaque folders, as the root of the user's namespace sees them."""
    archive = make_tar(place / "x.tar", *SAMPLE)
    call("apply", archive, place / "tree")
    gone = os.lstat(place / "tree/etc/gone")
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    assert os.getxattr(place / "tree/usr", "user.overlay.opaque") == b"y"
    assert not os.listxattr(place / "tree/etc")
    assert os.readlink(place / "tree/usr/link") == "../../../../etc/shadow"
    assert os.stat(place / "tree/usr/ping").st_ino == os.stat(place / "tree/usr/zz").st_ino
    assert stat.S_IMODE(os.stat(place / "tree/usr/ping").st_mode) == 0o4755
    if userns.host_ids().kind == "root":
        assert os.stat(place / "tree/usr/ping").st_uid == 6


def test_whiteouts_hide_the_layers_below_only(place: Path) -> None:
    """layer.md: a whiteout never takes what its own layer brings, in whatever order they come."""
    archive = make_tar(
        place / "x.tar", member(".wh.file"), member("file", data=b"new"), member("folder", DIR),
        member("folder/new", data=b"1"), member(".wh.folder"),
    )  # fmt: skip
    call("lay_out", archive, place / "tree", place / "record")
    assert (place / "tree/file").read_bytes() == b"new" and (place / "tree/folder/new").read_bytes() == b"1"
    assert os.getxattr(place / "tree/folder", "user.overlay.opaque") == b"y"
    assert call("remake", place / "tree", place / "record")["diff_id"] == _digest(archive)


def test_the_last_entry_of_a_folder_counts(place: Path, ids: str) -> None:
    """A folder may come twice, after what is in it too: nothing of an earlier entry is left but its mark."""
    first = {"SCHILY.xattr.user.one": "1", "SCHILY.xattr.user.both": "1", "SCHILY.xattr.user.overlay.redirect": "/x"}
    second = {"SCHILY.xattr.user.two": "2", "SCHILY.xattr.user.both": "2"}
    archive = make_tar(
        place / "x.tar", member("made/by/its/file", data=b"1"), member("d", DIR, mode=0o1777, uid=70000, gid=7, mtime=9,
        pax_headers=first), member("d/.wh..wh..opq"), member("./", DIR, mode=0o700, mtime=8), member("d/file"),
        member("d/", DIR, mode=0o750, mtime=5, pax_headers=second), member("made/by", DIR, mode=0o711, mtime=6),
        member("./", DIR, mode=0o555, mtime=7),
    )  # fmt: skip
    call("lay_out", archive, place / "t", place / "record")
    assert set(os.listxattr(place / "t/d")) == {"user.both", "user.overlay.opaque", "user.two"}
    assert os.getxattr(place / "t/d", "user.both") == b"2"
    call("pack", place / "t", place / "y.tar")
    found = {name: (info.mode, info.uid, info.gid, info.mtime) for name, info in listing(place / "y.tar").items()}
    assert {name: found[name] for name in (".", "d", "made", "made/by", "made/by/its")} == {
        ".": (0o555, 0, 0, 7), "d": (0o750, 0, 0, 5), "made": (0o755, 0, 0, 0), "made/by": (0o711, 0, 0, 6),
        "made/by/its": (0o755, 0, 0, 0),
    }  # fmt: skip
    assert call("remake", place / "t", place / "record")["diff_id"] == _digest(archive)
    assert sorted(path.name for path in place.iterdir()) == ["record", "t", "x.tar", "y.tar"]


def test_a_path_as_deep_as_linux_has(place: Path) -> None:
    """Made and entered one by one, also from the middle on; its cost is that of its length."""
    names = ["d"] * 2000
    deep, beside = "/".join(names), "/".join([*names[:1000], *["e"] * 1000])
    archive = make_tar(place / "x.tar", member(f"{deep}/f", data=b"1"), member(f"{beside}/f", data=b"2"))
    call("lay_out", archive, place / "t", place / "record")
    call("pack", place / "t", place / "y.tar")
    found = listing(place / "y.tar")
    assert len(found) == 1 + 2000 + 1000 + 2 and f"{deep}/f" in found and f"{beside}/f" in found


def test_shared_whiteouts_are_no_hard_links(place: Path) -> None:
    """overlayfs makes all whiteouts of a mount links of one inode."""
    call("apply", make_tar(place / "x.tar", member(".wh.a")), place / "tree")
    os.link(place / "tree/a", place / "tree/b", follow_symlinks=False)
    call("pack", place / "tree", place / "y.tar")
    assert [info.type for info in listing(place / "y.tar").values()] == [DIR, b"0", b"0"]


def test_the_order_of_making_and_the_umask_do_not_matter(place: Path) -> None:
    dice = random.Random(5)
    names = [f"{letter}{number}" for letter in "zay" for number in range(5)]
    digests = set()
    for round_, umask in enumerate((0o022, 0o077, 0o000)):
        dice.shuffle(names)
        old = os.umask(umask)
        try:
            tree = place / f"tree{round_}"
            members = [member(name[0], DIR) for name in ("z1", "a1", "y1")]
            members += [member(f"{name[0]}/{name}", data=name.encode()) for name in names]
            call("apply", make_tar(place / "x.tar", *members), tree)
            digests.add(call("pack", tree, place / f"{round_}.tar")["diff_id"])
        finally:
            os.umask(old)
    assert len(digests) == 1 and len({_digest(place / f"{n}.tar") for n in range(3)}) == 1


def test_the_order_in_a_tar(place: Path) -> None:
    """A folder, its whiteouts, its other files, then its folders, each sorted by bytes; not as the disk lists them."""
    folders = sorted(random.Random(1).sample(range(10000), 30), key=str)
    members = [member(f"{n}/f{n + m}", data=b"x") for n in reversed(folders) for m in (3, 1, 2)]
    members += [member(f"{folders[0]}/.wh.{n}") for n in (30, 10, 20)] + [member(f"{folders[0]}/.wh..wh..opq")]
    call("apply", make_tar(place / "x.tar", *members), place / "t")
    call("pack", place / "t", place / "y.tar")
    first = [".wh..wh..opq", ".wh.10", ".wh.20", ".wh.30"]
    expected = ["."]
    for n in folders:
        inside = (first if n == folders[0] else []) + sorted(f"f{n + m}" for m in (1, 2, 3))
        expected += [str(n), *(f"{n}/{name}" for name in inside)]
    assert list(listing(place / "y.tar")) == expected


def test_owners_of_hard_links(place: Path, ids: str) -> None:
    """The name that our order puts first has the owner, whichever the archive began with."""
    members = [member("m", data=b"x", uid=5, gid=6), link("a", "m", LNK), link("z", "a", LNK)]
    call("apply", make_tar(place / "x.tar", *members), place / "t")
    call("pack", place / "t", place / "y.tar")
    found = listing(place / "y.tar")
    assert [(found[n].type, found[n].uid, found[n].linkname) for n in "amz"] == [
        (b"0", 5, ""),
        (LNK, 5, "a"),
        (LNK, 5, "a"),
    ]


def test_known_bytes(place: Path) -> None:
    """The form of our tar is a promise: another digest here means that every layer's ID changes."""
    tree = place / "tree"
    members = [member("d", DIR, mtime=1), member("d/" + "f" * 120, data=b"hi", mtime=2.5, uid=3000000), member(".wh.x")]
    call("apply", make_tar(place / "x.tar", *members), tree)
    assert call("pack", tree) == {
        "diff_id": "sha256:9c4a127139b2f13a1d66da1972c59f25388ae16e817707533fd5c2c683bb778f",
        "size": 4608,
    }  # fmt: skip


def test_gnu_tar_reads_it(place: Path) -> None:
    call("apply", make_tar(place / "x.tar", *SAMPLE), place / "tree")
    call("pack", place / "tree", place / "y.tar")
    done = subprocess.run(
        ["tar", "--list", "--verbose", "--numeric-owner", "--quoting-style=literal", "-f", place / "y.tar"],
        capture_output=True, check=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert not done.stderr
    assert re.search(rb"-rwsr-xr-x 6/7 +3 1970-01-01 00:00 usr/ping\n", done.stdout)
    assert b"raw-\xff\xfe" in done.stdout and b" l/" + b"o" * 200 in done.stdout


def test_times_are_clamped_only_when_asked(place: Path) -> None:
    call("apply", make_tar(place / "x.tar", member("a", mtime=5.5), member("b", mtime=1e9)), place / "tree")
    call("pack", place / "tree", place / "exact.tar")
    call("pack", place / "tree", place / "clamped.tar", 100)
    assert [listing(place / "exact.tar")[name].mtime for name in "ab"] == [5.5, 1e9]
    assert [listing(place / "clamped.tar")[name].mtime for name in "ab"] == [5, 100]
    assert b"mtime" not in (place / "clamped.tar").read_bytes()


def test_attributes_are_kept(place: Path, ids: str) -> None:
    capability = "0x0100000200200000000000000000000000000000"  # setcap cap_net_raw+ep
    raw = bytes.fromhex(capability[2:]).decode("latin-1")
    pax = {
        "SCHILY.xattr.security.capability": raw,
        "SCHILY.xattr.user.note": "text with = and \n",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        "SCHILY.xattr.security.selinux": "label",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
    }
    archive = place / "x.tar"
    call(
        "apply",
        make_tar(archive, member("f", data=b"1", pax_headers=pax), member("d", DIR, pax_headers=pax)),
        place / "t",
    )
    kept = {"user.note", "user.overlay.overlay.opaque", "user.overlay.overlay.redirect"}
    assert set(os.listxattr(place / "t/d")) - {"security.capability"} == kept
    call("pack", place / "t", place / "y.tar")
    for name in "fd":
        headers = listing(place / "y.tar")[name].pax_headers
        assert {key: value for key, value in pax.items() if "selinux" not in key and "trusted" not in key} == headers
    assert (
        call("lay_out", place / "y.tar", place / "t2", place / "r")["diff_id"] == call("pack", place / "t2")["diff_id"]
    )
    assert not (place / "r").exists()


def test_notes_of_overlayfs_do_not_count(place: Path) -> None:
    call("apply", make_tar(place / "x.tar", member("d", DIR, uid=0)), place / "t")
    before = call("pack", place / "t")
    os.setxattr(place / "t/d", "user.overlay.origin", b"\0\xfb")
    os.setxattr(place / "t/d", "user.overlay.impure", b"y")
    assert call("pack", place / "t") == before


def test_what_no_layer_may_hold(place: Path) -> None:
    (place / "t" / ".wh.x").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="means a removed file"):
        call("pack", place / "t")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_devices_are_not_packed(place: Path) -> None:
    (place / "t").mkdir()
    os.mknod(place / "t/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with pytest.raises(InvalidInput, match="/null is a device"):
        call("pack", place / "t")


def test_sockets_are_left_out(place: Path) -> None:
    import socket

    (place / "t").mkdir()
    os.utime(place / "t", (1, 1))
    before = call("pack", place / "t")
    here = os.getcwd()
    os.chdir(place / "t")  # sun_path is short
    try:
        socket.socket(socket.AF_UNIX).bind("s")
    finally:
        os.chdir(here)
    os.utime(place / "t", (1, 1))
    assert call("pack", place / "t") == before


def test_a_new_tree_is_asked_for(place: Path) -> None:
    (place / "t").mkdir()
    (place / "t/x").write_text("")
    with pytest.raises(Conflict, match="is not empty"):
        call("apply", make_tar(place / "x.tar", member("a")), place / "t")


def test_a_pipe_is_read_too(place: Path) -> None:
    data = make_tar(place / "x.tar", *SAMPLE).read_bytes()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        for start in range(0, len(data), 777):
            os.write(write, data[start : start + 777])
        os._exit(0)
    os.close(write)
    try:
        found = userns.call("workbench.images.layer:apply", read, str(place / "t"), fds=(read,))
    finally:
        os.close(read)
        os.waitpid(pid, 0)
    assert found["diff_id"] == "sha256:" + hashlib.sha256(data).hexdigest()


def test_deep_trees(place: Path) -> None:
    """As deep as a path can be: laid out, packed and removed, with few descriptors and no recursion."""
    deep = "d/" * 2000 + "f"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    try:
        found = call("lay_out", make_tar(place / "x.tar", member(deep, data=b"deep")), place / "t", place / "r")
        assert call("remake", place / "t", place / "r") == found
        call("pack", place / "t", place / "y.tar")
        assert deep in listing(place / "y.tar")
        call("remove", place / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert not (place / "t").exists()


def test_remove_takes_what_no_path_reaches(place: Path) -> None:
    """A container can make folders deeper than any path; they go too, and names of ours that are taken."""
    (place / "t" / ".deep-0").mkdir(parents=True)
    (place / "t" / ".deep-1").write_text("x")
    here = os.open(place / "t", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d" * 9, dir_fd=here)
        below = os.open("d" * 9, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    call("remove", place / "t")
    assert not (place / "t").exists()
    call("remove", place / "t")


def test_memory_does_not_follow_the_size(place: Path) -> None:
    """A file of 300 MB in and out, in a process that stays small."""
    with open(place / "big", "wb") as file:
        file.truncate(300 << 20)
    subprocess.run(["tar", "-cf", place / "x.tar", "-C", place, "big"], check=True)
    script = (
        "import sys; from workbench.images import layer; "
        "from workbench.linux import userns; layer.apply(*sys.argv[1:3]); layer.pack(*sys.argv[2:4]); "
        # Not getrusage's maximum: a child that was just forked has its parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, place / "x.tar", place / "t", place / "y.tar"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 80_000
    assert os.path.getsize(place / "y.tar") == (300 << 20) + 4 * 512


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and not name.startswith(".wh.") and len(name.encode()) < 100
)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members of an archive: folders, then what is in them; each name once."""
    folders = draw(st.lists(NAMES, unique=True, max_size=4))
    folders += [f"{folder}/{name}" for folder in folders[:2] for name in draw(st.lists(NAMES, unique=True, max_size=2))]
    taken = set(folders)
    members, regular = [], []
    ids, times = st.integers(0, 65535), st.integers(0, 2**33).map(lambda t: t / 4)
    for folder in folders:
        members.append(
            member(folder, DIR, mode=draw(st.integers(0, 0o7777)), uid=draw(ids), gid=draw(ids), mtime=draw(times))
        )
        if draw(st.booleans()):
            members.append(member(f"{folder}/.wh..wh..opq"))
    for name in draw(st.lists(NAMES, unique=True, max_size=10)):
        parent = draw(st.sampled_from(["", *(f"{folder}/" for folder in folders)]))
        if (path := parent + name) in taken:
            continue
        taken.add(path)
        kind = draw(st.sampled_from(["file", "file", "symlink", "hard link", "whiteout", "fifo"]))
        common = {"uid": draw(ids), "gid": draw(ids), "mtime": draw(times)}
        if kind == "file" or (kind == "hard link" and not regular):
            regular.append(path)
            members.append(
                member(path, data=draw(st.binary(max_size=1200)), mode=draw(st.integers(0, 0o7777)), **common)
            )
        elif kind == "symlink":
            members.append(member(path, SYM, linkname=draw(NAMES), **common))
        elif kind == "hard link":
            members.append(link(path, draw(st.sampled_from(regular)), LNK))
        elif kind == "fifo":
            members.append(member(path, FIFO, **common))
        else:
            members.append(member(f"{parent}.wh.{name}"))
    return members


def test_any_tree_keeps_its_identity(place: Path, ids: str) -> None:
    """The diff_id can be shown again from the tree; and pack(apply(x)) == x for what pack wrote."""
    examples = 100 if ids == "root" else 12  # elsewhere each call is a process
    check = settings(max_examples=examples, deadline=None)(given(trees())(lambda tree: keeps_its_identity(tree, place)))
    check()


def keeps_its_identity(members: list[tuple[tarfile.TarInfo, bytes]], place: Path) -> None:
    base = place / uuid.uuid4().hex
    base.mkdir()
    try:
        found = call("lay_out", make_tar(base / "x.tar", *members), base / "a", base / "r")
        assert found["diff_id"] == _digest(base / "x.tar")
        packed = call("pack", base / "a", base / "y.tar")
        assert packed["diff_id"] == _digest(base / "y.tar")
        assert call("lay_out", base / "y.tar", base / "b", base / "r2") == packed
        assert not (base / "r2").exists()
        theirs, ours = listing(base / "x.tar"), listing(base / "y.tar")
        for name, info in theirs.items():
            if info.type == DIR or (info.type == b"0" and ".wh." not in name and ours[name].type == b"0"):
                assert (info.uid, info.gid, info.mode, info.size) == (
                    ours[name].uid, ours[name].gid, ours[name].mode, ours[name].size,
                )  # fmt: skip
    finally:
        files.discard(str(base))


def _digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
