"""The store: what was acknowledged stays, whatever is killed, full or damaged; the rest goes."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import call, make_tar, member

from workbench.images import config, files
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.linux import userns
from workbench.model import Conflict, Corrupt, HostLacks, Image, InvalidInput, NotFound


def tree(store: Store, folder: Path, *names: str) -> Path:
    """A small tree in staging: a folder and a file for each name."""
    path = folder / "tree"
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "file").write_text(name * 1000)
        os.utime(path / name / "file", (1, 1))
        os.utime(path / name, (1, 1))
    os.utime(path, (1, 1))
    return path


def add(store: Store, *names: str) -> str:
    with store.staging() as folder:
        return store.add_tree(tree(store, folder, *names))


def image(store: Store, *names: str, name: str = "") -> Image:
    made = store.add_image(config.encode(diff_ids=[add(store, layer) for layer in names]))
    if name:
        Refs(store.home).set(name, made.id)
    return made


def clean(store: Store) -> None:
    """Nothing to find, nothing in staging."""
    assert store.check() == [] and os.listdir(store.home / "tmp") == []


# -- the folder


def test_a_home_is_private(place: Path) -> None:
    old = os.umask(0)
    try:
        store = Store(place / "a" / "b").open()
    finally:
        os.umask(old)
    for path in [store.home, *store.home.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    store.home.chmod(0o755)
    Store(place / "a" / "b").open()
    assert stat.S_IMODE(store.home.stat().st_mode) == 0o700


def test_a_home_of_somebody_else(place: Path) -> None:
    if os.geteuid() == 0:
        (place / "theirs").mkdir(mode=0o700)
        os.chown(place / "theirs", 1, 1)
        home, kind = place / "theirs", Conflict
    else:
        home, kind = Path("/usr"), Conflict
    before = sorted(os.listdir(home))
    with pytest.raises(kind, match="set WORKBENCH_HOME") as refused:
        Store(home).open()
    assert "\n" not in str(refused.value) and sorted(os.listdir(home)) == before


@pytest.mark.parametrize("home", ["/proc/x", "/dev/null", "/dev/null/x"])
def test_a_home_that_cannot_be(home: str) -> None:
    with pytest.raises((HostLacks, Conflict)) as refused:
        Store(home).open()
    assert "\n" not in str(refused.value)


# -- layers and images


def test_a_layer_and_its_tar(store: Store, place: Path, ids: str) -> None:
    one = add(store, "a", "b")
    assert add(store, "b", "a") == one and store.layers() == [one]
    assert (store.layer(one) / "a/file").read_text() == "a" * 1000
    store.write_tar(one, place / "x.tar")
    assert config.digest_of((place / "x.tar").read_bytes()) == one
    other = Store(place / "other").open()
    assert other.add_tar(place / "x.tar", one) == one
    clean(store)
    clean(other)


def test_an_archive_of_others(store: Store, place: Path, ids: str) -> None:
    """GNU tar's order, padding and owners: the same bytes come out again, and ``check`` knows that."""
    members = [member("b/y", data=b"y", uid=7, gid=8), member("a", data=b"x" * 5000, uid=1000, mode=0o4711)]
    path = make_tar(place / "x.tar", *members)
    path.write_bytes(path.read_bytes() + bytes(512 * 7))
    digest = store.add_tar(path)
    assert digest == config.digest_of(path.read_bytes()) and store.record(digest)
    store.write_tar(digest, place / "y.tar")
    assert (place / "y.tar").read_bytes() == path.read_bytes()
    clean(store)


