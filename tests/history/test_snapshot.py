"""Snapshots of containers that run: what is launched from one is what was there, in every attribute."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from workbench.containers import pause
from workbench.containers.container import Container
from workbench.history.snapshot import Snapshot
from workbench.linux import userns
from workbench.model import Conflict, Image, Interrupted, InvalidInput, NotFound
from workbench.workbench import Workbench

DRIVER = (Path(__file__).parent / "driver.py").read_text()


class Live:
    """A container with the driver in it, or another program that answers a line with a line."""

    def __init__(
        self, workbench: Workbench, image: str, argv: Sequence[str] = ("/usr/bin/python3", "-ISuc", DRIVER)
    ) -> None:  # fmt: skip
        self.workbench = workbench
        self.container: Container = workbench.create(image, argv=argv, cwd=None, network="none")
        ours_r, theirs_w = os.pipe()
        theirs_r, ours_w = os.pipe()
        try:
            self.container.start((theirs_r, theirs_w, theirs_w)).result(timeout=30)
        finally:
            os.close(theirs_r)
            os.close(theirs_w)
        self.out, self.into = os.fdopen(ours_r), os.fdopen(ours_w, "w")

    def ask(self, **request: Any) -> Any:
        self.into.write(json.dumps(request) + "\n")
        self.into.flush()
        return json.loads(self.out.readline())

    def snapshot(self, message: str = "x", **options: Any) -> Snapshot:
        return self.workbench.snapshot(self.container.id, message=message, author="A <a@example.org>", **options)

    def end(self) -> None:
        self.into.close()
        self.out.close()
        self.container.exited.result(timeout=20)

    def close(self) -> None:
        self.container.kill()
        self.container.exited.result(timeout=20)
        if os.path.exists(self.container.folder):
            self.workbench.remove(self.container.id, force=True)


@pytest.fixture
def live(workbench: Workbench, image: str) -> Iterator[Live]:
    live = Live(workbench, image)
    yield live
    live.close()


def listed(workbench: Workbench, image: Image, what: str = "list") -> Any:
    """What a new container of an image has."""
    fresh = Live(workbench, image.id)
    try:
        return fresh.ask(do=what)
    finally:
        fresh.close()


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        f"{bytes.fromhex(path)!r}: {one.get(path)} / {other.get(path)}"
        for path in sorted(one.keys() | other.keys()) if one.get(path) != other.get(path)
    ]  # fmt: skip


#: More of them find more: ``WORKBENCH_TEST_SEEDS=50 make test ARGS=tests/history``.
SEEDS = int(os.environ.get("WORKBENCH_TEST_SEEDS", "2"))


CHURN = """
import os, shutil
while True:
    os.makedirs("/opt/a/b/c")
    for number in range(50):
        open(f"/opt/a/b/c/{number}", "w").close()
    shutil.rmtree("/opt/a")
"""


def test_a_look_writes_nothing_and_bears_files_that_go(workbench: Workbench, image: str, home: Path) -> None:
    live = Live(workbench, image, ("/usr/bin/python3", "-ISc", CHURN))
    try:
        until, looks = time.monotonic() + 5, []
        while time.monotonic() < until and len(looks) < 300:
            looks.append(workbench.changed(live.container.id)[0])
        assert len(looks) > 10 and all(0 <= changes <= 53 for changes in looks), looks
        live.container.kill()
        live.container.exited.result(timeout=20)
        userns.call("tests.history.inside:contents", live.container.upper, {"opt/large": "x" * (1 << 20)})
        before = (home / "tmp").stat().st_mtime_ns
        assert workbench.changed(live.container.id)[1] >= 1 << 20
        assert (home / "tmp").stat().st_mtime_ns == before, "no tar is staged"
    finally:
        live.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_is_launched_is_what_was_there(live: Live, workbench: Workbench, seed: int) -> None:
    """Three snapshots in a row, with all kinds of changes in between, each launched."""
    for number in range(3):
        assert live.ask(do="mutate", seed=seed * 10 + number, rounds=120) > 40
        before = live.ask(do="list")
        looked, size = workbench.changed(live.container.id)
        taken = live.snapshot(name="made", look_only=False)
        assert taken.image is not None
        assert looked == taken.changes and size < taken.size, "a look tells as much as the snapshot takes"
        assert difference(live.ask(do="list"), before) == []
        assert difference(listed(workbench, taken.image), before) == []
        wanted = {tuple(sorted(names)) for names in userns.call("tests.history.inside:links", live.container.upper)}
        links = {tuple(sorted(names)) for names in listed(workbench, taken.image, "links")}
        concerned = {name for names in wanted for name in names}
        assert {names for names in links if concerned & set(names)} == wanted
        again = live.snapshot()
        assert again.image is None and again.changes == 0, again.paths
        assert workbench.changed(live.container.id) == (0, 0)
    assert workbench.check() == []
    assert [entry.id for entry in workbench.history("made")][:3] == [
        workbench.image(text).id for text in ("made", "made~1", "made~2")
    ]  # fmt: skip


WRITER = """
import os, sys
sys.stdin.readline()
number = 0
while True:
    number += 1
    for name in ("a", "b"):
        with open(f"/opt/{name}", "w") as file:
            file.write(str(number))
    if number == 20:
        print("going", flush=True)
