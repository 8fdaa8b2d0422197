"""``snapshot``, ``import`` and ``gc``, killed, and refused by the disk, at each call that changes a file.

All points take minutes: ``WORKBENCH_TEST_POINTS=all make test ARGS=tests/history/test_faults.py``; without it some
that lie evenly between the first and the last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import select
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE
from tests.faults import FAULTS, KILL, Commands, Done, commands, every
from tests.history.test_snapshot import Live, listed
from workbench.images import config, files
from workbench.linux.cgroup import Cgroup
from workbench.model import HostLacks, Image, Kernel
from workbench.workbench import Workbench

ROOT = os.geteuid() == 0
WANTED = 18 if ROOT else 9  # points of each kind of fault; without root each look at a store takes a process more
#: What answers in a container, and writes down what it was told last.
TALKER = """
mkdir -p /opt/talk/deep
while read -r line; do
    case $line in
        *ping*) ;;
        *) echo "$line" > /opt/talk/deep/last; echo x >> /opt/talk/grows; rm -f /opt/talk/gone; mkfifo /opt/talk/gone ;;
    esac
    echo "$line"
done
"""
NOTEBOOK = json.dumps({"cells": [], "metadata": {"x": "y" * 5000}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def command() -> Iterator[Commands]:
    # An ordinary user's newuidmap does nothing under a filter, see faults.py.
    with commands(**({} if ROOT else {"WORKBENCH_SINGLE_ID": "1"})) as made:
        yield made


def points(run: Callable[[int, str], Done], wanted: int) -> Iterator[tuple[int, str, Done]]:
    """Each of them, of each fault: number, fault and what became of the command; prints how many there are."""
    for fault in FAULTS:
        whole = run(0, fault)
        assert whole.code == 0, whole.err
        guard = {at for at, call in enumerate(whole.calls, 1) if " /sys/" in call}  # who freezes and wakes
        tried = sorted({*every(len(whole.calls), wanted), *guard})
        for number in tried:
            done = run(number, fault)
            if not done.at:  # one call fewer than before
                continue
            tidy(done, fault)
            yield number, fault, done
        print(f"{len(whole.calls)} points of {fault}, {len(tried)} of them tried")


def tidy(done: Done, fault: str) -> None:
    """It was killed, or it went on in spite of the fault, or said in one line what was in its way."""
    if done.code == 0:
        return
    if done.code == -9:
        assert fault == KILL
        return
    assert done.code == 1 and done.err.count("\n") == 1 and "Traceback" not in done.err, (done.at, done.code, done.err)


# --- snapshot ------------------------------------------------------------------------------------------------


class Talker(Live):
    """A container that answers."""

    def __init__(self, workbench: Workbench, image: str) -> None:
        super().__init__(workbench, image, argv=["/bin/sh", "-c", TALKER])

    def tell(self, **request: Any) -> None:
        self.into.write(json.dumps(request) + "\n")
        self.into.flush()
        ready, _, _ = select.select([self.out], [], [], 10)
        assert ready, "it stands still"
        assert json.loads(self.out.readline()) == request


@pytest.fixture
def talker(workbench: Workbench, image: str) -> Iterator[Talker]:
    talker = Talker(workbench, image)
    yield talker
    talker.close()


def whole(workbench: Workbench, image: Image, wanted: str) -> None:
    """Whether a snapshot's own layer is what its digest says and holds what was written last."""
    path = workbench.store.tar(image.diff_ids[-1])
    assert path is not None and files.digest(path) == image.diff_ids[-1]
    with tarfile.open(path) as archive:
        member = archive.extractfile("opt/talk/deep/last")
        assert member is not None and json.loads(member.read())["n"] == wanted


