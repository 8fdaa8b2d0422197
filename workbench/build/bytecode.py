"""Bytecode of Python packages, compiled once for each wheel and kept for later builds over the same layers.

What a code file holds depends a little on what its process compiled before (marshal marks what is shared). So the files
of a wheel go to processes of their own, in order: whatever else is installed, and however many processors there are,
they become the same bytes. No code of a package runs meanwhile (``-S`` leaves .pth files alone).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from workbench.build.lock import Wheel
from workbench.build.steps import IN, OUT, Run, Site, read_out
from workbench.model import BuildFailed, Mount, project_name

_LIMIT = 1 << 30  # bytes of one wheel's bytecode
_KEPT = f"{IN}/bytecode"

# python3 -S -c … python3 -S -c … parts: everything that is not compiled yet; a part is compiled by its own process.
_COMPILE = r"""
import csv, glob, importlib.util, json, os, py_compile, re, subprocess, sys, zipfile
from concurrent.futures import ThreadPoolExecutor
PART = 400  # files
def compile_all(paths):
    for path in paths:
        try:  # templates and another Python's code do not compile, and are never imported either
            py_compile.compile(path, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        except Exception:
            pass
if len(sys.argv) > 2:
    sys.exit(compile_all(sys.argv[2:]))
code, kept, out = sys.argv[1], "KEPT", "OUT"
cached = importlib.util.cache_from_source
def wheels():
    try:
        with open(kept + "/wheels.json") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
def waiting(path):
    return path.endswith(".py") and os.path.isfile(path) and not os.path.exists(cached(path))
known, groups, seen = wheels(), [], set()
for info in sorted(glob.glob("/opt/venv/lib/python3*/site-packages/*.dist-info")):
    site, name = os.path.split(info)
    try:
        with open(info + "/RECORD", newline="") as file:
            listed = {os.path.normpath(os.path.join(site, row[0])) for row in csv.reader(file) if row}
    except (OSError, UnicodeError):
        continue
    paths = sorted(path for path in listed - seen if path.startswith("/opt/venv/lib/") and waiting(path))
    seen.update(paths)
    if paths:
        groups.append((known.get(re.sub(r"[-_.]+", "-", name.split("-")[0]).lower(), ""), paths))
rest = sorted(
    path for folder, _, names in os.walk("/opt/venv/lib") for name in names
    if (path := os.path.join(folder, name)) not in seen and waiting(path)
)
groups.append(("", rest))
parts = []
for wheel, paths in groups:
    if wheel and os.path.exists(f"{kept}/{wheel}.zip"):
        wanted = {cached(path) for path in paths}
        with zipfile.ZipFile(f"{kept}/{wheel}.zip") as archive:
            for name in archive.namelist():
                if "/" + name in wanted:
                    os.makedirs(os.path.dirname("/" + name), exist_ok=True)
                    with open("/" + name, "xb") as file:
                        file.write(archive.read(name))
        continue
    parts += [paths[at : at + PART] for at in range(0, len(paths), PART)]
with ThreadPoolExecutor(os.cpu_count()) as pool:
    run = lambda paths: subprocess.run([sys.executable, "-S", "-c", code, code, *paths], check=True)
    list(pool.map(run, sorted(parts, key=len, reverse=True)))
for wheel, paths in groups:
    if wheel and os.path.isdir(out) and not os.path.exists(f"{kept}/{wheel}.zip"):
        with zipfile.ZipFile(f"{out}/{wheel}.zip", "w") as archive:
            for path in filter(os.path.exists, map(cached, paths)):
                archive.writestr(zipfile.ZipInfo(path[1:]), open(path, "rb").read())
""".replace("KEPT", _KEPT).replace("OUT", OUT)
_SCRIPT = r"""
set -eu
cd /
/opt/venv/bin/python -S -c "$COMPILE" "$COMPILE"
# Made by each import of matplotlib; here already, a plot is no change of the environment.
for folder in /opt/venv/lib/python3*/site-packages/matplotlib; do
  [ ! -d "$folder" ] || mkdir -p /root/.config/matplotlib
done
"""

#: What leaves a mark in the layer.
PROGRAM = _SCRIPT + _COMPILE


def run(wheels: Iterable[Wheel], site: Site) -> Run:
    """The container that compiles what has just been installed from wheels."""
    folder = site.bytecode
    argv, env = ("/bin/sh", "-c", _SCRIPT, "compile"), {"COMPILE": _COMPILE}
    if folder is None:
        return Run(argv, env)
    into, out = site.scratch(), site.scratch()
    names = {}
    for wheel in wheels:
        names[project_name(wheel.name)] = wheel.sha256
        with suppress(FileNotFoundError):
            os.link(_path(folder, wheel), into / f"{wheel.sha256}.zip")
    (into / "wheels.json").write_text(json.dumps(names))
    mounts = (Mount(str(into), _KEPT, read_only=True), Mount(str(out), OUT))
    return Run(argv, env, mounts, then=lambda: _keep(out, folder, wheels))


def _path(folder: Path, wheel: Wheel) -> Path:
    return folder / f"{wheel.sha256}.zip"


def _keep(out: Path, folder: Path, wheels: Iterable[Wheel]) -> None:
    """Take over what was compiled; that it is not there next time costs no more than to compile it again."""
    folder.mkdir(0o700, parents=True, exist_ok=True)
    there = set(os.listdir(out))
    for wheel in wheels:
        if f"{wheel.sha256}.zip" in there:
            with suppress(BuildFailed, OSError):
                data = read_out(out, f"{wheel.sha256}.zip", _LIMIT)
                new = folder / f"{wheel.sha256}.{os.getpid()}.new"
                new.write_bytes(data)
                new.rename(_path(folder, wheel))


def place(root: Path, layers: Iterable[str]) -> Path:
    """Where bytecode made over these layers is kept: another Python, or another program, makes another."""
    return root / hashlib.sha256("\n".join([PROGRAM, *layers]).encode()).hexdigest()