"""


@contextmanager
def writing(workbench: Workbench, image: str, script: str) -> Iterator[Container]:
    """A container whose Python script has said that it is going."""
    container = workbench.create(image, argv=["/usr/bin/python3", "-c", script], cwd=None, network="none")
    container.start().result(timeout=30)
    try:
        until = time.monotonic() + 20
        while "going" not in Path(container.log).read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        yield container
    finally:
        container.kill()
        container.exited.result(timeout=20)
        workbench.remove(container.id, force=True)


def test_a_moment_of_what_is_being_written(workbench: Workbench, image: str) -> None:
    """All files of a snapshot are of one moment, and the writer goes on after it."""
    with writing(workbench, image, WRITER) as container:
        for _ in range(4):
            taken = workbench.snapshot(container.id, message="in the middle of it", name="moment")
            assert taken.image is not None and taken.paused < 5
            tree = workbench.store.layer(taken.image.diff_ids[-1])
            values = [int((tree / "opt" / name).read_text() or -1) for name in ("a", "b")]
            if -1 not in values:  # one was just opened anew
                assert values[0] - values[1] in (0, 1), values
        seen = set()
        until = time.monotonic() + 10
        while len(seen) < 5:  # it goes on
            assert time.monotonic() < until
            seen.add((Path(container.upper) / "opt/a").read_text())


def test_it_goes_on_when_its_guard_is_killed(workbench: Workbench, image: str) -> None:
    with writing(workbench, image, WRITER) as container:
        # Whether that is in time to be said is chance: until somebody lets it go it stands still in any case.
        with suppress(Conflict), pause.guard(container.id, container.pid) as guard, pause.paused(guard):
            (killed,) = guards()
            os.kill(killed, signal.SIGKILL)
        before = (Path(container.upper) / "opt/a").read_text()
        until = time.monotonic() + 10
        while (Path(container.upper) / "opt/a").read_text() == before:
            assert time.monotonic() < until
            time.sleep(0.01)


RESTLESS = """
import os
data = os.urandom(8 << 20)
number = 0
while True:
    number += 1
    for name in "abcdefgh":
        with open(f"/opt/{name}", "r+b" if number > 1 else "wb") as file:
            file.write(data)
    with open("/opt/number", "w") as file:
        file.write(str(number))
    if number == 2:
        print("going", flush=True)
"""


def test_whoever_is_told_how_far_it_is_may_end_it(
    workbench: Workbench, image: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any point, also while the container stands still: it goes on then, and nothing of it stays."""
    monkeypatch.setattr(userns, "_OFTEN", 5)
    said: list[tuple[str, int, int]] = []
    last = 0

    def meter(what: str, done: int, total: int) -> None:
        said.append((what, done, total))
        if len(said) == last:
            raise Interrupted("take a snapshot", "it is enough")

    with writing(workbench, image, RESTLESS) as container:

        def stored() -> list[str]:
            places = ("tmp/*", "layers/*", "blobs/sha256/*", "refs/*")
            return sorted(str(path) for place in places for path in home.glob(place))

        before, number = stored(), Path(container.upper) / "opt/number"
        for last in (1, 2, 3, 4, *range(6, 200, 6), 0):  # noqa: B007 - ``meter`` uses it
            said.clear()
            try:
                taken = workbench.snapshot(container.id, message="x", name="restless", meter=meter)
                break
            except Interrupted:
                then, until = number.read_text(), time.monotonic() + 10
                while number.read_text() in (then, ""):
                    assert time.monotonic() < until
                    time.sleep(0.01)
                assert stored() == before and guards() == []
        assert taken.image is not None and last > 4
        assert said[-1] == ("keeping what changed", taken.size, taken.size)
        assert all(done <= total and (total == 0 or total >= 64 << 20) for _, done, total in said)


