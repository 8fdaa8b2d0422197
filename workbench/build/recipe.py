"""A recipe: the folder that says how an image is built, read strictly from its ``recipe.toml``.

Every table is a struct that names all its keys. An unknown key, a wrong type and a wrong value are each
one line that names the file and the key; nothing is guessed and nothing is ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from workbench.model import InvalidInput, Kernel, Limits, NotFound, parse_size

FILE = "recipe.toml"

#: Debian suites whose default sources and keys are known, with the Python that each brings.
SUITES = {"bookworm": "3.11", "trixie": "3.13"}

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*(?:/[a-z0-9]+(?:[._-][a-z0-9]+)*)*")
# Debian policy 5.6.1, with the two ways apt-get has to choose a version: name=version, name/suite.
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+|/[a-z0-9-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

IPYKERNEL_ARGV = ("/opt/venv/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}")


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[base]``: what the image stands on: just one of these.

    suite: a Debian suite; recipe: another recipe's folder, or the name of a shipped one; image: one that is here,
    by name or ID; archive: an OCI archive. Folders and files are seen from the recipe's own folder.
    """

    suite: str | None = None
    recipe: str | None = None
    image: str | None = None
    archive: str | None = None


class Apt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[apt]``: Debian packages."""

    packages: tuple[str, ...] = ()


class Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[python]``: Python packages, installed by uv into ``/opt/venv``.

    packages: PEP 508 requirements; requirements: a requirements.txt; pylock: a pylock.toml (PEP 751); project: a
    folder with pyproject.toml and uv.lock; version: the Python that is expected, like "3.11".
    """

    packages: tuple[str, ...] = ()
    requirements: str | None = None
    pylock: str | None = None
    project: str | None = None
    version: str | None = None


class RunTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[run]]``: a shell script of your own, after everything else. network: whether it reaches out.

    What it fetches then is covered by no lock.
    """

    script: str
    network: bool = False


class KernelTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[kernel]``: how the image's kernel is started; the default is ipykernel. logo: an SVG or PNG beside the recipe.

    transport: "tcp" for a kernel that cannot speak over Unix sockets, which is relayed.
    """

    argv: tuple[str, ...] = ()
    language: str = "python"
    display_name: str = ""
    interrupt_mode: Literal["signal", "message"] | None = None
    transport: Literal["ipc", "tcp"] = "ipc"
    logo: str | None = None


class LimitsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[limits]``: what a container of the image may use; a configuration can only narrow it further."""

    memory: str | int | None = None
    processes: int | None = None
    cpus: float | None = None


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a ``recipe.toml``.

    files: path in the image -> file or folder beside the recipe; network: what containers of the image reach at the
    most; mounts: host folders that they see, each as SOURCE[:TARGET][:ro]; preload: modules to import ahead where
    kernels are started warm.
    """

    name: str
    base: Base
    description: str = ""
    apt: Apt = Apt()
    python: Python = Python()
    files: dict[str, str] = {}
    run: tuple[RunTable, ...] = ()
    env: dict[str, str] = {}
    kernel: KernelTable | None = None
    limits: LimitsTable = LimitsTable()
    network: Literal["none", "outbound", "host"] | None = None
    mounts: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()

    @property
    def has_ipykernel(self) -> bool:
        """Whether the Python packages name ipykernel."""
        return any(requirement_name(text) == "ipykernel" for text in self.python.packages)

    def kernel_spec(self, below: Kernel | None = None) -> Kernel | None:
        """The image's kernel without what only the built image tells, or None for an image without one.

        below: that of the image it stands on, which goes on where this recipe says nothing of its own.
        """
        table = self.kernel or KernelTable()
        if not table.argv and not self.has_ipykernel and below is not None:
            name = self.kernel.display_name if self.kernel else ""
            language = below.language.capitalize()
            return dataclasses.replace(below, display_name=name or f"{language} ({self.name})")
        if self.kernel is None and not self.has_ipykernel:
            return None
        ours = not table.argv
        return Kernel(
            argv=table.argv or IPYKERNEL_ARGV,
            language=table.language,
            display_name=table.display_name or f"{table.language.capitalize()} ({self.name})",
            # ipykernel answers interrupt_request; a client's doubled SIGINT then cannot hit twice.
            interrupt_mode=table.interrupt_mode or ("message" if ours else "signal"),
            transport=table.transport,
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

    What it takes from files beside it (requirements, a project's lock) is read as well and stands in
    ``python.packages`` then. A folder in the form of repo2docker is read as that. Raises NotFound for a folder or
    file that is not there and InvalidInput for everything that it says wrong.
    """
    from workbench.build import repo2docker

    path = Path(folder)
    if path.name != FILE or path.is_dir():
        if not path.is_dir():
            obstacle = "is not a folder" if path.exists() else "there is no such folder"
            raise NotFound("read a recipe", f"{path}: {obstacle}", f"give the folder that holds a {FILE}")
        if not (path / FILE).exists() and repo2docker.is_one(path):
            return repo2docker.load(path)
        path = path / FILE
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise NotFound("read a recipe", f"{path}: there is no such file", f"write a {FILE} there") from None
    except UnicodeDecodeError as error:
        raise InvalidInput("read a recipe", f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InvalidInput("read a recipe", f"{path}: {error.strerror}") from None
    return parse(text, str(path), path)


def parse(content: str | dict[str, Any], where: str = FILE, path: Path | None = None) -> Recipe:
    """A recipe from the text of its file or its plain values. Raises InvalidInput.

    where: what errors name; path: the file, beside which requirements are looked for.
    """
    from workbench.build import pins

    try:
        data = tomllib.loads(content) if isinstance(content, str) else content
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("read a recipe", f"{where}: {error}", "see https://toml.io") from None
    check = _Check(where)
    check.unknown_keys(data)
    try:
        recipe = msgspec.convert(data, Recipe, strict=True)
    except msgspec.ValidationError as error:
        check.shape(str(error))
    if path is not None:
        packages = pins.gather(recipe.python, path)
        recipe = msgspec.structs.replace(recipe, python=msgspec.structs.replace(recipe.python, packages=packages))
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
            for number, entry in enumerate(value if table is not None and isinstance(value, list) else ()):
                if isinstance(entry, dict):
                    self._unknown(entry, table, f"{at}{key}[{number}].")  # type: ignore[arg-type]

    def shape(self, message: str) -> NoReturn:
        """Msgspec's sentence, with the path in front and its words in TOML's."""
        found = re.fullmatch(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", message)
        assert found
        said, key = found[1], found[2] or ""
        missing = re.search(r"missing required field `(\w+)`", said)
        if missing:
            key = f"{key}.{missing[1]}" if key else missing[1]
            remedy = {"base": f'add [base] with suite = "{next(iter(SUITES))}"'}.get(key, f'add {key} = "…"')
            self.fail(key, "missing", remedy)
        if key == "kernel.interrupt_mode" and "enum" in said:
            self.fail(key, said.replace("enum ", "").lower(), 'write "signal" or "message"')
        for theirs, ours in _WORDS:
            said = re.sub(theirs, ours, said)
        self.fail(key.replace("[...]", "[]") or "the file", said[:1].lower() + said[1:])

    def values(self, recipe: Recipe) -> None:
        if not _NAME.fullmatch(recipe.name):
            self.fail("name", f"{recipe.name!r} is no image name", "use a-z, 0-9 and single . _ - between them")
        self._base(recipe.base)
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
        self._python(recipe)
        self._own(recipe)
        self._kernel(recipe)
        self._limits(recipe)

    def _base(self, base: Base) -> None:
        given = {name: value for name, value in msgspec.structs.asdict(base).items() if value is not None}
        if len(given) != 1:
            obstacle = f"{' and '.join(given)} are given" if given else "says nothing"
            self.fail("base", obstacle, 'give one of them, like suite = "bookworm"')
        if base.suite is not None and base.suite not in SUITES:
            near = difflib.get_close_matches(base.suite, SUITES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SUITES)}"
            self.fail("base.suite", f"{base.suite!r} is no Debian suite known here", hint)

    def _python(self, recipe: Recipe) -> None:
        version, suite = recipe.python.version, recipe.base.suite
        if version is None:
            return
        if not re.fullmatch(r"3\.\d+", version):
            self.fail("python.version", f"{version!r} is no version of Python", 'write it like "3.11"')
        if suite is not None and version != SUITES[suite]:
            others = [other for other, brings in SUITES.items() if brings == version]
            remedy = f'take base.suite = "{others[0]}"' if others else "leave it out"
            obstacle = (
                f"Python {version} cannot be had: Debian {suite} brings {SUITES[suite]}, and no registry has others"
            )
            self.fail("python.version", obstacle, remedy)

    def _own(self, recipe: Recipe) -> None:
        for target, source in recipe.files.items():
            if not target.startswith("/") or os.path.normpath(target) != target or target == "/":
                self.fail(f"files.{target!r}", "is no absolute path", 'write it like "/opt/app/main.py"')
            if target.split("/")[1] in ("proc", "sys", "dev", "run", "tmp"):
                self.fail(f"files.{target!r}", "lies where no layer holds anything", "name another path")
            if source.startswith("/") or ".." in source.split("/"):
                self.fail(f"files.{target!r}", f"{source!r} leads out of the recipe's folder", "put the file beside it")
        for index, step in enumerate(recipe.run):
            if not step.script.strip():
                self.fail(f"run[{index}].script", "is empty")
        for index, text in enumerate(recipe.mounts):
            if not text.startswith(("/", "~/")):
                self.fail(f"mounts[{index}]", f"{text!r} is no absolute path", 'write it like "/data:/data:ro"')
        for index, name in enumerate(recipe.preload):
            if not re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", name):
                self.fail(f"preload[{index}]", f"{name!r} is no name of a module")

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
        if not table.argv and not recipe.has_ipykernel and recipe.base.suite is not None:
            remedy = 'add "ipykernel" to python.packages or give the kernel\'s own argv'
            self.fail("kernel.argv", "missing, and the recipe installs no ipykernel", remedy)
        if table.argv and not any("{connection_file}" in part for part in table.argv):
            self.fail("kernel.argv", "no element holds {connection_file}", "the kernel needs its path")
        if table.argv and not table.argv[0].startswith("/"):
            # jupyter_client rewrites a bare "python" to the host's interpreter.
            self.fail("kernel.argv[0]", f"{table.argv[0]!r} is no absolute path", "name it from /")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+#._-]*", table.language):
            self.fail("kernel.language", f"{table.language!r} is no language name")
        if table.logo is not None and not table.logo.endswith((".svg", ".png")):
            self.fail("kernel.logo", f"{table.logo!r} is neither SVG nor PNG")
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
        path = Path(text)
        return path.parent if path.name == FILE and not path.is_dir() else path
    known = shipped()
    if text in known:
        return known[text]
    near = difflib.get_close_matches(text, known, 1)
    remedy = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(known) or 'none'}"
    raise NotFound("find a recipe", f"{text}: there is no such folder", remedy)


def schema() -> str:
    """The JSON schema of a recipe, for editors (https://json-schema.org); what ``parse`` checks beyond is not in it."""
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe.toml of Workbench"}
    return json.dumps(whole | msgspec.json.schema(Recipe), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema())
