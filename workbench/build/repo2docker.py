"""Folders in repo2docker's form, read as a recipe: apt.txt, requirements.txt, runtime.txt, install.R, postBuild, start.

Source: https://repo2docker.readthedocs.io/en/latest/configuration/
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workbench.build import pins
from workbench.build.recipe import IPYKERNEL_ARGV, SUITES, Recipe, parse, requirement_name
from workbench.model import InvalidInput

_READ = ("apt.txt", "requirements.txt", "runtime.txt", "install.R", "postBuild", "start")
#: What builds otherwise there, and why it does not here.
_REFUSED = {
    "environment.yml": "no conda solver is here; name the packages in requirements.txt or apt.txt",
    "Dockerfile": "a Dockerfile is not built here; write a recipe.toml",
    "Project.toml": "Julia cannot be had from a reachable registry",
    "REQUIRE": "Julia cannot be had from a reachable registry",
    "default.nix": "Nix is not used here; name the packages in apt.txt",
    "Pipfile": "pipenv is not used here; write requirements.txt with `pipenv requirements`",
    "setup.py": "a project is not installed from its sources here; name what it needs in requirements.txt",
}
#: Where the folder's own files lie in the image.
HOME = "/srv/repo"
_R = ("r-base-core", "r-cran-irkernel")


def is_one(folder: Path) -> bool:
    """Whether a folder without recipe.toml has files of this form."""
    return any((_place(folder) / name).exists() for name in (*_READ, *_REFUSED))


def load(folder: Path) -> Recipe:
    """The recipe that such a folder means. Raises InvalidInput for what cannot be built here."""
    place = _place(folder)
    for name, why in _REFUSED.items():
        if (place / name).exists():
            raise InvalidInput("read a folder of repo2docker's form", f"{place / name}: {why}")
    there = {name: place / name for name in _READ if (place / name).exists()}
    apt = _lines(there["apt.txt"]) if "apt.txt" in there else []
    python = list(pins.requirements(there["requirements.txt"])) if "requirements.txt" in there else []
    data: dict[str, Any] = {"base": {"suite": "bookworm"}, "files": {}, "run": []}
    language = "python"
    if "runtime.txt" in there:
        language = _runtime(there["runtime.txt"], data)
    if "install.R" in there or language == "r":
        apt += _R
    below = place.relative_to(folder)
    for name in ("install.R", "postBuild", "start"):
        if name in there:
            data["files"][f"{HOME}/{name}"] = str(below / name)
    if "install.R" in there:
        data["run"].append({"script": f"cd {HOME}\nRscript install.R", "network": True})
    if "postBuild" in there:
        data["run"].append({"script": f"chmod +x {HOME}/postBuild\ncd {HOME}\n./postBuild", "network": True})
    if language == "r":
        data["kernel"] = {
            "argv": ["/usr/bin/R", "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}"],
            "language": "R", "transport": "tcp",
        }  # fmt: skip
    elif not any(requirement_name(text) == "ipykernel" for text in python):
        python.append("ipykernel")
    if "start" in there:
        argv = data.get("kernel", {}).get("argv", list(IPYKERNEL_ARGV))
        data["kernel"] = data.get("kernel", {"interrupt_mode": "message"}) | {
            "argv": ["/bin/sh", f"{HOME}/start", *argv]
        }
    data["apt"] = {"packages": apt}
    data["python"] = data.get("python", {}) | {"packages": python}
    data["name"] = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "repo"
    return parse(data, str(place))


def _place(folder: Path) -> Path:
    """repo2docker looks into these first, and then nowhere else."""
    return next((folder / name for name in ("binder", ".binder") if (folder / name).is_dir()), folder)


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in pins.text_of(path).splitlines())
    return [word for line in lines for word in line.split()]


def _runtime(path: Path, data: dict[str, Any]) -> str:
    """runtime.txt: ``python-3.11`` or ``r-4.2-2023-01-01``; the language."""
    text = pins.text_of(path).strip()
    if found := re.fullmatch(r"python-(3\.\d+)(?:\.\d+)?", text):
        suite = next((suite for suite, version in SUITES.items() if version == found[1]), None)
        if suite is None:
            known = ", ".join(SUITES.values())
            raise InvalidInput(
                "read a folder of repo2docker's form", f"{path}: {text} cannot be had", f"here are {known}"
            )
        data["base"] = {"suite": suite}
        data["python"] = {"version": found[1]}
        return "python"
    if re.fullmatch(r"r-[\d.]+(?:-\d{4}-\d\d-\d\d)?", text):
        return "r"
    raise InvalidInput(
        "read a folder of repo2docker's form", f"{path}: {text!r} is not understood", "write python-3.11"
    )
