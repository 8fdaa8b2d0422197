"""Python requirements that stand in files beside a recipe: requirements.txt, pylock.toml, uv.lock."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from workbench.model import InvalidInput, NotFound

if TYPE_CHECKING:
    from workbench.build.recipe import Python


def gather(table: Python, recipe: Path) -> tuple[str, ...]:
    """All requirements of ``[python]``, those of files after those of the recipe itself.

    recipe: the path of recipe.toml. Raises NotFound, InvalidInput with file and line.
    """
    found = list(table.packages)
    readers = (("requirements", requirements), ("pylock", pylock), ("project", project))
    for name, read in readers:
        text = getattr(table, name)
        if text is not None:
            found += read(beside(recipe.parent, text, f"{recipe}: python.{name}"))
    return tuple(dict.fromkeys(found))


def beside(folder: Path, text: str, key: str) -> Path:
    """A file or folder below the recipe's. Raises NotFound, and InvalidInput for what leads out of it."""
    path = folder / text
    if not path.exists():
        raise NotFound("read a recipe", f"{key}: there is no {path}", "correct the name")
    if not (os.path.realpath(path) + os.sep).startswith(os.path.realpath(folder) + os.sep):
        raise InvalidInput("read a recipe", f"{key}: {path} leads out of the recipe's folder", "copy it there")
    return path


def requirements(path: Path) -> Iterator[str]:
    """The requirements of a file as pip reads it, without the options that name indexes or other files."""
    text = re.sub(r"\\\n", " ", text_of(path))
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        line = re.sub(r"\s--hash=\S+", "", line).strip()  # the recipe's own lock has them
        if line.startswith("-"):
            _fail(path, number, f"{line.split()[0]} is not understood", "name packages only")
        if line:
            yield line


def pylock(path: Path) -> Iterator[str]:
    """Each package of a pylock.toml with its version and where it applies (PEP 751)."""
    for entry in _toml(path).get("packages", ()):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            _fail(path, 0, "a package has no name", "write it anew with the tool that made it")
        version = entry.get("version")
        if version is None or "vcs" in entry or "directory" in entry:
            _fail(path, 0, f"{entry['name']} has no version of an index", "name only packages of an index")
        marker = f" ; {entry['marker']}" if entry.get("marker") else ""
        yield f"{entry['name']}=={version}{marker}"


def project(path: Path) -> Iterator[str]:
    """What uv.lock has for the dependencies of a project, by uv itself, which runs nothing of the project."""
    from workbench.build.wheels import host_uv

    for name in ("pyproject.toml", "uv.lock"):
        if not (path / name).is_file():
            raise NotFound("read a recipe", f"{path}: there is no {name}", "write it with `uv lock`")
    command = [host_uv(), "export", "--frozen", "--offline", "--no-dev", "--no-emit-project", "--no-hashes"]
    command += ["--no-header", "--no-annotate", "--no-config", "--project", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(done.stderr.split()) or "uv export fails"
        raise InvalidInput("read a recipe", f"{path}: {words}", "see `uv lock`")
    for line in done.stdout.splitlines():
        if line.startswith(("-e", ".", "/")):
            raise InvalidInput(
                "read a recipe", f"{path}: {line} is a local package", "leave it out, or copy it by [files]"
            )
        if line.strip():
            yield line.strip()


def text_of(path: Path) -> str:
    """A file's text. Raises InvalidInput for what is none."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput("read a recipe", f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise InvalidInput("read a recipe", f"{path}: {error.strerror}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("read a recipe", f"{path}: {error}") from None


def _fail(path: Path, line: int, obstacle: str, remedy: str) -> NoReturn:
    where = f"{path}, line {line}" if line else str(path)
    raise InvalidInput("read a recipe", f"{where}: {obstacle}", remedy)
