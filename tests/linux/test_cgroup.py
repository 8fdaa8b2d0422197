"""Control groups against the kernel: what they limit, what they tell, and that they go without a trace."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.linux import cgroup
from workbench.linux.cgroup import Cgroup
from workbench.model import Limits

KIND, _CONTROLLERS = cgroup.available()
needs_groups = pytest.mark.skipif(KIND == "none", reason="no control group may be made here; see the rlimits below")
UNIFIED = cgroup._mounts()[0]
needs_v2 = pytest.mark.skipif(not (UNIFIED and os.access(UNIFIED, os.W_OK)), reason="no cgroup2 that may be written")


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test{os.getpid()}"
    yield name
    for base in (*cgroup.find().bases.values(), UNIFIED):
        assert not os.path.exists(f"{base}/workbench/{name}")


def run(group: Cgroup, code: str) -> subprocess.Popen[str]:
    with group.joined():
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    if group.kind == "v2":
        group.add(process.pid)
    return process


@needs_groups
def test_memory(name: str) -> None:
    group = Cgroup.make(name, Limits(memory=64 << 20))
    assert group
    try:
        well = run(group, "x = bytearray(20 << 20); print(len(x))")
        assert well.communicate()[0] == f"{20 << 20}\n"
        assert group.oom_kills() == 0
        ill = run(group, "x = bytearray(200 << 20); print(len(x))")
        assert ill.communicate()[0] == ""
        assert ill.returncode == -signal.SIGKILL
        assert group.oom_kills() == 1
    finally:
        group.remove()


@needs_groups
def test_processes(name: str) -> None:
    group = Cgroup.make(name, Limits(processes=4))
    assert group
    try:
        code = "import os\nfor i in range(9):\n if os.fork() == 0: os.read(0, 1); os._exit(0)"
        process = run(group, code)
        _, errors = process.communicate(timeout=20)
        assert "BlockingIOError" in errors
        assert group.pids_refused() >= 1
    finally:
        group.remove()


@needs_groups
def test_processor_time(name: str) -> None:
    group = Cgroup.make(name, Limits(cpus=0.2))
    assert group
    try:
        code = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
        used = float(run(group, code).communicate()[0])
        assert 0.1 < used < 0.45
        assert 0.1 < group.usage().cpu < 0.6
    finally:
        group.remove()


@needs_groups
def test_readings_freeze_and_kill(name: str) -> None:
    group = Cgroup.make(name, Limits(memory=256 << 20, processes=20, cpus=2.0))
    assert group
    process = run(group, "import sys\nx = bytearray(30 << 20)\ni = 0\nwhile True: print(i, flush=True); i += 1")
    assert process.stdout
    process.stdout.readline()
    try:
        used = group.usage()
        assert 30 << 20 < used.memory < 100 << 20
        assert used.processes == 1
        assert group.pids() == [process.pid]
        drain = threading.Thread(target=process.stdout.read)
        drain.start()
        group.freeze()
        before = group.usage().cpu
        time.sleep(0.2)
        assert group.usage().cpu == before
        group.thaw()
        time.sleep(0.2)
        assert group.usage().cpu > before
        group.freeze()
        group.kill()  # reaches the frozen, too
        assert process.wait(timeout=10) == -signal.SIGKILL
        drain.join()
    finally:
        group.remove()
        group.remove()  # twice is fine


@needs_groups
def test_removing_ends_what_still_runs(name: str) -> None:
    group = Cgroup.make(name, Limits())
    assert group
    process = run(group, "import os, time\nos.fork()\ntime.sleep(100)")
    time.sleep(0.2)
    Cgroup.forget(name)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert not any(Path(folder).exists() for folder in group.folders.values())
    Cgroup.forget(name)


@needs_groups
def test_a_parent_whose_maker_was_killed_before_its_first_group_goes(name: str) -> None:
    parents = [Path(base, "workbench") for base in dict.fromkeys(cgroup.find().bases.values())]
    for parent in parents:
        parent.mkdir(exist_ok=True)
    Cgroup.forget(name)
    left = [parent for parent in parents if parent.exists()]
    assert all(any(entry.is_dir() for entry in parent.iterdir()) for parent in left), left


@needs_groups
def test_joining_puts_the_child_in_and_brings_us_back(name: str) -> None:
    before = Path("/proc/self/cgroup").read_text()
    group = Cgroup.make(name, Limits())
    assert group
    try:
        with pytest.raises(RuntimeError), group.joined():
            if group.kind == "v1":
                assert f"/workbench/{name}" in Path("/proc/self/cgroup").read_text()
            raise RuntimeError
        assert Path("/proc/self/cgroup").read_text() == before
    finally:
        group.remove()


@needs_groups
def test_the_shared_folder_comes_and_goes_under_many(name: str) -> None:
    """Groups made and removed side by side: each removal may take the parent that another is about to use."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from workbench.linux.cgroup import Cgroup\nfrom workbench.model import Limits\n"
        "for i in range(60):\n g = Cgroup.make(sys.argv[2], Limits(memory=1 << 24)); assert g; g.remove()"
    )
    top = str(Path(__file__).parents[2])
    many = [subprocess.Popen([sys.executable, "-c", code, top, f"{name}-{i}"]) for i in range(4)]
    assert [process.wait() for process in many] == [0] * 4


@needs_v2
def test_v2(name: str) -> None:
    """The parts of v2 that no controller is needed for; this kernel may have all of them bound to v1."""
    folder = f"{UNIFIED}/workbench/{name}"
    cgroup._make_folder(UNIFIED, name, ())
    group = Cgroup("v2", {"memory": folder})
    process = subprocess.Popen(["sleep", "100"])
    try:
        group.add(process.pid)
        assert group.pids() == [process.pid]
        group.freeze()
        assert "frozen 1" in Path(folder, "cgroup.events").read_text()
        group.thaw()
        assert "frozen 0" in Path(folder, "cgroup.events").read_text()
        group.freeze()
        group.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
    finally:
        process.kill()
        group.remove()


def test_rlimits_never_raise() -> None:
    kinds = {kind: (soft, hard) for kind, soft, hard in cgroup.rlimits(Limits(memory=1 << 30, processes=1 << 40), None)}
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    expected = 1 << 40 if hard == resource.RLIM_INFINITY else hard
    assert kinds == {resource.RLIMIT_DATA: (1 << 30, 1 << 30), resource.RLIMIT_NPROC: (expected, expected)}
    assert cgroup.rlimits(Limits(), None) == []


@needs_groups
def test_what_a_controller_is_missing_for_is_left_to_rlimits(name: str) -> None:
    place = cgroup.find()
    without = cgroup.Place(place.kind, {key: base for key, base in place.bases.items() if key != "memory"})
    limits = Limits(memory=1 << 30, processes=100)
    group = Cgroup.make(name, limits, without)
    assert group
    try:
        assert [kind for kind, *_ in cgroup.rlimits(limits, group)] == [resource.RLIMIT_DATA]
    finally:
        group.remove()


def test_rlimits_limit() -> None:
    def apply() -> None:
        for kind, soft, hard in cgroup.rlimits(Limits(memory=100 << 20), None):
            resource.setrlimit(kind, (soft, hard))

    code = "x = bytearray(20 << 20)\ntry: bytearray(200 << 20)\nexcept MemoryError: print('refused')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], preexec_fn=apply, capture_output=True, text=True)
    assert done.stdout == "refused\n"
