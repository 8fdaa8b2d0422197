"""Each figure of the table: what is done on each side, and its goal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import builds, history, kernels
from benchmarks.measure import Figure, bounded, by_turns, compare, timed
from benchmarks.peers import Crun, Podman
from benchmarks.scene import OURS, PLAIN, TOP, Scene, say, stage
from workbench.model import WorkbenchError


@dataclass(frozen=True, slots=True)
class Effort:
    """How often each thing is done."""

    starts: int = 15
    true: int = 40
    processes: int = 12
    fiftieth: int = 8
    loops: int = 15
    blocks: int = 20
    memory: int = 20
    builds: int = 2
    tensorflow: int = 8
    rounds: int = 4
    pairs: int = 15


QUICK = Effort(
    starts=5, true=15, processes=4, fiftieth=3, loops=5, blocks=6, memory=10, builds=1, tensorflow=3, rounds=1, pairs=5
)


def first_results(scene: Scene, podman: Podman | None, effort: Effort) -> Iterator[Figure]:
    """Figures 1 and 2."""
    sides = [kernels.ours(scene), kernels.plain(scene)]
    if podman:
        sides.append(kernels.in_podman(scene, podman))
    ours, plain, *peer = by_turns(sides, effort.starts)
    yield compare("first result of a kernel / plain kernel", ours, plain, 1.05, extra=20, against="same files, plain")
    for values in peer if podman else []:
        yield compare("first result of a kernel / in podman", ours, values, 0.7, against=podman.said if podman else "")


def true_by_library(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """Figure 3: create, start, wait, remove; the helper stands, as in a server."""
    peers = [Crun(scene, ["true"], filtered=filtered) for filtered in (True, False)]

    def ours() -> None:
        container = scene.workbench.create(scene.image.id, argv=["true"], cwd=None, network="none")
        container.start()
        assert container.exited.result().code == 0
        assert not container.settle()

    sides = [lambda: timed(ours), *(lambda peer=peer: timed(peer.run) for peer in peers)]  # type: ignore[misc]
    mine, *others = by_turns(sides, effort.true, warm=3)
    for peer, values, words in zip(peers, others, ("", ", no filter there"), strict=True):
        yield compare(f"true, library / crun run{words}", mine, values, 1, against=peer.said)


def true_by_process(scene: Scene, podman: Podman | None, effort: Effort) -> Iterator[Figure]:
    """Figure 4: whole processes."""
    if podman is None:
        return
    peer = podman
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    ours = [jupyter, "workbench", "run", scene.image.id, "true"]
    environment = os.environ | {"WORKBENCH_HOME": scene.workbench.home}

    def run(command: list[str]) -> Callable[[], float]:
        def call() -> None:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment, cwd=scene.work)

        return lambda: timed(call)

    values = by_turns([run(ours), run(peer.run(command=["true"]))], effort.processes, warm=2)
    yield compare("jupyter workbench run IMAGE true / podman run", *values, 1, against=peer.said)


def fiftieth(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """Figure 5: starts beside 49 running kernels, between starts beside none."""
    start = kernels.ours(scene)
    alone = [start() for _ in range(effort.fiftieth)]
    crowded: list[float] = []
    with ExitStack() as running:
        for _ in range(49):
            running.enter_context(kernels.Managed(scene, OURS))
        time.sleep(1)
        crowded += [start() for _ in range(2 * effort.fiftieth)]
    time.sleep(1)
    alone += [start() for _ in range(effort.fiftieth)]
    yield compare("the 50th running kernel / the 1st", crowded, alone, 1.3, against="itself, alone")


def loops(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """Figure 6: the same program inside and outside, in a new process each time.

    Where a process happens to lie in memory makes a loop of Python's up to a third quicker or slower.
    """
    kernel = scene.image.kernel
    assert kernel is not None
    program = [kernel.argv[0], "-c", (TOP / "benchmarks" / "inside.py").read_text()]
    for number in range(8):
        (scene.work / f"{number}.data").write_bytes(os.urandom(4 << 20))
    library = next(scene.tree.glob("usr/lib/python3*/os.py")).parent.relative_to(scene.tree)
    for words, *call in (
        ("CPU loop", "cpu"),
        ("file-read loop, data", "read", f"{scene.work}/*.data", "20"),
        # Every filter of system calls costs 45 ns a call, and overlayfs doubles an open: as with podman.
        ("file-read loop, image's small files", "read", f"/{library}/*.py", "30"),
        ("loopback transfer", "loopback"),
    ):
        command = [*program, *call]
        sides = [lambda command=command: _inside(scene, command), lambda command=command: _outside(scene, command)]
        yield compare(f"{words}, inside / outside", *by_turns(sides, effort.loops), 1.03, against="same files, plain")


def _inside(scene: Scene, command: list[str]) -> float:
    read, written = os.pipe2(os.O_CLOEXEC)
    container = scene.workbench.create(scene.image.id, argv=command, cwd=str(scene.work))
    started = container.start((read, written, 2))
    os.close(written)
    with os.fdopen(read) as told:
        started.result()
        seconds = float(told.read())
    container.exited.result()
    container.settle()
    return seconds


def _outside(scene: Scene, command: list[str]) -> float:
    done = subprocess.run(scene.plain(*command), stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def round_trips(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """Figure 7: blocks of 50, by turns."""
    with (
        kernels.Managed(scene, OURS) as ours,
        kernels.Managed(scene, PLAIN) as plain,
        kernels.by_launcher(scene) as launched,
    ):
        clients = [ours.client, plain.client, launched]
        for client in clients:
            client.settle()

        def block(client: kernels.Client) -> Callable[[], float]:
            return lambda: timed(lambda: [client.round_trip() for _ in range(50)]) / 50

        mine, peer, relayed = by_turns([block(client) for client in clients], effort.blocks)
    count = effort.blocks * 50
    yield compare(f"{count} execute round trips / plain", mine, peer, 1.03, against="same files, plain, TCP")
    yield compare(f"{count} by the launcher, TCP / plain", relayed, peer, 1.3, against="same files, plain, TCP")


def memory(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """Figure 8: anonymous memory of server, helper and inits; a server's own growth for any kernel is not ours."""
    ours = _growth(scene, OURS, effort.memory)
    plain = _growth(scene, PLAIN, effort.memory)
    values = [a - b for a, b in zip(ours, plain, strict=True)]
    yield bounded("memory for each further container", values, 256, "KiB")