def test_owners_of_a_single_id(store: Store, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only one id can be had, the others stand beside the layer; its identity is the same."""
    call("apply", make_tar(place / "x.tar", member("f", data=b"1", uid=5, gid=6, mode=0o2755)), place / "t")
    call("pack", place / "t", place / "ours.tar")
    if userns.host_ids().kind == "single":  # already packed with what stands beside
        assert (place / "t.owners").exists()
    monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    with store.staging() as staging:
        call("apply", place / "ours.tar", staging / "tree")
        digest = store.add_tree(staging / "tree")
    assert digest == config.digest_of((place / "ours.tar").read_bytes())
    assert store.layer(digest).joinpath("f").stat().st_uid == os.geteuid()
    assert json.loads((store.home / "layers" / f"{digest[7:]}.owners").read_text()) == {"f": {"owner": [5, 6]}}
    assert store.record(digest) is None
    store.write_tar(digest, place / "again.tar")
    assert (place / "again.tar").read_bytes() == (place / "ours.tar").read_bytes()
    clean(store)
    assert store.gc()["layers"] == 1 and os.listdir(store.home / "layers") == []


def test_a_wrong_digest_leaves_nothing(store: Store, place: Path) -> None:
    with pytest.raises(Corrupt, match="not sha256:00000"):
        store.add_tar(make_tar(place / "x.tar", member("a", data=b"1", uid=9)), "sha256:" + "0" * 64)
    with pytest.raises(InvalidInput):
        store.add_tar(make_tar(place / "x.tar", member("a", data=b"1", uid=9), member("../b")))
    assert store.layers() == []
    clean(store)


def test_images(store: Store) -> None:
    one = image(store, "a", "b")
    assert store.image(one.id) == one and store.images() == [one] and store.size(one) == 2 * 3584
    assert image(store, "a", "b") == one
    with pytest.raises(NotFound):
        store.image("sha256:" + "0" * 64)
    with pytest.raises(NotFound):
        store.add_image(config.encode(diff_ids=["sha256:" + "0" * 64]))
    for digest in ("", "sha256:../../x", "latest"):
        with pytest.raises(InvalidInput):
            store.image(digest)
        with pytest.raises(InvalidInput):
            store.layer(digest)
    clean(store)


def test_two_images_are_newest_first(store: Store) -> None:
    days = [store.add_image(config.encode(diff_ids=[], created=f"2025-01-0{n}T00:00:00Z")) for n in (2, 3, 1)]
    assert [found.created[9] for found in store.images()] == ["3", "2", "1"] and len(days) == 3


# -- kill -9, at each step


#: What a process does to files, as Python's audit hooks see it just before (docs: "Audit events table").
STEPS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "fcntl.flock", "os.listdir", "os.chmod", "os.link"}


def die_at(number: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child that is killed at its step of that number; whether it got that far."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def step(event: str, _: object) -> None:
            nonlocal count
            if event in STEPS:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(step)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_each_step_of_adding(store: Store) -> None:
    """Layer, image and name: after each kill the store is clean, and what was named is whole."""
    image(store, "old", name="keep")
    home = store.home

    def work() -> None:
        mine = Store(home).open()
        with mine.lease():
            image(mine, "x", "y", name="new")

    number, stride = 1, 1 if userns.host_ids().kind == "root" else 5
    while die_at(number, work):
        again = Store(home).open()
        clean(again)
        named = Refs(home).all()
        assert "keep:latest" in named
        for image_id in named.values():
            assert all(again.has_layer(diff_id) for diff_id in again.image(image_id).diff_ids)
        assert again.gc()["bytes"] >= 0
        clean(again)
        number += stride
    assert number > 100
    assert set(Refs(home).all()) == {"keep:latest", "new:latest"}


def test_killed_at_each_step_of_gc(store: Store) -> None:
    image(store, "old", name="keep")
    home, number = store.home, 1
    stride = 1 if userns.host_ids().kind == "root" else 3
    while True:
        image(store, "x", "y")
        add(store, "loose")
        killed = die_at(number, lambda: Store(home).gc() and None)
        again = Store(home).open()
        clean(again)
        assert [again.image(i).diff_ids for i in Refs(home).all().values()] == [(add(again, "old"),)]
        if not killed:
            break
        number += stride
    assert number > 20 and len(store.layers()) == 1 == len(store.blobs())


def test_killed_at_random(store: Store) -> None:
    """A writer that says what it has done, killed at ten moments; what it said is there."""
    script = """
import sys, itertools
from workbench.images import config; from workbench.images.refs import Refs; from workbench.images.store import Store
store = Store(sys.argv[1]).open()
for number in itertools.count(int(sys.argv[2])):
    with store.lease(), store.staging() as staging:
        (staging / "t" / f"d{number}").mkdir(parents=True)
        (staging / "t" / f"d{number}" / "f").write_bytes(bytes(50000))
        image = store.add_image(config.encode(diff_ids=[store.add_tree(staging / "t")]))
        Refs(store.home).set(f"n{number}", image.id)
        print(f"n{number}", image.id, flush=True)
"""
    dice, said = random.Random(3), {}
    for round_ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(store.home), str(round_ * 1000)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        first = process.stdout.readline()
        time.sleep(dice.random() * 0.25)
        process.kill()
        rest, _ = process.communicate()
        for line in (first + rest).splitlines():
            if len(line.split()) == 2 and len(line.split()[1]) == 71:
                said[line.split()[0] + ":latest"] = line.split()[1]
        clean(Store(store.home).open())
        store.gc()
    named = Refs(store.home).all()
    assert len(said) >= 10 and said.items() <= named.items() and len(named) <= len(said) + 10
    assert len(store.images()) == len(named)


def test_staging_of_the_living_stays(store: Store) -> None:
    with store.staging() as mine:
        (mine / "x").write_text("")
        Store(store.home).open()
        assert store.check(repair=True) == [] and (mine / "x").exists()
    assert not mine.exists()


# -- several at once


WRITER = """
import sys
from workbench.images import config; from workbench.images.refs import Refs; from workbench.images.store import Store
store = Store(sys.argv[1]).open()
for number in range(8):
    with store.lease(), store.staging() as staging:
        for name in ("same", sys.argv[2]):
            (staging / name / f"d{number}").mkdir(parents=True)
            (staging / name / f"d{number}" / "f").write_text(name * 999)
        layers = []
        for name in ("same", sys.argv[2]):
            for path in (staging / name / f"d{number}" / "f", staging / name / f"d{number}", staging / name):
                import os; os.utime(path, (1, 1))
            layers.append(store.add_tree(staging / name))
        image = store.add_image(config.encode(diff_ids=layers))
        Refs(store.home).set(f"{sys.argv[2]}/{number}", image.id)
        Refs(store.home).set("both", image.id)
"""


def test_two_writers_and_gc(store: Store) -> None:
    """The same layers from two processes are one, and gc beside them takes nothing that they need."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(store.home), name]) for name in ("one", "two")]
    while any(writer.poll() is None for writer in writers):
        store.gc()
    assert [writer.returncode for writer in writers] == [0, 0]
    named = Refs(store.home).all()
    assert len(named) == 17 and len(store.layers()) == 8 * 3
    clean(store)
    assert store.gc() == {"layers": 0, "blobs": 0, "bytes": 0}


def test_gc_and_leases(store: Store) -> None:
    kept, named, used = image(store, "a"), image(store, "b", name="x"), image(store, "c")
    loose = add(store, "loose")
    with store.lease(kept.id, loose) as lease:
        assert store.gc([used.id]) == {"layers": 0, "blobs": 0, "bytes": 0}
        with Store(store.home).lease():
            pass
        lease.add("sha256:" + "0" * 64)
        assert Store(store.home).open().gc(iter([used.id]))["blobs"] == 0
        with store.staging() as folder:
            made = store.add_tree(tree(store, folder, "made meanwhile"))
        assert store.gc([used.id])["layers"] == 0 and store.has_layer(made)
    gone = store.gc([used.id])
    assert (gone["layers"], gone["blobs"]) == (3, 1) and gone["bytes"] > 3 * 3584
    assert {i.id for i in store.images()} == {named.id, used.id} and len(store.layers()) == 2
    assert store.gc()["layers"] == 1
    clean(store)


def test_a_lease_dies_with_its_process(store: Store) -> None:
    made = image(store, "a")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Store(store.home).lease(made.id):
            os.write(write, b"1")
            time.sleep(60)
        os._exit(0)
    assert os.read(read, 1) == b"1"
    assert store.gc()["layers"] == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    assert store.gc()["layers"] == 1
    Store(store.home).open()
    clean(store)


def test_a_name_waits_for_gc(store: Store) -> None:
    """A name given while gc is at work either comes first or is refused: it never dangles."""
    made = image(store, "a")
    pid = 0
    with files.locked(str(store.home / "blobs"), exclusive=True):
        pid = os.fork()
        if pid == 0:
            try:
                Refs(store.home).set("x", made.id)
            except NotFound:
                os._exit(7)
            os._exit(0)
        time.sleep(0.3)
        assert Refs(store.home).all() == {}
        os.unlink(store.home / "blobs/sha256" / made.id[7:])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert Refs(store.home).all() == {}


# -- damage


def _truncate_blob(store: Store, made: Image) -> None:
    os.truncate(store.home / "blobs/sha256" / made.id[7:], 40)


def _remove_layer(store: Store, made: Image) -> None:
    files.discard(str(store.layer(made.diff_ids[0])))


def _change_file(store: Store, made: Image) -> None:
    (store.layer(made.diff_ids[0]) / "x/file").write_text("y" * 1000)


def _change_mode(store: Store, made: Image) -> None:
    (store.layer(made.diff_ids[0]) / "x").chmod(0o777)


def _wrong_owner(store: Store, made: Image) -> None:
    tree = store.layer(made.diff_ids[0])
    if userns.host_ids().kind != "single":
        userns.call("os:chown", str(tree / "x/file"), 1, 1)
    else:  # owners stand beside the layer
        tree.with_name(tree.name + ".owners").write_text('{"x/file": {"owner": [1, 1]}}')


def _strange_owners(store: Store, made: Image) -> None:
    tree = store.layer(made.diff_ids[0])
    tree.with_name(tree.name + ".owners").write_text('{"x/file": {"xattrs": {"user.a": "A"}}}')


def _a_link(store: Store, made: Image) -> None:
    tree = store.layer(made.diff_ids[0])
    store.move(str(tree), str(store.home.parent / "moved"))
    tree.symlink_to(store.home.parent / "moved")


def _wrong_name(store: Store, made: Image) -> None:
    blobs = store.home / "blobs/sha256"
    (blobs / made.id[7:]).rename(blobs / ("0" * 64))


def _dangling(store: Store, made: Image) -> None:
    (store.home / "refs/x/latest").write_text("sha256:" + "0" * 64 + "\n")


def _no_ref(store: Store, made: Image) -> None:
    (store.home / "refs/x/latest").write_text("")


def _strange_ref(store: Store, made: Image) -> None:
    (store.home / "refs/x/-tag").write_text(made.id)


def _half_staging(store: Store, made: Image) -> None:
    (store.home / "tmp/0123/half").mkdir(parents=True)
    (store.home / "tmp/0123.lease").write_text(made.id)


def _stray(store: Store, made: Image) -> None:
    (store.home / "blobs/sha256/note.txt").write_text("x")
    (store.home / "layers/latest").mkdir()
    (store.home / "layers/file").write_text("x")


DAMAGE = {
    _truncate_blob: (["blob", "name x"], 1), _remove_layer: (["image", "name x"], 1),
    _change_file: (["layer", "image", "name x"], 1), _change_mode: (["layer", "image", "name x"], 1),
    _wrong_owner: (["layer", "image", "name x"], 1), _strange_owners: (["layer", "image", "name x"], 1),
    _a_link: (["layer", "image", "name x"], 1),
    _wrong_name: (["blob", "name x"], 1), _dangling: (["name x:latest"], 1), _no_ref: (["name x/latest"], 1),
    _strange_ref: (["name x/-tag"], 2), _half_staging: (["staging 0123", "staging 0123.lease"], 2),
    _stray: (["blob note.txt", "layer file", "layer latest"], 2),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_found_and_mended(damage: Callable[[Store, Image], None], store: Store, ids: str) -> None:
    """Found without repair and left alone; mended with it; then clean, the rest as it was, and built anew."""
    image(store, "other", name="other")
    made = image(store, "x", name="x")
    damage(store, made)
    what, names = DAMAGE[damage]
    for _ in range(2):
        found = store.check()
        assert [problem.what[: len(w)] for problem, w in zip(found, what, strict=True)] == what
        assert all(not problem.repaired and "--repair" in problem.remedy for problem in found)
    mended = store.check(repair=True)
    assert [problem.what for problem in mended] == [problem.what for problem in found]
    assert all(problem.repaired for problem in mended)
    clean(store)
    assert len(Refs(store.home).all()) == names and "other:latest" in Refs(store.home).all()
    assert image(store, "x", name="x") == made
    clean(store)


def test_a_shallow_check_reads_no_files(store: Store) -> None:
    made = image(store, "x", name="x")
    _change_file(store, made)
    assert store.check(deep=False) == [] and len(store.check()) == 3
    _remove_layer(store, made)
    assert [problem.what[:5] for problem in store.check(deep=False)] == ["image", "name "]


def test_a_damaged_image_is_not_used(store: Store, place: Path) -> None:
    made = image(store, "x")
    _truncate_blob(store, made)
    with pytest.raises(Corrupt, match="check --repair"):
        store.image(made.id)
    _change_file(store, made)
    with pytest.raises(Corrupt, match="check --repair"):
        store.write_tar(made.diff_ids[0], place / "x.tar")
    assert not (place / "x.tar").exists()


# -- no space


FULL = """
import os, sys
from pathlib import Path
from workbench.images import config
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.model import HostLacks
home, tar = sys.argv[1:]
store = Store(home).open()
with store.lease(), store.staging() as staging:
    (staging / "t").mkdir()
    (staging / "t" / "f").write_text("x")
    image = store.add_image(config.encode(diff_ids=[store.add_tree(staging / "t")]))
    Refs(home).set("keep", image.id)
def refused(action):
    try:
        action()
    except HostLacks as error:
        assert "no space left" in str(error) and "gc" in str(error) and chr(10) not in str(error), error
        print("refused")
refused(lambda: store.add_tar(tar))
assert store.check() == [] and os.listdir(home + "/tmp") == [], store.check()
def fill():
    with open(home + "/fill", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
fill()
refused(lambda: store.write_tar(image.diff_ids[0], home + "/out"))
assert not os.path.exists(home + "/out")
refused(lambda: store.add_image(config.encode(diff_ids=[], labels={"x": "y" * 9000})))
refused(lambda: Refs(home).set("new", image.id))
refused(lambda: store.add_tar(tar))
assert store.check() == [] and Refs(home).all() == {"keep:latest": image.id}
os.truncate(home + "/blobs/sha256/" + image.id[7:], 4)
os.mkdir(home + "/tmp/half")
fill()
mended = store.check(repair=True)
assert len(mended) == 3 and all(problem.repaired for problem in mended), mended
assert store.check() == [] and os.listdir(home + "/tmp") == [] and Refs(home).all() == {}, store.check()
os.unlink(home + "/fill")
"""


def test_a_full_disk_is_told(place: Path) -> None:
    """On a small file system: one line, nothing half done, and what was there before still is."""
    make_tar(place / "x.tar", member("big", data=bytes(3 << 20)))
    (place / "small").mkdir()
    (place / "script").write_text(FULL)
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    outer = f"mount -t tmpfs -o size=2m,mode=700 small {place}/small && exec {sys.executable} {place}/script"
    outer += f" {place}/small/w {place}/x.tar"
    done = subprocess.run([*unshare, "sh", "-c", outer], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 5
