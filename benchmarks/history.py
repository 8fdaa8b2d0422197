"""Figures of the history: snapshots against ``podman commit``, archives against ``podman save`` and ``load``.

What is committed was written by the same program over the same image, in the same container from beginning to end,
and is in the page cache and on the disk when the clock starts. Ours ends when the snapshot is durable and has its name.
Podman's commit syncs nothing, and is measured as it is. Ours is a library call, as from ``%container`` in a notebook;
export and import are whole processes on both sides. Nothing is removed in between: ext4 makes new files slowly for a
minute where many were removed (``recently_deleted`` in fs/ext4/ialloc.c), which would hit both sides by chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from benchmarks import kernels
from benchmarks.measure import Figure, by_turns, compare, shown, timed
from benchmarks.peers import Podman, checked
from benchmarks.scene import TOP, Scene, ours_kernelspec, say
from workbench.containers.container import Container
from workbench.images import config
from workbench.linux import userns
from workbench.model import Image
from workbench.workbench import Workbench

FILES, BYTES = 15_000, 250_000_000
#: Bytes of the layers of a large image, and the files in the layer that makes it so.
LARGE, LARGE_FILES = 2_000_000_000, 20_000
#: Snapshots in a row.
LONG = 300
_PROGRAM = (TOP / "benchmarks" / "standing.py").read_text()


class Standing:
    """A container with ``standing.py`` in it."""

    def __init__(self, into: IO[str], out: IO[str]) -> None:
        self._into, self._out = into, out

    def ask(self, *words: object) -> str:
        """Call one of its functions; what that returned."""
        self._into.write(" ".join(map(str, words)) + "\n")
        self._into.flush()
        if not (answer := self._out.readline()):
            raise RuntimeError(f"the container ended at {words[0]!r}")
        return answer.strip()

    def measured(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds that a call takes, and those that the container stood still in it at a stretch."""
        os.sync()
        self.ask("watch")
        seconds = timed(call)
        return seconds, float(self.ask("stood"))


@contextmanager
def _ours(bench: Workbench, image: str, python: str) -> Iterator[tuple[Standing, Container]]:
    container = bench.create(image, argv=[python, "-ISuc", _PROGRAM], cwd=None, network="none")
    read, written = os.pipe2(os.O_CLOEXEC)
    theirs, into = os.pipe2(os.O_CLOEXEC)
    try:
        container.start((theirs, written, 2)).result()
    finally:
        os.close(theirs)
        os.close(written)
    with open(into, "w") as words, open(read) as told:
        yield Standing(words, told), container
    container.exited.result()
    bench.remove(container.id, force=True)


@contextmanager
def _theirs(podman: Podman, python: str) -> Iterator[tuple[Standing, str]]:
    name = f"standing{os.urandom(4).hex()}"
    command = podman.run("--interactive", f"--name={name}", command=[python, "-ISuc", _PROGRAM])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    with process.stdin as into, process.stdout as out:
        yield Standing(into, out), name
    process.wait()


@dataclass(slots=True)
class _Times:
    """Seconds, one of each round."""

    first: list[float] = field(default_factory=list)
    stood: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)  # of each 10,000 files, what the first takes more


class _Stage:
    """A store of its own with the scene's image in it, since what is added here is to go again."""

    def __init__(self, scene: Scene, podman: Podman) -> None:
        self.scene, self.podman = scene, podman
        assert scene.image.kernel
        self.python = scene.image.kernel.argv[0]
        self.bench = Workbench(home=str(scene.base / "history"))
        self.archive = scene.base / "base.tar"
        scene.workbench.export(scene.image.id, str(self.archive))
        self.bench.load(str(self.archive), "base")
        self.running = ExitStack()  # of containers, until all is measured
        self.rounds = 0
        self.taken = ""  # the name of the last round's second snapshot

    def snapshot(self, container: Container, name: str) -> Image:
        """Raises RuntimeError when there was nothing new."""
        made = self.bench.snapshot(container.id, message="figures", author="bench", name=name)
        if made.image is None:
            raise RuntimeError("the snapshot found nothing new")
        return made.image

    def launch(self, image: Image) -> float:
        """Seconds from create to gone."""

        def call() -> None:
            container = self.bench.create(image.id, argv=["true"], cwd=None, network="none")
            container.start()
            assert container.exited.result().code == 0
            container.settle()

        return timed(call)

    def ours(self, times: _Times) -> None:
        """One round."""
        inside, container = self.running.enter_context(_ours(self.bench, "base", self.python))
        inside.ask("fill", "/opt/filled", FILES, BYTES)
        self.taken = f"taken-{container.id}"
        seconds, stood = inside.measured(lambda: self.snapshot(container, self.taken))
        times.first.append(seconds)
        times.stood.append(stood)
        image = self.bench.image(self.taken)
        inside.ask("write", "/opt/filled/changed", 4096)
        times.second.append(inside.measured(lambda: self.snapshot(container, self.taken))[0])
        first = self.launch(image)
        later = sorted(self.launch(image) for _ in range(3))[1]
        times.launch.append((first - later) / FILES * 10_000)

    def theirs(self, times: _Times) -> None:
        """One round."""
        inside, name = self.running.enter_context(_theirs(self.podman, self.python))
        inside.ask("fill", "/opt/filled", FILES, BYTES)
        self.rounds += 1
        pause = self.podman.can_pause(name)
        image = f"taken{self.rounds}"
        seconds, stood = inside.measured(lambda: checked(self.podman.commit(name, image, pause=pause)))
        times.first.append(seconds)
        if pause:
            times.stood.append(stood)
        inside.ask("write", "/opt/filled/changed", 4096)
        again = f"again{self.rounds}"
        times.second.append(inside.measured(lambda: checked(self.podman.commit(name, again, pause=pause)))[0])
        os.sync()

    def close(self) -> None:
        """End its containers and its helper; the folder goes with the scene's."""
        self.running.close()
        self.bench.close()


