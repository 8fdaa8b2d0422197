"""A recipe: the folder that says how an image is built, read strictly from its ``recipe.toml``.

Every table is a struct that names all its keys. An unknown key, a wrong type and a wrong value are each
one line that names the file and the key; nothing is guessed and nothing is ignored.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from workbench.model import InvalidInput, Kernel, Limits, NotFound, parse_size

FILE = "recipe.toml"

#: Debian suites whose default sources and keys are known; the first is the default of the documentation.
SUITES = ("bookworm", "trixie")

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*(?:/[a-z0-9]+(?:[._-][a-z0-9]+)*)*")
# Debian policy 5.6.1, with the two ways apt-get has to choose a version: name=version, name/suite.
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+|/[a-z0-9-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

IPYKERNEL_ARGV = ("/opt/venv/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}")


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[base]``: what the image stands on."""

    suite: str


class Apt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[apt]``: Debian packages."""

    packages: tuple[str, ...] = ()


class Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[python]``: Python packages, installed by uv into ``/opt/venv``."""

    packages: tuple[str, ...] = ()


class KernelTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[kernel]``: how the image's kernel is started; the default is ipykernel."""

    argv: tuple[str, ...] = ()
    language: str = "python"
    display_name: str = ""
    interrupt_mode: Literal["signal", "message"] | None = None


class LimitsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[limits]``: what a container of the image may use; a configuration can only narrow it further."""

    memory: str | int | None = None
    processes: int | None = None
    cpus: float | None = None


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a ``recipe.toml``."""

    name: str
    base: Base
    description: str = ""
    apt: Apt = Apt()
    python: Python = Python()
    env: dict[str, str] = {}
    kernel: KernelTable | None = None
    limits: LimitsTable = LimitsTable()

    @property
    def has_ipykernel(self) -> bool:
        """Whether the Python packages name ipykernel."""
        return any(requirement_name(text) == "ipykernel" for text in self.python.packages)

    def kernel_spec(self) -> Kernel | None:
        """The image's kernel without what only the built image tells, or None for an image without one."""
        table = self.kernel or KernelTable()
        if self.kernel is None and not self.has_ipykernel:
            return None
        ours = not table.argv
        return Kernel(
            argv=table.argv or IPYKERNEL_ARGV,
            language=table.language,
            display_name=table.display_name or f"{table.language.capitalize()} ({self.name})",
            # ipykernel answers interrupt_request; a client's doubled SIGINT then cannot hit twice.
            interrupt_mode=table.interrupt_mode or ("message" if ours else "signal"),
        )

    def limit_values(self) -> Limits:
        """The limits in the units of the model."""
        memory = self.limits.memory
        return Limits(None if memory is None else parse_size(memory), self.limits.processes, self.limits.cpus)


def requirement_name(text: str) -> str:
    """The normalised project name (PEP 503) of a PEP 508 requirement; empty for what is none."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        return canonicalize_name(Requirement(text).name)
    except InvalidRequirement:
        return ""


def load(folder: str | Path) -> Recipe:
    """Read and check the recipe in a folder, or of a ``recipe.toml`` that is named itself.

    Raises NotFound for a folder or file that is not there and InvalidInput for everything that it says wrong.
    """
    path = Path(folder)
    if path.name != FILE or path.is_dir():
        if not path.is_dir():
            obstacle = "is not a folder" if path.exists() else "there is no such folder"
            raise NotFound("read a recipe", f"{path}: {obstacle}", f"give the folder that holds a {FILE}")
        path = path / FILE
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise NotFound("read a recipe", f"{path}: there is no such file", f"write a {FILE} there") from None
    except UnicodeDecodeError as error:
        raise InvalidInput("read a recipe", f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InvalidInput("read a recipe", f"{path}: {error.strerror}") from None
    return parse(text, str(path))


def parse(text: str, where: str = FILE) -> Recipe:
    """A recipe from the text of its file; ``where`` is named in errors. Raises InvalidInput."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("read a recipe", f"{where}: {error}", "see https://toml.io") from None
    check = _Check(where)
    check.unknown_keys(data)
    try:
        recipe = msgspec.convert(data, Recipe, strict=True)
    except msgspec.ValidationError as error:
        check.shape(str(error))
    check.values(recipe)
    return recipe


