"""What Podman unpacks of an image is what we launch: names, bytes, modes, owners, times, attributes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BASE
from tests.history.test_snapshot import DRIVER, Live, difference, listed
from workbench.workbench import Workbench

#: What we bind over, or make for a container: it is no part of the image there.
OURS = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}


@pytest.fixture
def podman() -> Iterator[list[str]]:
    """Its command line, over a store of its own, of whose run folder the path may have 50 characters."""
    place = BASE / "podman"
    yield ["podman", "--root", f"{place}/root", "--runroot", f"{place}/run", "--tmpdir", f"{place}/tmp",
           "--storage-driver", "overlay", "--events-backend", "none"]  # fmt: skip
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in sorted((path for path in mounted if path.startswith(f"{place}/")), reverse=True):
        subprocess.run(["umount", path], check=True)
    shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="an image's tree is mounted")
def test_its_tree_is_ours(workbench: Workbench, image: str, podman: list[str], tmp_path: Path) -> None:
    live = Live(workbench, image)
    try:
        for seed in range(31, 35):
            live.ask(do="mutate", seed=seed, rounds=200)
            taken = live.snapshot(f"Step {seed}", name="podman/nasty")
        before = live.ask(do="list")
    finally:
        live.close()
    assert taken.image is not None
    ours = listed(workbench, taken.image)
    assert difference(ours, before) == []
    out = tmp_path / "nasty.tar"
    workbench.export("podman/nasty", str(out))
    subprocess.run([*podman, "load", "-q", "-i", str(out)], check=True, capture_output=True, timeout=200)
    inspected = json.loads(subprocess.check_output([*podman, "image", "inspect", taken.image.id[7:]]))
    assert inspected[0]["RootFS"]["Layers"] == list(taken.image.diff_ids)
    tree = subprocess.check_output([*podman, "image", "mount", taken.image.id[7:]], text=True).strip()
    try:
        # The same program tells of it that tells of ours; its own /proc, since it looks for mounts.
        command = 'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/bin/python3 -ISuc "$1"'
        theirs = json.loads(subprocess.check_output(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", command, tree, DRIVER],
            input=b'{"do": "list"}\n',
        ))  # fmt: skip
    finally:
        subprocess.run([*podman, "image", "unmount", taken.image.id[7:]], check=True, capture_output=True)
    for path in OURS:
        theirs.pop(os.fsencode(path).hex(), None)
        ours.pop(os.fsencode(path).hex(), None)
    assert len(ours) > 1000 and difference(theirs, ours) == []