@pytest.mark.skipif(not ROOT, reason="a filter that asks and newuidmap exclude each other")
def test_snapshot(command: Commands, workbench: Workbench, talker: Talker) -> None:
    taken: dict[str, str] = {}  # what was acknowledged: image and what it holds
    current = ""

    def run(number: int, fault: str) -> Done:
        nonlocal current
        current = f"{fault}-{number}"
        talker.tell(n=current)
        done = command.run("snapshot", talker.container.id, "-m", current, "-t", "faulty", "--json", number=number,
                           fault=fault, places=(f"{BASE}/", "/sys/fs/cgroup/"))  # fmt: skip
        if done.out:
            taken[json.loads(done.out)["image"]] = current
        return done

    for _number, fault, done in points(run, 14):
        at = f"{current}: {done.at}: {done.err}"
        talker.tell(n="ping")
        assert workbench.store.open().check(deep=False) == [], at
        told = json.loads(done.out)["image"] if done.out else ""
        assert bool(told) or done.code != 0, at
        again = command.run("snapshot", talker.container.id, "-m", "again", "-t", "faulty", "--json")
        if told:
            assert again.code == 1 and json.loads(again.out)["image"] is None, at
        elif again.code == 0:  # it goes on where the other was cut off
            taken[json.loads(again.out)["image"]] = current
        else:  # only the word was missing
            assert fault == KILL and json.loads(again.out)["image"] is None, (at, again.err)
            taken[json.loads(again.out)["parent"]] = current
        now = workbench.image("faulty")
        assert taken.get(now.id) == current, at
        whole(workbench, now, current)
        kernel = BASE / "j" / "data" / "kernels" / "wb-faulty" / "kernel.json"
        assert json.loads(kernel.read_text())["metadata"]["workbench"]["image"] == now.id, at
    print(f"{len(taken)} snapshots were acknowledged")
    workbench.gc()
    for image_id, wanted in taken.items():
        whole(workbench, workbench.image(image_id), wanted)
    history = [entry.id for entry in workbench.history("faulty")]
    assert set(taken) <= set(history)
    assert os.listdir(workbench.store.home / "tmp") == [] and workbench.check() == []
    talker.tell(n="ping")
    seen = listed(workbench, workbench.image("faulty"))
    assert seen[b"/opt/talk/deep/last".hex()][4] == len(json.dumps({"n": current})) + 1


def test_one_that_forks_without_end_stands_still(workbench: Workbench, image: str) -> None:
    """The freezer of cgroup v1 lets one time in fifteen wait for good when it is asked once."""
    live = Live(workbench, image, argv=["/bin/sh", "-c", "while :; do /bin/true; done"])
    try:
        group = Cgroup.of(live.container.id)
        if group is None or (group.kind == "v1" and "freezer" not in group.folders):
            pytest.skip("there is no freezer for this user")
        for _ in range(80):
            group.freeze(timeout=2)
            group.thaw()
            time.sleep(0.002)
    finally:
        live.close()


def test_one_that_nobody_wakes_can_be_stopped(workbench: Workbench, talker: Talker) -> None:
    """Its guard was killed, and who started that as well."""
    group = Cgroup.of(talker.container.id)
    try:
        assert group is not None
        group.freeze()
    except (HostLacks, PermissionError, AssertionError):
        pytest.skip("there is no freezer for this user")
    workbench.stop(talker.container.id, timeout=0.2)
    talker.container.exited.result(timeout=10)


# --- import --------------------------------------------------------------------------------------------------


