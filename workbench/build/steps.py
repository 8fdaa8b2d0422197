"""What a step of a recipe is, and what all of them share.

A step's key covers everything that leaves a mark in its layer: the layers below, the files that it takes (by
hash), its own program, the clamping time. Each kind of step has a module: ``debian``, ``wheels``, ``custom``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from workbench.build.fetch import Fetcher, File
from workbench.build.lock import StepLock
from workbench.build.recipe import Recipe
from workbench.model import BuildFailed, Exit, InvalidInput, Mount, Network, Settings

VENV = "/opt/venv"
PATH = f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where a step's container sees what the host prepared for it, and leaves what the host wants to read.
IN = "/run/workbench/in"
OUT = "/run/workbench/out"


@dataclass(frozen=True, slots=True)
class Run:
    """One container of a step. tree: the host folder that becomes the layer, where it is not the container's own;
    then: to be done when it has ended well."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    network: Network = "none"
    bootstrap: bool = False
    tree: str = ""
    then: Callable[[], None] | None = None


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
    #: Whether all below is made of Debian's packages alone.
    trusted: bool

    @property
    def bytecode(self) -> Path | None:
        """Where bytecode of packages is kept that the layers below compile to; None where none may be."""

    def scratch(self) -> Path:
        """A new folder of the host, gone when the step is over."""

    def try_out(self, step: Step, runs: Sequence[Run]) -> None:
        """Run containers over the layers below and keep nothing of what they write. Raises StepFailed."""

    def newest(self, pattern: str) -> Path | None:
        """A path in the highest of the layers below that has it; pattern: as ``Path.glob`` takes it."""


class Step(Protocol):
    """A step. name: for people and files; title: what it does; asks: what the recipe says of it; own: whether what it
    leaves is the recipe's own, and not of packages that others made."""

    name: str
    title: str
    asks: dict[str, Any]
    own: bool

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


def read_out(folder: Path, name: str, limit: int = 64 << 20) -> bytes:
    """A file that a container left in its OUT. Code inside may have put anything there instead. Raises BuildFailed."""
    tried = "read what a step chose"
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BuildFailed(tried, f"{name}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise BuildFailed(tried, f"{name} is no file of a sensible size", "do not trust what builds it")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(fd)


def hand_over(folder: Path, files: Mapping[str, Path]) -> None:
    """Put files into a folder under other names (relative paths), without a copy where the disk allows it.

    Nothing that is there is overwritten; a name that leads out of the folder is refused. Raises InvalidInput.
    """
    for name, source in files.items():
        if name.startswith("/") or ".." in name.split("/"):
            raise InvalidInput("lay out a step's files", f"{name!r} leads elsewhere", "do not trust that recipe")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except FileExistsError:
            continue  # named twice
        except OSError:
            with open(source, "rb") as content, open(target, "xb") as copy:
                shutil.copyfileobj(content, copy)


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