def _growth(scene: Scene, name: str, count: int) -> list[float]:
    """KiB that each of the last ``count`` kernels added to a server's own processes, as slopes over halves."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server"], cwd=scene.work, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert server.stdin and server.stdout
    inits: list[int] = []
    readings = []
    first = 3  # before that, libraries load
    for number in range(first + count):
        server.stdin.write(name + "\n")
        pid, init = map(int, server.stdout.readline().split())
        inits.append(init)
        if number >= first - 1:
            readings.append(_own(pid, inits if name == OURS else []))
    server.communicate()
    half = count // 2
    return [(readings[start + half] - readings[start]) / half for start in range(len(readings) - half)]


def _own(server: int, inits: list[int]) -> float:
    helpers = Path(f"/proc/{server}/task/{server}/children").read_text().split() if inits else []
    owns = [server, *inits]
    owns += [int(pid) for pid in helpers if b"helper" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sum(_anonymous(pid) for pid in owns)


def _anonymous(pid: int) -> float:
    """KiB: what would be free without that process; what it shares with others through files is not in it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1])
    return 0.0


def disk(scene: Scene) -> Iterator[Figure]:
    """Figure 8, second half: everything on disk of a started container that has done nothing yet."""
    idle, kernel = [], []
    for _ in range(3):
        container = scene.workbench.create(scene.image.id, argv=["sleep", "infinity"], cwd=str(scene.work))
        container.start().result()
        idle.append((_blocks(container.folder) + _blocks(container.run_dir)) / 1024)
        container.kill()
        container.exited.result()
        container.settle()
        with kernels.Managed(scene, OURS) as running:
            time.sleep(1)
            container = running.manager.provisioner._container  # type: ignore[union-attr]
            kernel.append((_blocks(container.folder) + _blocks(container.run_dir)) / 1024)
    yield bounded("disk of a started, idle container", idle, 64, "KiB")
    # IPython's own profile and history: 60 KiB that a plain kernel writes as well, once.
    yield bounded("the same with an IPython kernel", kernel, 64, "KiB")


def _blocks(folder: str) -> int:
    """Bytes; what overlayfs keeps for itself in ``work/work`` is an empty folder that a user cannot look into."""
    total = os.lstat(folder).st_blocks * 512
    for path, names, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(path, name)).st_blocks * 512 for name in (*names, *files))
    return total


def tensorflow(scene: Scene, effort: Effort) -> Iterator[Figure]:
    """The image that takes longest to say its first word."""
    asked = "import tensorflow as tf", "int(tf.linalg.matmul(tf.fill((2, 3), 2), tf.fill((3, 2), 7))[0, 0])"
    with stage(scene.base, "python-tensorflow-linux", "-tf") as other:
        values = by_turns([kernels.ours(other, *asked), kernels.plain(other, *asked)], effort.tensorflow)
    yield compare("first TensorFlow result of a kernel / plain kernel", *values, 1.05, against="same files, plain")


def every(scene: Scene, podman: Podman | None, effort: Effort, chosen: str) -> Iterator[Figure]:
    """All of them, each told when it is done. chosen: only groups whose name holds it."""
    groups: dict[str, Callable[[], Iterator[Figure]]] = {
        "first": lambda: first_results(scene, podman, effort),
        "library": lambda: true_by_library(scene, effort),
        "process": lambda: true_by_process(scene, podman, effort),
        "fiftieth": lambda: fiftieth(scene, effort),
        "loops": lambda: loops(scene, effort),
        "round": lambda: round_trips(scene, effort),
        "memory": lambda: memory(scene, effort),
        "disk": lambda: disk(scene),
        "tensorflow": lambda: tensorflow(scene, effort),
        "builds": lambda: builds.builds(scene, podman, effort.builds),
        "history": lambda: history.history(scene, podman, effort.rounds, effort.pairs),
    }
    for name, group in groups.items():
        if chosen in name:
            begin = time.monotonic()
            try:
                yield from group()
            except (RuntimeError, OSError, subprocess.SubprocessError, WorkbenchError) as error:
                say(f"  {name}: not measured: {error}")
            say(f"{name}: {time.monotonic() - begin:.0f} s")
