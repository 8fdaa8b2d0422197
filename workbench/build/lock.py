"""A recipe's lock: every file that a build takes, by hash, and what each step then gives.

TOML for people: one line for each package, sorted by name, so that a changed version is a changed line in a
review. It names no host: where a file is fetched from is the business of whoever builds.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from workbench.model import InvalidInput

FILE = "recipe.lock"
VERSION = 1

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_DIFF_ID = r"^(?:sha256:[0-9a-f]{64})?\Z"
#: A file's own name, and nothing that leads elsewhere.
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9+._~%:!-]*\Z")]
DebName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+\Z")]
Project = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9+._~:!-]*\Z")]
Size = Annotated[int, msgspec.Meta(gt=0)]
Path_ = Annotated[
    str, msgspec.Meta(pattern=r"^(?:debian|security)/pool/(?:[A-Za-z0-9][A-Za-z0-9+._~%:-]*/)+[^/\s]+\.deb\Z")
]


class Deb(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Debian package. path: archive (``debian`` or ``security``) and the place in its pool; size: bytes.

    priority: the archive's, where a base is made of it.
    """

    name: DebName
    version: Version
    arch: Name
    sha256: Sha256
    size: Size
    path: Path_
    priority: Literal["", "required"] = ""

    @property
    def file(self) -> str:
        """The file's own name."""
        return self.path.rpartition("/")[2]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A source distribution; size: bytes."""

    file: Name
    sha256: Sha256
    size: Size


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Python distribution as its one wheel. source: what it was built from, where no index offers it."""

    name: Project
    version: Version
    file: Name
    sha256: Sha256
    size: Size
    source: Source | None = None


class StepLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one step takes and gives. asks: what the recipe says; builder: the program that leaves a mark."""

    name: str
    asks: dict[str, Any]
    builder: str = ""
    diff_id: Annotated[str, msgspec.Meta(pattern=_DIFF_ID)] = ""
    debian: tuple[Deb, ...] = ()
    wheels: tuple[Wheel, ...] = ()
    #: The image that all stands on, where it is no Debian suite.
    image: Annotated[str, msgspec.Meta(pattern=_DIFF_ID)] = ""
    #: The program itself, where it comes as a wheel.
    tool: Wheel | None = None
    #: What the layer holds, in short: path -> beginning of a digest, to tell where another one differs.
    sums: dict[str, str] = {}

    def names(self, sums: dict[str, str]) -> list[str]:
        """Paths where a layer of these sums is not what this step's lock says, sorted."""
        return sorted(path or "/" for path in self.sums | sums if self.sums.get(path) != sums.get(path))

    @property
    def packages(self) -> tuple[Deb | Wheel, ...]:
        """All that it takes."""
        return (*self.debian, *self.wheels)


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a ``recipe.lock``. time: the newest file of the archives; files in layers are not newer."""

    version: int
    time: datetime
    machine: str
    steps: tuple[StepLock, ...] = ()

    @property
    def epoch(self) -> int:
        """``time`` in seconds since 1970."""
        return int(self.time.timestamp())

    def step(self, name: str) -> StepLock | None:
        """The step of that name."""
        return next((step for step in self.steps if step.name == name), None)


def checked(step: StepLock) -> StepLock:
    """A step as it was chosen, held against what a lock may say: its names become paths. Raises InvalidInput."""
    try:
        return msgspec.convert(msgspec.to_builtins(step), StepLock)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"lock step {step.name}", str(error), "name other packages") from None


def new(epoch: int, machine: str, steps: tuple[StepLock, ...]) -> Lock:
    """A lock of this version; epoch: seconds since 1970."""
    return Lock(VERSION, datetime.fromtimestamp(epoch, UTC), machine, steps)


def load(folder: str | Path) -> Lock | None:
    """The lock beside a recipe, or None without one. Raises InvalidInput."""
    path = Path(folder) / FILE
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("read a lock", f"{path}: {error}", _AGAIN) from None
    return parse(text, str(path))


_AGAIN = "write it anew with `jupyter workbench lock`"


def parse(text: str, where: str = FILE) -> Lock:
    """A lock from its text; ``where`` is named in errors. Raises InvalidInput."""
    try:
        data = tomllib.loads(text)
        found = msgspec.convert(data, Lock, strict=True)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput("read a lock", f"{where}: {error}", _AGAIN) from None
    if found.version != VERSION:
        raise InvalidInput(
            "read a lock", f"{where}: it is of version {found.version}, this Workbench reads {VERSION}", _AGAIN
        )
    return found


def write(lock: Lock) -> str:
    """The text of a lock; ``parse`` is the inverse."""
    return "\n".join(_lines(lock)) + "\n"


def save(lock: Lock, folder: str | Path) -> Path:
    """Write a lock beside its recipe, whole or not at all. Raises InvalidInput."""
    path = Path(folder) / FILE
    new = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        new.write_text(write(lock), "utf-8")
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise InvalidInput(
            "write a lock", f"{path}: {error.strerror}", "copy the recipe to a folder of yours"
        ) from None
    return path


def _lines(lock: Lock) -> Iterator[str]:
    yield "# Written by `jupyter workbench lock`: what a build of the recipe takes and gives, to the byte."
    yield f"version = {lock.version}"
    yield f"time = {lock.time.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}"
    yield f"machine = {toml_value(lock.machine)}"
    for step in lock.steps:
        yield ""
        yield "[[steps]]"
        yield f"name = {toml_value(step.name)}"
        yield f"asks = {toml_value(step.asks)}"
        if step.builder:
            yield f"builder = {toml_value(step.builder)}"
        if step.image:
            yield f"image = {toml_value(step.image)}"
        if step.diff_id:
            yield f"diff_id = {toml_value(step.diff_id)}"
        if step.tool:
            yield f"tool = {toml_value(_plain(step.tool))}"
        packages: dict[str, Sequence[Deb | Wheel]] = {"debian": step.debian, "wheels": step.wheels}
        for key, entries in packages.items():
            if entries:
                yield f"{key} = ["
                for entry in sorted(entries, key=lambda each: (each.name, each.version, each.sha256)):
                    yield f"  {toml_value(_plain(entry))},"
                yield "]"
        if step.sums:
            yield "[steps.sums]"
            for path, digest in sorted(step.sums.items()):
                yield f"{toml_key(path)} = {toml_value(digest)}"


def _plain(entry: Deb | Wheel) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(entry)
    return {key: value for key, value in plain.items() if value not in (None, "")}


def toml_value(value: Any) -> str:
    """A value in TOML: text, number, list or inline table (toml.io, v1.0)."""
    if isinstance(value, dict):
        inner = ", ".join(f"{toml_key(key)} = {toml_value(each)}" for key, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(each) for each in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def toml_key(text: str) -> str:
    """A key in TOML, quoted where it has to be."""
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else toml_value(text)