def known_keys(struct: type[msgspec.Struct] = Recipe, at: str = "") -> Iterator[str]:
    """Every key that a recipe can have, as a dotted path; tables too."""
    for name, kind in _tables(struct):
        yield f"{at}{name}"
        if kind is not None:
            yield from known_keys(kind, f"{at}{name}.")


def _tables(struct: type[msgspec.Struct]) -> Iterator[tuple[str, type[msgspec.Struct] | None]]:
    for field in msgspec.structs.fields(struct):
        kinds = [field.type, *getattr(field.type, "__args__", ())]
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
        yield field.encode_name, tables[0] if tables else None


class _Check:
    """The checks of one file; every failure is an InvalidInput that names file and key."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, key: str, obstacle: str, remedy: str = "") -> NoReturn:
        raise InvalidInput("read a recipe", f"{self.where}: {key}: {obstacle}", remedy)

    def unknown_keys(self, data: dict[str, Any]) -> None:
        self._unknown(data, Recipe, "")
        for name, value in data["env"].items() if isinstance(data.get("env"), dict) else ():
            if not isinstance(value, str):
                self.fail(f"env.{name}", f"{value!r} is no text", f'write {name} = "{value}"')

    def _unknown(self, data: dict[str, Any], struct: type[msgspec.Struct], at: str) -> None:
        tables = dict(_tables(struct))
        for key, value in data.items():
            if key not in tables:
                remedy = _nearest(at + key, at, list(tables))
                self.fail(at + key, "unknown key", remedy)
            table = tables[key]
            if table is not None and isinstance(value, dict):
                self._unknown(value, table, f"{at}{key}.")

    def shape(self, message: str) -> NoReturn:
        """Msgspec's sentence, with the path in front and its words in TOML's."""
        found = re.fullmatch(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", message)
        assert found
        said, key = found[1], found[2] or ""
        missing = re.search(r"missing required field `(\w+)`", said)
        if missing:
            key = f"{key}.{missing[1]}" if key else missing[1]
            remedy = {"base": f'add [base] with suite = "{SUITES[0]}"'}.get(key, f'add {key} = "…"')
            self.fail(key, "missing", remedy)
        if key == "kernel.interrupt_mode" and "enum" in said:
            self.fail(key, said.replace("enum ", "").lower(), 'write "signal" or "message"')
        for theirs, ours in _WORDS:
            said = re.sub(theirs, ours, said)
        self.fail(key.replace("[...]", "[]") or "the file", said[:1].lower() + said[1:])

    def values(self, recipe: Recipe) -> None:
        if not _NAME.fullmatch(recipe.name):
            self.fail("name", f"{recipe.name!r} is no image name", "use a-z, 0-9 and single . _ - between them")
        if recipe.base.suite not in SUITES:
            near = difflib.get_close_matches(recipe.base.suite, SUITES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SUITES)}"
            self.fail("base.suite", f"{recipe.base.suite!r} is no Debian suite known here", hint)
        for index, package in enumerate(recipe.apt.packages):
            if not _APT.fullmatch(package):
                remedy = "one package to a string, as apt-get install takes it"
                self.fail(f"apt.packages[{index}]", f"{package!r} is no Debian package name", remedy)
        for index, requirement in enumerate(recipe.python.packages):
            self._requirement(f"python.packages[{index}]", requirement)
        for name, value in recipe.env.items():
            if not _VARIABLE.fullmatch(name):
                self.fail(f"env.{name}", "is no name of an environment variable", "use A-Z, 0-9 and _")
            if "\0" in value:
                self.fail(f"env.{name}", "holds a null character")
        self._kernel(recipe)
        self._limits(recipe)

    def _requirement(self, key: str, text: str) -> None:
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            found = Requirement(text)
        except InvalidRequirement:
            self.fail(key, f"{text!r} is no Python requirement", 'write it like "pandas>=2"')
        if any(ord(c) < 32 for c in text):
            self.fail(key, f"{text!r} is no Python requirement", "one requirement to a string")
        if found.url and not re.match(r"https?://", found.url):
            self.fail(key, f"{text!r} points at a local file", "the build sees https:// addresses only")

    def _kernel(self, recipe: Recipe) -> None:
        table = recipe.kernel
        if table is None:
            return
        if not table.argv and not recipe.has_ipykernel:
            remedy = 'add "ipykernel" to python.packages or give the kernel\'s own argv'
            self.fail("kernel.argv", "missing, and the recipe installs no ipykernel", remedy)
        if table.argv and not any("{connection_file}" in part for part in table.argv):
            self.fail("kernel.argv", "no element holds {connection_file}", "the kernel needs its path")
        if table.argv and not table.argv[0].startswith("/"):
            # jupyter_client rewrites a bare "python" to the host's interpreter.
            self.fail("kernel.argv[0]", f"{table.argv[0]!r} is no absolute path", "name it from /")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+#._-]*", table.language):
            self.fail("kernel.language", f"{table.language!r} is no language name")
        if any(ord(c) < 32 for c in table.display_name):
            self.fail("kernel.display_name", "holds a control character")

    def _limits(self, recipe: Recipe) -> None:
        limits = recipe.limits
        if limits.memory is not None:
            try:
                memory = parse_size(limits.memory)
            except InvalidInput as error:
                self.fail("limits.memory", error.obstacle, error.remedy)
            if memory < 16 << 20:
                self.fail("limits.memory", f"{limits.memory!r} is less than 16M", "no kernel starts in that")
        if limits.processes is not None and limits.processes < 1:
            self.fail("limits.processes", f"{limits.processes} is less than 1")
        if limits.cpus is not None and not 0.01 <= limits.cpus <= 65536:
            self.fail("limits.cpus", f"{limits.cpus} is no number of processors", "write it like 1.5")


_WORDS = (
    (r"`(?:object|dict)`", "table"),
    (r"`array`", "a list"),
    (r"`(?:int \| str|str \| int)(?: \| null)?`", "text or a whole number"),
    (r"`str(?: \| null)?`", "text"),
    (r"`int(?: \| null)?`", "a whole number"),
    (r"`float(?: \| null)?`", "a number"),
    (r"`bool`", "true or false"),
    (r"`datetime`|`date`|`time`", "a date"),
)


def _nearest(path: str, at: str, here: list[str]) -> str:
    """The known key that was most likely meant: in this table first, then anywhere."""
    name = path[len(at) :]
    near = difflib.get_close_matches(name, here, 1, 0.6)
    if near:
        return f"did you mean {at}{near[0]}?"
    everywhere = list(known_keys())
    leaves = {key.rpartition(".")[2]: key for key in reversed(everywhere)}
    near = difflib.get_close_matches(name, list(leaves), 1, 0.7)
    if near:
        return f"did you mean {leaves[near[0]]}?"
    return f"known here are {', '.join(at + key for key in here)}" if here else ""


def shipped() -> dict[str, Path]:
    """The recipes that come with Workbench: name -> folder."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "recipes", package.parent / "recipes"):
        if root.is_dir():
            return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{FILE}"))}
    return {}


def find(text: str) -> Path:
    """The folder that a person means: one that exists, or the name of a shipped recipe. Raises NotFound."""
    if os.path.exists(text):
        return Path(text)
    known = shipped()
    if text in known:
        return known[text]
    near = difflib.get_close_matches(text, known, 1)
    remedy = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(known) or 'none'}"
    raise NotFound("find a recipe", f"{text}: there is no such folder", remedy)