def history(scene: Scene, podman: Podman | None, rounds: int, pairs: int) -> Iterator[Figure]:
    """All of them. rounds: of what takes seconds; pairs: of what takes less."""
    stage = _Stage(scene, podman) if podman else None
    if stage is None:
        return
    try:
        yield from _snapshots(stage, rounds)
        yield from _archives(stage, rounds)
        yield _by_size(stage, pairs)
        yield from _long(stage, pairs)
    finally:
        stage.close()


def _snapshots(stage: _Stage, rounds: int) -> Iterator[Figure]:
    mine, theirs = _Times(), _Times()
    for number in range(rounds):
        sides = [lambda: stage.ours(mine), lambda: stage.theirs(theirs)]
        for side in sides if number % 2 else reversed(sides):
            side()
    what = f"{FILES:,} files, {BYTES // 1_000_000} MB"
    said = stage.podman.said
    yield compare(f"snapshot of {what}, durable / podman commit", mine.first, theirs.first, 0.12, against=said)
    if theirs.stood:
        yield compare("  it stands still / podman commit --pause", mine.stood, theirs.stood, 0.08, against=said)
    else:
        say("  podman pauses no container here: standing still is not compared")
        yield shown("  it stands still", [1e3 * value for value in mine.stood], "ms")
    yield compare("  second snapshot, one small change / podman commit", mine.second, theirs.second, 0.03, against=said)
    yield shown("first launch from it, more than later ones, for 10,000 files", mine.launch, "s")


def _archives(stage: _Stage, rounds: int) -> Iterator[Figure]:
    """Of the image that was just committed on both sides, in stores that have nothing of it."""
    base, podman = stage.scene.base, stage.podman
    mine, theirs = base / "ours.tar", base / "theirs.tar"
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    count = 0

    def ours(home: Path | str, *words: str) -> None:
        command = [jupyter, "workbench", *words]
        checked(command, env=os.environ | {"WORKBENCH_HOME": str(home)})

    def save() -> float:
        mine.unlink(missing_ok=True)
        os.sync()
        return timed(lambda: ours(stage.bench.home, "export", f"{stage.taken}~1", "-o", str(mine)))

    def their_save() -> float:
        theirs.unlink(missing_ok=True)
        os.sync()
        return timed(lambda: checked(podman.save("taken1", str(theirs))))

    def load() -> float:
        nonlocal count
        count += 1
        home = base / f"load{count}"
        os.sync()
        return timed(lambda: ours(home, "import", str(mine), "taken"))

    def their_load() -> float:
        command = podman.load_elsewhere(str(theirs))
        os.sync()
        return timed(lambda: checked(command))

    said = f"{podman.said}, nothing compressed"
    saved = by_turns([save, their_save], rounds)
    yield compare("export / podman save", *saved, 0.5, unit="s", scale=1, against=said)
    loaded = by_turns([load, their_load], rounds, warm=0)
    yield compare("import / podman load", *loaded, 0.5, unit="s", scale=1, against=said)


def _by_size(stage: _Stage, pairs: int) -> Figure:
    """The same 1 MB written over a small image and a large one, which stand side by side."""
    store = stage.bench.store
    base = stage.bench.image("base").diff_ids[:2]  # Debian and its own Python
    have = sum(map(store.layer_size, base))
    with store.staging() as staging:
        userns.call("benchmarks.standing:fill", str(staging / "tree"), LARGE_FILES, LARGE - have)
        more = store.add_tree(staging / "tree")
    sides = []
    for name, diff_ids in (("large", (*base, more)), ("small", base)):
        image = store.add_image(config.encode(diff_ids=diff_ids, cmd=("/bin/sh",)))
        stage.bench.refs.set(name, image.id)
        inside, container = stage.running.enter_context(_ours(stage.bench, image.id, "/usr/bin/python3"))

        def side(inside: Standing = inside, container: Container = container, name: str = name) -> float:
            inside.ask("write", "/opt/changed", 1_000_000)
            return inside.measured(lambda: stage.snapshot(container, f"{name}-taken"))[0]

        sides.append(side)
    values = by_turns(sides, pairs, warm=2)
    figure = f"snapshot of 1 MB over {LARGE / 1e9:.1f} GB / over {have / 1e9:.1f} GB"
    return compare(figure, *values, 1.1, against="itself")


def _long(stage: _Stage, pairs: int) -> Iterator[Figure]:
    """From the last of many snapshots of one container, and from its first."""
    images: list[Image] = []
    inside, container = stage.running.enter_context(_ours(stage.bench, "base", stage.python))
    for number in range(LONG):
        inside.ask("write", f"/opt/{number}", 1000)
        images.append(stage.snapshot(container, "long"))
    first, last = images[0], images[-1]
    seconds = timed(lambda: [stage.bench.store.layer(diff_id) for diff_id in last.diff_ids])
    say(f"  the trees of {LONG} snapshots: {seconds:.1f} s")
    values = by_turns([lambda: stage.launch(last), lambda: stage.launch(first)], pairs, warm=2)
    yield compare(f"true, library, of snapshot {LONG} / of the first", *values, 1.2, against="itself")
    sides = []
    for image, mark in ((last, "-last"), (first, "-first")):
        scene = replace(stage.scene, workbench=stage.bench, image=image, mark=mark)
        ours_kernelspec(scene)
        sides.append(kernels.ours(scene))
    values = by_turns(sides, pairs)
    yield compare(f"first result of a kernel of snapshot {LONG} / of the first", *values, 1.2, against="itself")