def guards() -> list[int]:
    """Children of this process that keep a container still."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in children if b"containers.pause" in Path(f"/proc/{child}/cmdline").read_bytes()]


MAPPED = """
import mmap, os, sys
size = 6 << 20
files = []
for name in ("a", "b"):
    file = open(f"/opt/{name}", "w+b")
    file.write(os.urandom(size - 16) + bytes(16))
    file.flush()
    files.append(mmap.mmap(file.fileno(), size))
number = 0
while True:
    number += 1
    for mapped in files:
        for at in (0, size - 8):
            mapped[at : at + 8] = number.to_bytes(8, "little")
    if number % 1000 == 0:
        with open("/opt/c", "w") as file:
            file.write("c" * (number % 5000))
        os.rename("/opt/c", f"/opt/d{number % 3}")
    if number == 1000:
        print("going", flush=True)
"""


def test_a_moment_of_what_is_written_through_memory(workbench: Workbench, image: str) -> None:
    """Much that is read ahead, while it changes in the middle and at the end, with and without a snapshot before."""
    with writing(workbench, image, MAPPED) as container:
        for _ in range(5):
            taken = workbench.snapshot(container.id, message="in the middle of it", name="mapped")
            assert taken.image is not None
            tree = workbench.store.layer(taken.image.diff_ids[-1])
            datas = [(tree / "opt" / name).read_bytes() for name in ("a", "b")]
            values = [int.from_bytes(data[at : at + 8], "little") for data in datas for at in (0, len(data) - 8)]
            assert values == sorted(values, reverse=True) and values[0] - values[-1] in (0, 1), values


def test_two_at_once(live: Live, workbench: Workbench) -> None:
    """Each sees a moment; what one has taken the other does not take again."""
    live.ask(do="mutate", seed=1, rounds=60)
    taken: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: taken.append(live.snapshot(name="twice"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(one.image is None for one in taken) == [False, True]
    assert len(list(workbench.history("twice"))) == 2


def test_a_stopped_container(live: Live, workbench: Workbench) -> None:
    live.ask(do="mutate", seed=2, rounds=60)
    before = live.ask(do="list")
    live.end()
    assert live.container.settle()
    taken = live.snapshot(name="history/stopped")
    assert taken.image is not None and taken.paused >= 0
    assert difference(listed(workbench, taken.image), before) == []


def test_a_name_goes_on_along_its_own_history(workbench: Workbench, image: str) -> None:
    """Two containers of one image: the second does not take the name from the first, and loses nothing by that."""
    first, second = (workbench.create(image, argv=["true"], cwd=None, network="none") for _ in range(2))
    try:
        for number, container in enumerate((first, second)):
            userns.call("tests.history.inside:contents", container.upper, {"opt/who": str(number)})
        taken = workbench.snapshot(first.id, message="First", name="history/way")
        with pytest.raises(Conflict, match="which this container does not come from; give another name with -t"):
            workbench.snapshot(second.id, message="Second", name="history/way")
        assert taken.image is not None and workbench.image("history/way").id == taken.image.id
        other = workbench.snapshot(second.id, message="Second", name="history/other")
        assert other.image is not None and other.image.parent == taken.parent
        moved = workbench.snapshot(second.id, message="n", name="history/way", look_only=True)
        assert moved.image is None
    finally:
        for container in (first, second):
            workbench.remove(container.id, force=True)


def test_stopping_is_no_change(live: Live, workbench: Workbench) -> None:
    live.ask(do="mutate", seed=3, rounds=20)
    userns.call("tests.history.inside:contents", live.container.upper, {"tmp/left": "x"})  # /tmp goes with its end
    assert live.snapshot(name="history/running").image is not None
    live.end()
    assert live.container.settle()
    assert live.snapshot(name="history/running").image is None
    assert not workbench.unsaved(live.container.id)


def test_the_same_changes_by_the_same_author_at_the_same_time_are_the_same_image(
    workbench: Workbench, image: str
) -> None:
    script = "mkdir /opt/x; echo hi > /opt/x/f; touch -d @1 /opt/x/f /opt/x /opt /; sleep 60"
    ids = []
    for _ in range(2):
        container = workbench.create(image, argv=["sh", "-c", script], cwd=None, network="none")
        container.start().result(timeout=30)
        try:
            until = time.monotonic() + 10
            while not os.path.exists(f"{container.upper}/opt/x/f") or os.stat(container.upper).st_mtime != 1:
                assert time.monotonic() < until
                time.sleep(0.01)
            taken = workbench.snapshot(container.id, message="m", author="A", name="same", when=1_700_000_000)
            assert taken.image is not None
            ids.append(taken.image.id)
            other = workbench.snapshot(container.id, message="n", author="A", name="same")
            assert other.image is None  # and not another with nothing in it
        finally:
            container.kill()
            container.exited.result(timeout=20)
            workbench.remove(container.id, force=True)
    assert ids[0] == ids[1]


def test_what_no_snapshot_takes(live: Live, workbench: Workbench) -> None:
    upper = live.container.upper
    paths = ["root/.netrc", "root/.ssh/id", "root/.cache/pip/x", "tmp/x", "var/log/x", "root/.config/pip/pip.conf",
             "var/lib/apt/lists/x", "run/x", "root/.bash_history"]  # fmt: skip
    live.end()
    userns.call("tests.history.inside:write", upper, [*paths, "root/.config/mine", "root/.netrc2"])
    looked = live.snapshot(look_only=True)
    assert looked.image is None
    folders = {"root", "tmp", "root/.config", "root/.config/pip"}  # with modes that the test gave them
    assert set(looked.paths) - folders == {"root/.config/mine", "root/.netrc2"}
    assert set(paths) <= {path for one in looked.skipped for path in paths if path == one or path.startswith(f"{one}/")}
    taken = live.snapshot(name="clean")
    assert taken.image is not None
    with pytest.raises(NotFound):
        workbench.image("nothing")
    shown = [bytes.fromhex(path).decode() for path in listed(workbench, taken.image)]
    assert "/root/.netrc2" in shown and "/root/.netrc" not in shown and "/root/.ssh" not in shown


def test_who_when_and_why(live: Live, workbench: Workbench, image: str) -> None:
    live.ask(do="mutate", seed=3, rounds=30)
    first = live.snapshot("First\n\nwith a body", name="told")
    live.ask(do="mutate", seed=4, rounds=30)
    second = live.snapshot("Second")
    assert first.image and second.image and second.ref == "told"
    entries = list(workbench.history("told"))
    assert [(entry.summary, entry.author, entry.parent) for entry in entries] == [
        ("Second", "A <a@example.org>", first.image.id), ("First", "A <a@example.org>", image),
        ("built from a recipe", "", ""),
    ]  # fmt: skip
    assert entries[1].message == "First\n\nwith a body" and entries[0].names == ("told",)
    assert entries[0].machine["architecture"] == os.uname().machine and entries[0].machine["kernel"]
    for text, wanted in (
        ("told", second.image.id), ("told~", first.image.id), ("told^", first.image.id), ("told~2", image),
        ("told@{0}", second.image.id), ("told@{1}", first.image.id), (f"{second.image.id[7:19]}~1", first.image.id),
        ("told@{0}~1", first.image.id), ("told~1~1", image), ("told~0", second.image.id),
    ):  # fmt: skip
        assert workbench.image(text).id == wanted, text
    for text in ("told~3", "told@{9}", "told~99999"):
        with pytest.raises(NotFound):
            workbench.image(text)
    for wrong in ({"message": " "}, {"message": "x" * 70000}, {"message": "x", "name": "Not A Name"}):
        with pytest.raises(InvalidInput):
            live.snapshot(**wrong)
    # moved back, and where it was is known still
    workbench.tag("told", "told~1", force=True)
    assert workbench.image("told").id == first.image.id and workbench.image("told@{1}").id == second.image.id
    live.close()  # nothing but the name's log needs it any more
    workbench.gc()
    assert workbench.image("told@{1}").id == second.image.id


def test_what_lies_between(live: Live, workbench: Workbench, image: str) -> None:
    upper = live.container.upper
    live.end()
    info = "opt/venv/lib/python3.11/site-packages/made_up-1.2.dist-info/METADATA"
    userns.call(
        "tests.history.inside:write", upper, [info, "opt/new/file"], "Name: Made.Up\nVersion: 1.2\n\nName: no\n"
    )
    userns.call("tests.history.inside:whiteout", upper, "usr/bin/apt-cdrom")
    live.snapshot("x", name="between")
    found = workbench.diff("lower", "between")
    assert [(row.kind, row.name, row.before, row.after) for row in found.packages] == [("python", "made-up", "", "1.2")]
    files = {(row.kind, row.path) for row in found.files if not row.path.endswith("/")}
    assert files == {("A", info), ("A", "opt/new/file"), ("D", "usr/bin/apt-cdrom")}
    back = workbench.diff("between", "lower")
    assert {(row.kind, row.path) for row in back.files if not row.path.endswith("/")} == {
        ("D", info), ("D", "opt/new/file"), ("A", "usr/bin/apt-cdrom"),
    }  # fmt: skip
    assert workbench.diff("between", "between") == type(found)((), ())


def test_a_snapshot_of_what_is_gone(workbench: Workbench, image: str) -> None:
    with pytest.raises(NotFound):
        workbench.snapshot("ffffffffffff", message="x")
