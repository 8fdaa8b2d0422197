"""A launch that is killed at any point leaves nothing: the next one, or any listing, tidies up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from workbench.containers import launch, state

LAUNCH = """
import sys
from workbench.workbench import Workbench
wb = Workbench()
if {warm}:
    wb.containers.helper.request("warm").result()
    print(wb.containers.helper._process.pid, flush=True)
else:
    print(0, flush=True)
c = wb.create({image!r}, argv=["sleep", "1000"], cwd=None)
c.start().result()
sys.stdin.read()
"""


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4, 7, 11, 16, 25, 40, 80])
@pytest.mark.parametrize("who", ["client", "helper", "both"])
def test_kill_9_at_any_point_leaves_nothing(workbench, image, who, milliseconds):
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(image=image, warm=who != "client" or milliseconds % 2)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    helper = int(process.stdout.readline())
    time.sleep(milliseconds / 1000)
    if who != "client":
        os.kill(helper, signal.SIGKILL)
    if who != "helper":
        process.kill()
    process.stdin.close()
    process.wait()
    # A helper that lives tidies up by itself; what was killed with it waits for the next look.
    until = time.monotonic() + 8
    while os.path.isdir(workbench.containers.folder) and os.listdir(workbench.containers.folder):
        workbench.sweep()
        assert time.monotonic() < until, workbench.ps(every=True)
        time.sleep(0.05)
    workbench.sweep()


def test_two_tidy_up_at_once(tmp_path):
    """A helper that outlives its client is at the same folder as whoever looks next."""
    known = {"run_dir": str(tmp_path / "run" / "nothing-there"), "spec": {"layers": []}, "status": "created",
             "exit": None, "pid": None, "tree": "tree", "maker": None}  # fmt: skip
    containers = tmp_path / "containers"
    with ThreadPoolExecutor(1) as other:
        for number in range(1500):
            folder = str(containers / f"{number:012x}")
            os.makedirs(os.path.join(folder, "tree", "upper"))
            state.save(folder, known | {"id": f"{number:012x}"})
            removed = other.submit(state.remove, folder)
            launch.bury(folder, f"{number:012x}")
            removed.result()
    assert os.listdir(containers) == []


def test_a_folder_that_was_only_begun_goes_and_one_in_the_making_stays(workbench, image):
    old, new = (os.path.join(workbench.containers.folder, name) for name in ("00000000000a", "00000000000b"))
    for folder in (old, new):
        os.makedirs(folder)
    os.utime(old, (0, 0))
    assert workbench.sweep() == ["00000000000a"]
    assert os.listdir(workbench.containers.folder) == ["00000000000b"]
    os.rmdir(new)
