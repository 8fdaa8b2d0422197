"""What a step of a recipe is, and what all of them share.

A step's key covers everything that leaves a mark in its layer: the layers below, the files that it takes (by
hash), its own program, the clamping time. Each kind of step has a module: ``debian``, ``wheels``, ``custom``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from workbench.build.fetch import Fetcher, File
from workbench.build.lock import StepLock
from workbench.build.recipe import Recipe
from workbench.model import Exit, Mount, Network, Settings

VENV = "/opt/venv"
PATH = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where a step's container sees what the host prepared for it, and leaves what the host wants to read.
IN = "/run/workbench/in"
OUT = "/run/workbench/out"


@dataclass(frozen=True, slots=True)
class Run:
    """One container of a step. tree: the host folder that becomes the layer, where it is not the container's own."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    network: Network = "none"
    bootstrap: bool = False
    tree: str = ""


class StepFailed(Exception):
    """A container of a step ended badly. lines: the end of what it printed; tree: what it had written by then."""

    def __init__(self, end: Exit, lines: Sequence[str], log: Path, tree: Path | None) -> None:
        super().__init__(end.reason)
        self.end, self.lines, self.log, self.tree = end, list(lines), log, tree


class Site(Protocol):
    """What the builder gives a step to work with."""

    suite: str
    epoch: int
    settings: Settings
    fetcher: Fetcher
    uv_cache: Path

    def scratch(self) -> Path:
        """A new folder of the host, gone when the step is over."""

    def try_out(self, step: Step, runs: Sequence[Run]) -> None:
        """Run containers over the layers below and keep nothing of what they write. Raises StepFailed."""

    def newest(self, pattern: str) -> Path | None:
        """A path in the highest of the layers below that has it; pattern: as ``Path.glob`` takes it."""


class Step(Protocol):
    """A step. name: for people and files; title: what it does; asks: what the recipe says of it."""

    name: str
    title: str
    asks: dict[str, Any]

    def marks(self) -> dict[str, Any]:
        """What else than its files leaves a mark in the layer: programs, scripts."""

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        """Choose what exactly is taken. old: what shall stay where it still can. Raises StepFailed, BuildFailed."""

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Make here what cannot be fetched. Raises StepFailed, BuildFailed."""

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        """What is to be fetched; ``every``: also what this host has otherwise."""

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        """Its containers; taken: the files by sha256."""


def key(step: Step, locked: StepLock, parent: str, epoch: int) -> str:
    """The key of what a step makes: 64 hex digits; parent: the diff_id below, epoch: the clamping time."""
    taken = sorted([entry.sha256, getattr(entry, "priority", "")] for entry in locked.packages)
    return _hash(step.marks() | {"asks": step.asks, "builder": locked.builder, "taken": taken}, step, parent, epoch)


def asks_key(step: Step, old: StepLock | None, parent: str, epoch: int) -> str:
    """The key of what was made of a step when nothing said what to take, or just what is too ``old`` by now."""
    before = old and [entry.sha256 for entry in old.packages]
    return _hash(step.marks() | {"asks": step.asks, "resolved": before or True}, step, parent, epoch)


def _hash(parts: dict[str, Any], step: Step, parent: str, epoch: int) -> str:
    parts |= {"step": step.name, "parent": parent, "epoch": epoch, "cpu": platform.machine()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hand_over(folder: Path, files: Mapping[str, Path]) -> None:
    """Put files into a folder under other names (relative paths), without a copy where the disk allows it."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            target.write_bytes(source.read_bytes())


def step_environment(epoch: int) -> dict[str, str]:
    """Variables of every step: the clamping time, and no bytecode but that which a step makes on purpose."""
    return {
        "PATH": PATH, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/root",
        "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0",
    }  # fmt: skip


def image_environment(recipe: Recipe, derived: bool = False) -> dict[str, str]:
    """What a recipe sets of its image's variables, its own last. derived: another image's are below them."""
    env = {} if derived else {"PATH": PATH.partition(":")[2], "LANG": "C.UTF-8"}
    # A cell's ! gives apt a terminal that nobody can answer at.
    env["DEBIAN_FRONTEND"] = "noninteractive"
    if recipe.python.packages:
        env |= {"PATH": PATH, "VIRTUAL_ENV": VENV}
    return env | recipe.env


def count(number: int, what: str) -> str:
    """``3 wheels``."""
    return f"{number} {what}" + ("" if number == 1 else "s")
