"""The steps of what is the recipe's own: files beside it, and shell scripts."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.build import lock
from workbench.build.fetch import File
from workbench.build.lock import StepLock
from workbench.build.pins import beside
from workbench.build.recipe import RunTable
from workbench.build.steps import IN, Run, Site
from workbench.model import Conflict, InvalidInput, Mount, count

# Laid out as they are to be already: only copied, each below its folder, which may be there.
_COPY = r"""
set -eu
cd IN/files
find . -mindepth 1 -type d | sort | while IFS= read -r name; do [ -e "/$name" ] || mkdir "/$name"; done
find . -mindepth 1 ! -type d | sort | while IFS= read -r name; do rm -rf "/$name"; cp -a "$name" "/$name"; done
""".replace("IN", IN)


class Files:
    """Files and folders beside the recipe, owned by root, with the clamping time: a checkout's own say nothing."""

    name = "files"
    own = True

    def __init__(self, files: Mapping[str, str], folder: Path) -> None:
        self._sources = {target: beside(folder, source, f"{folder}: files") for target, source in files.items()}
        self.title = count(len(files), "file or folder").replace("folders", "folders") + " of the recipe"
        self.asks: dict[str, Any] = {
            target: f"{files[target]} sha256:{_digest(source)}" for target, source in self._sources.items()
        }

    def marks(self) -> dict[str, Any]:
        return {"script": _COPY}

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        return StepLock(self.name, self.asks)

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Nothing: all of it is here."""

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        return []

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        root = site.scratch()
        for target, source in self._sources.items():
            copied = root / target.lstrip("/")
            for path, below in _walk(source):
                _copy(path, copied / below if below else copied, site.epoch)
            if not self.asks[target].endswith(_digest(copied)):
                raise Conflict("copy the recipe's files", f"{source} has changed meanwhile", "build again")
        return [Run(("/bin/sh", "-c", _COPY), {}, (Mount(str(root), f"{IN}/files", read_only=True),))]


class Script:
    """A shell script of the recipe's own; without a network it depends on nothing that the lock does not name."""

    own = True

    def __init__(self, number: int, table: RunTable) -> None:
        self.name = f"run-{number}"
        self._table = table
        first = table.script.strip().splitlines()[0]
        self.title = first if len(first) <= 50 else first[:49] + "…"
        if table.network:
            self.title += " (with network: no lock covers what it fetches)"
        self.asks: dict[str, Any] = {"script": table.script, "network": table.network}

    def marks(self) -> dict[str, Any]:
        return {}

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        return StepLock(self.name, self.asks)

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Nothing: all of it is here."""

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        return []

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        argv = ("/bin/sh", "-eu", "-c", self._table.script)
        return [Run(argv, {}, (), network="outbound" if self._table.network else "none")]


def _walk(source: Path) -> Iterator[tuple[Path, str]]:
    """A file, or a folder with all that is in it: each with its path below ``source``, sorted."""
    yield source, ""
    if source.is_dir() and not source.is_symlink():
        for folder, names, files in os.walk(source):
            names[:] = sorted(name for name in names if name not in (".git", "__pycache__", ".ipynb_checkpoints"))
            if folder == str(source):  # of a whole recipe: not what is made for the lock from it
                names[:] = [name for name in names if name != "vendor"]
                files = [name for name in files if name != lock.FILE]
            for name in sorted([*names, *files]):
                path = Path(folder, name)
                yield path, str(path.relative_to(source))


def _kind(path: Path) -> tuple[str, int]:
    """What it becomes: its kind and mode; of a checkout's modes only "executable" means something."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "link", 0o777
    if stat.S_ISDIR(found.st_mode):
        return "folder", 0o755
    if stat.S_ISREG(found.st_mode):
        return "file", 0o755 if found.st_mode & 0o100 else 0o644
    raise InvalidInput("read a recipe", f"{path} is neither a file, a folder nor a link", "leave it out")


def _digest(source: Path) -> str:
    """A hash of all that the image gets of it."""
    whole = hashlib.sha256()
    for path, below in _walk(source):
        kind, mode = _kind(path)
        content = os.fsencode(os.readlink(path)) if kind == "link" else path.read_bytes() if kind == "file" else b""
        head = f"{below}\0{kind}\0{mode:o}\0{len(content)}\0"
        whole.update(head.encode("utf-8", "surrogateescape") + content)
    return whole.hexdigest()


def _copy(source: Path, target: Path, epoch: int) -> None:
    kind, mode = _kind(source)
    target.parent.mkdir(0o755, parents=True, exist_ok=True)
    if kind == "link":
        target.symlink_to(os.readlink(source))
    elif kind == "folder":
        target.mkdir(exist_ok=True)
        target.chmod(mode)
    else:
        target.write_bytes(source.read_bytes())
        target.chmod(mode)
    os.utime(target, (epoch, epoch), follow_symlinks=False)