def tree(*members: tuple[str, bytes, dict[str, Any]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o644, 1_700_000_000
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


FOLDER = {"type": tarfile.DIRTYPE, "mode": 0o755}
#: The second needs a record, since we would write it otherwise, and owners that a user without a range cannot give.
LAYERS = (
    tree(("./", b"", FOLDER), ("etc/", b"", FOLDER), ("etc/hello", b"hello", {}), ("bin/", b"", FOLDER)),
    tree(
        ("zz", bytes(70_000), {"uid": 5}), ("etc/.wh.hello", b"", {}),
        ("etc/link", b"", {"type": tarfile.SYMTYPE, "linkname": "zz"}), form=tarfile.GNU_FORMAT,
    ),
)  # fmt: skip


def fill(bench: Workbench, folder: Path, *tars: bytes, parent: str = "", name: str = "") -> Image:
    """An image of these layers."""
    ids = []
    for data in tars:
        (folder / "layer").write_bytes(data)
        ids.append(bench.store.add_tar(folder / "layer"))
    made = bench.store.add_image(config.encode(diff_ids=ids, parent=parent, kernel=Kernel(("/bin/sh",))))
    if name:
        bench.refs.set(name, made.id, "made")
    return made


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """A small store of its own, ``tmp_path/home``."""
    if not ROOT:
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    bench = Workbench(home=str(tmp_path / "home"), offer_host_settings=False)
    yield bench
    bench.close()
    files.discard(bench.home)


def test_import(command: Commands, bench: Workbench, tmp_path: Path) -> None:
    below = fill(bench, tmp_path, LAYERS[0])
    made = fill(bench, tmp_path, *LAYERS, parent=below.id, name="wanted")
    archive, notebook = tmp_path / "wanted.tar", tmp_path / "analysis.ipynb"
    notebook.write_text(NOTEBOOK)
    bench.export("wanted", str(archive), form="gzip", along=[str(notebook)])
    place = tmp_path / "there"
    env = {"WORKBENCH_HOME": str(place / "home"), "JUPYTER_DATA_DIR": str(place / "j")}

    def run(number: int, fault: str) -> Done:
        files.discard(str(place))
        (place / "cwd").mkdir(parents=True)
        return command.run("import", str(archive), number=number, fault=fault, places=(f"{place}/",),
                           cwd=str(place / "cwd"), **env)  # fmt: skip

    for number, fault, done in points(run, WANTED):
        at = f"{fault} {number}: {done.at}: {done.err}"
        there = Workbench(home=env["WORKBENCH_HOME"], offer_host_settings=False)
        assert there.check() == [], at
        if done.out:
            assert there.image("wanted").id == made.id, at
        again = command.run("import", str(archive), cwd=str(place / "cwd"), **env)
        assert again.code == 0, (at, again.err)
        assert there.image("wanted").id == made.id and there.image("wanted~1").id == below.id
        assert there.check() == [] and os.listdir(place / "home" / "tmp") == [], at
        assert os.listdir(place / "cwd") == ["analysis.ipynb"], at
        assert (place / "cwd" / "analysis.ipynb").read_text() == NOTEBOOK, at
        assert (place / "j" / "kernels" / "wb-wanted" / "kernel.json").exists(), at
        there.close()
    files.discard(str(place))


# --- gc ------------------------------------------------------------------------------------------------------


def test_gc(command: Commands, bench: Workbench, tmp_path: Path) -> None:
    below = fill(bench, tmp_path, LAYERS[0])
    kept = fill(bench, tmp_path, *LAYERS, parent=below.id, name="kept")
    layers, images = set(bench.store.layers()), {below.id, kept.id}
    env = {"WORKBENCH_HOME": bench.home}

    def run(number: int, fault: str) -> Done:
        mark = f"{fault}{number}".encode()
        loose = fill(bench, tmp_path, LAYERS[0], tree(("a", mark, {}), ("b", b"", {"uid": 7}), form=tarfile.GNU_FORMAT))
        fill(bench, tmp_path, tree(("c", mark, {})), parent=loose.id)
        data = tree(("d", mark, {}))
        tar = tmp_path / "captured"
        tar.write_bytes(data)
        bench.store.adopt_tar(tar, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        downloads = Path(bench.home, "cache", "downloads", "files", "sha256")
        downloads.mkdir(parents=True, exist_ok=True)
        (downloads / "x").write_bytes(b"downloaded")
        return command.run("gc", number=number, fault=fault, places=(f"{tmp_path}/",), **env)

    for number, fault, done in points(run, WANTED):
        at = f"{fault} {number}: {done.at}: {done.err}"
        assert bench.store.open().check() == [], at
        assert bench.image("kept").id == kept.id and layers <= set(bench.store.layers()), at
        again = command.run("gc", **env)
        assert again.code == 0, (at, again.err)
        assert set(bench.store.layers()) == layers and set(bench.store.blobs()) == images, at
        stems = {name.partition(".")[0] for name in os.listdir(bench.store.home / "layers")}
        assert stems == {layer[7:] for layer in layers} and os.listdir(bench.store.home / "tmp") == [], at
        assert bench.store.check() == [], at
    shutil.rmtree(Path(bench.home, "cache"))
