"""The step of Python packages: resolved and installed by uv, each from exactly one wheel.

uv chooses over the layers below, by their own Python, and then installs without a network from an index that the
step serves to itself: only what comes from an index leaves no address in the environment (a folder of wheels
does). A package that has no wheel is built from its sdist first, in a container of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from msgspec.structs import replace

from workbench.build import bytecode
from workbench.build.fetch import File, Unreachable, Web
from workbench.build.lock import Source, StepLock, Wheel
from workbench.build.steps import IN, OUT, Run, Site, StepFailed, hand_over, read_out
from workbench.model import BuildFailed, HostLacks, Mount, Settings, count, project_name

_UV = f"{IN}/uv"
_UV_CACHE = f"{IN}/uv-cache"
_INDEX = f"{IN}/index"
_DEFAULT_INDEX = "https://pypi.org/simple"
_TOOL = "uv"

# What is in the environment below, if there is one, stays as it is, for another version of it would lie in two layers;
# but for what the recipe wants in just one version. (An editable install, -e, constrains nothing.)
_RESOLVE = r"""
set -eu
uv=$1; shift
printf '%s\n' "$@" > /tmp/wanted.txt
: > /tmp/constraints.txt
: > OUT/below.txt
python=/usr/bin/python3
if [ -x /opt/venv/bin/python ]; then
  python=/opt/venv/bin/python
  "$uv" pip freeze --python "$python" > OUT/below.txt
  grep -v -i -E "^(-e|$EXACT) " OUT/below.txt | grep -v -i -E "^($EXACT)==" > /tmp/constraints.txt || true
fi
[ ! -f IN/old.toml ] || cp IN/old.toml OUT/pylock.toml
"$uv" pip compile --python "$python" $NO_BUILD --format pylock.toml --no-header --no-annotate \
  --constraints /tmp/constraints.txt --output-file OUT/pylock.toml --quiet /tmp/wanted.txt
# A uv that no index offers (a distribution's own) is told by its version only.
printf 'uv==%s\n' "$UV_VERSION" > /tmp/tool.txt
"$uv" pip compile --python "$python" --no-build --format pylock.toml --no-header --no-annotate \
  --no-deps --output-file OUT/pylock.tool.toml --quiet /tmp/tool.txt || : > OUT/pylock.tool.toml
""".replace("OUT", OUT).replace("IN/", IN + "/")

_BUILD = r"""
set -eu
uv=$1; shift
for source; do
  mkdir -p /tmp/build
  "$uv" build --wheel --python /usr/bin/python3 --out-dir /tmp/build "$source"
done
cp /tmp/build/*.whl OUT/
""".replace("OUT", OUT)

# python3 -I -S -c … uv index: serves the index and installs from it.
_INSTALL = r"""
import functools, http.server, subprocess, sys, threading
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
uv, index = sys.argv[1:]
handler = functools.partial(Handler, directory=index)
with http.server.ThreadingHTTPServer(("127.0.0.1", 28549), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run([
        uv, "pip", "install", "--python", "/opt/venv/bin/python", "--no-deps", "--no-build", "--require-hashes",
        "--default-index", "http://127.0.0.1:28549", "-r", f"{index}/requirements.txt",
    ])
    server.shutdown()
sys.exit(done.returncode)
"""
_PYTHON = r"""
set -eu
uv=$1; shift
[ -x /opt/venv/bin/python ] || "$uv" venv --no-project --python /usr/bin/python3 /opt/venv
/usr/bin/python3 -I -S -c "$INSTALL" "$uv" INDEX
rm -f /opt/venv/.lock /opt/venv/.gitignore
""".replace("INDEX", _INDEX)

_NO_WHEEL = re.compile(
    r"no usable wheels|no wheels? with|building from source is disabled|builds? (?:is|are) disabled", re.I
)


class Python:
    """Python packages and pip, in /opt/venv."""

    name = "python"
    own = False

    def __init__(self, packages: Iterable[str]) -> None:
        packages = list(packages)
        self.title = f"{count(len(packages), 'Python package')} with what they need"
        self.asks: dict[str, Any] = {"packages": packages}
        #: Where what was resolved in this very build can be fetched, by sha256.
        self._known: dict[str, str] = {}

    def marks(self) -> dict[str, Any]:
        return {"script": _PYTHON, "install": _INSTALL, "compile": bytecode.PROGRAM, "also": "pip"}

    def resolve(self, site: Site, old: StepLock | None) -> StepLock:
        host = host_uv()
        version = uv_version(host)
        out = site.scratch()
        try:
            found = self._compile(site, old, host, version, out, build=False)
        except StepFailed as failed:
            if not _NO_WHEEL.search(" ".join(failed.lines)):
                raise
            found = self._compile(site, old, host, version, out, build=True)
        for entry in found:
            self._as_indexed(site, entry)
        below = set(_pins(read_out(out, "below.txt").decode("utf-8", "replace")))
        wheels = []
        for entry in found:
            if (project_name(entry["name"]), entry.get("version")) in below:
                continue
            wheels.append(self._choose(entry, site) or self._build(site, entry, host))
        tool = next((self._choose(entry, site) for entry in _entries(out, "pylock.tool.toml")), None)
        return StepLock(self.name, self.asks, version, wheels=tuple(wheels), tool=tool)

    def _compile(
        self, site: Site, old: StepLock | None, uv: str, version: str, out: Path, *, build: bool
    ) -> list[dict[str, Any]]:
        for name in ("pylock.toml", "pylock.tool.toml", "below.txt"):
            (out / name).unlink(missing_ok=True)
        # Only Debian's own programs get the cache that other builds read: not the code of a package that is built, nor
        # an image that somebody else made.
        shared = site.trusted and not build
        env = _environment() | {
            "UV_VERSION": version.split()[-1], "NO_BUILD": "" if build else "--no-build",
            "EXACT": "|".join(self._exact()) or "-",
            "UV_CACHE_DIR": _UV_CACHE if shared else "/tmp/uv-cache",
        }  # fmt: skip
        mounts = [Mount(uv, _UV, read_only=True), Mount(str(out), OUT)]
        if shared:
            mounts.append(Mount(str(site.uv_cache), _UV_CACHE))
        if old is not None:
            kept = site.scratch() / "old.toml"
            kept.write_text(_as_pylock(wheel for wheel in old.wheels if site.fetcher.here(self._file(wheel, site))))
            mounts.append(Mount(str(kept), f"{IN}/old.toml", read_only=True))
        argv = ("/bin/sh", "-c", _RESOLVE, "resolve", _UV, *self.asks["packages"], "pip")
        site.try_out(self, [Run(argv, env, tuple(mounts), network="outbound")])
        self._python = _requires(out, "pylock.toml")
        return _entries(out, "pylock.toml")

    def _as_indexed(self, site: Site, entry: dict[str, Any]) -> None:
        """What the recipe names by its address, in the form of what an index offers."""
        archive = entry.get("archive")
        if archive is not None:
            url = archive["url"]
            sha256, size = archive["hashes"].get("sha256", ""), archive.get("size") or site.fetcher.web.size(url)
            found = {"url": url, "size": size, "hashes": {"sha256": sha256}}
            entry |= {"wheels": [found]} if _file_name(url).endswith(".whl") else {"sdist": found}

    def _choose(self, entry: Mapping[str, Any], site: Site) -> Wheel | None:
        """The wheel that an installer would take of those that uv lists, all of which fit."""
        from packaging.tags import compatible_tags, cpython_tags
        from packaging.utils import parse_wheel_filename

        machine = os.uname().machine
        platforms = [*_platforms(machine)]
        python = tuple(self._python)
        order = [
            *cpython_tags(python, platforms=platforms),
            *compatible_tags(python, f"cp{python[0]}{python[1]}", platforms),
        ]
        rank = {tag: number for number, tag in reversed(list(enumerate(order)))}
        best: tuple[int, Wheel, str] | None = None
        for wheel in entry.get("wheels", ()):
            file = wheel.get("name") or _file_name(wheel["url"])
            tags = parse_wheel_filename(file)[3]
            number = min((rank.get(tag, len(order)) for tag in tags), default=len(order))
            if best is None or number < best[0]:
                sha256 = wheel.get("hashes", {}).get("sha256", "")
                made = Wheel(project_name(entry["name"]), entry["version"], file, sha256, int(wheel.get("size", 0)))
                best = number, made, wheel["url"]
        if best is None:
            return None
        _, chosen, url = best
        self._known[chosen.sha256] = url
        if not chosen.size:  # an index need not tell
            chosen = replace(chosen, size=site.fetcher.web.size(url))
        return chosen

    def _build(self, site: Site, entry: Mapping[str, Any], uv: str) -> Wheel:
        """A wheel from a source distribution, built by what that asks for itself."""
        sdist = entry.get("sdist")
        name, version = project_name(entry["name"]), entry.get("version", "")
        if not sdist:
            raise BuildFailed("build a Python package", f"{name} has neither a wheel nor a source archive")
        file = sdist.get("name") or _file_name(sdist["url"])
        source = Source(file, sdist["hashes"]["sha256"], int(sdist.get("size") or site.fetcher.web.size(sdist["url"])))
        self._known[source.sha256] = sdist["url"]
        made = self._made(site, name, version, source, uv)
        digest, size = site.fetcher.adopt(made)
        return Wheel(name, version, made.name, digest, size, source)

    def _made(self, site: Site, name: str, version: str, source: Source, uv: str) -> Path:
        file = self._offered(name, version, source, site)
        taken = site.fetcher.take([file])
        into, out = site.scratch(), site.scratch()
        hand_over(into, {source.file: taken[source.sha256]})
        env = _environment() | {"UV_CACHE_DIR": "/tmp/uv-cache"}
        mounts = (
            Mount(uv, _UV, read_only=True),
            Mount(str(into), f"{IN}/source", read_only=True),
            Mount(str(out), OUT),
        )
        argv = ("/bin/sh", "-c", _BUILD, "build", _UV, f"{IN}/source/{source.file}")
        site.try_out(self, [Run(argv, env, mounts, network="outbound")])
        names = [name for name in os.listdir(out) if name.endswith(".whl")]
        if len(names) != 1:
            raise BuildFailed(f"build {name} {version} from source", f"it gave {len(names)} wheels")
        made = site.scratch() / names[0]
        made.write_bytes(read_out(out, names[0], limit=4 << 30))
        return made

    def prepare(self, locked: StepLock, site: Site) -> None:
        """Build again the wheels of the lock that come from source and are nowhere to be had."""
        for wheel in locked.wheels:
            if wheel.source is None or site.fetcher.find(self._file(wheel, site)):
                continue
            made = self._made(site, wheel.name, wheel.version, wheel.source, host_uv())
            if site.fetcher.adopt(made)[0] != wheel.sha256:
                raise BuildFailed(
                    f"build {wheel.name} {wheel.version} from source",
                    "the wheel is not that of the lock",
                    "keep it with `jupyter workbench lock --vendor DIR`",
                )

    def files(self, locked: StepLock, site: Site, *, every: bool = False) -> list[File]:
        tool = [locked.tool] if locked.tool and (every or uv_version(host_uv()) != locked.builder) else []
        return [self._file(wheel, site) for wheel in (*locked.wheels, *tool)]

    def _file(self, wheel: Wheel, site: Site) -> File:
        return self._offered(wheel.name, wheel.version, wheel, site)

    def _offered(self, name: str, version: str, file: Wheel | Source, site: Site) -> File:
        def offered() -> Iterator[str]:
            if file.sha256 in self._known:
                yield self._known[file.sha256]
            for address in self._addresses():
                if _file_name(address) == file.file:
                    yield address
            yield from offers(name, file, site.fetcher.web, site.settings)

        return File(file.sha256, file.size, file.file, f"{name} {version} ({file.file})", offered)

    def runs(self, locked: StepLock, taken: Mapping[str, Path], site: Site) -> list[Run]:
        index = site.scratch()
        _lay_out_index(index, locked.wheels, taken)
        mounts = (Mount(self._uv(locked, taken, site), _UV, read_only=True), Mount(str(index), _INDEX, read_only=True))
        # Files are linked out of the cache, not copied: it goes with the step's other temporary files.
        env = _environment() | {"UV_CACHE_DIR": "/tmp/uv-cache", "UV_LINK_MODE": "hardlink", "INSTALL": _INSTALL}
        return [
            Run(("/bin/sh", "-c", _PYTHON, "python", _UV), env, mounts),
            bytecode.run(locked.wheels, site),
        ]

    def _addresses(self) -> Iterator[str]:
        """Those that the recipe itself names."""
        from packaging.requirements import Requirement

        for text in self.asks["packages"]:
            if (url := Requirement(text).url) is not None:
                yield urldefrag(url)[0]

    def _exact(self) -> Iterator[str]:
        """What the recipe wants in one version and no other."""
        from packaging.requirements import Requirement

        for wanted in map(Requirement, self.asks["packages"]):
            if wanted.url or any(one.operator == "==" and "*" not in one.version for one in wanted.specifier):
                yield project_name(wanted.name)

    @staticmethod
    def _uv(locked: StepLock, taken: Mapping[str, Path], site: Site) -> str:
        """The uv of the lock: the host's, or the one that came as a wheel; its version stands in pyvenv.cfg."""
        if locked.tool is None or locked.tool.sha256 not in taken:
            return host_uv()
        program = site.scratch() / "uv"
        with zipfile.ZipFile(taken[locked.tool.sha256]) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
            with archive.open(name) as source, open(program, "wb") as target:
                shutil.copyfileobj(source, target)
        program.chmod(0o755)
        return str(program)


def _environment() -> dict[str, str]:
    return {"UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "UV_LINK_MODE": "copy"}


def _pylock(out: Path, name: str) -> dict[str, Any]:
    """What uv wrote (PEP 751). Raises BuildFailed."""
    try:
        return tomllib.loads(read_out(out, name).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildFailed("read what uv chose", f"{name}: {error}") from None


def _entries(out: Path, name: str) -> list[dict[str, Any]]:
    """The packages of a pylock.toml."""
    entries: list[dict[str, Any]] = _pylock(out, name).get("packages", [])
    return entries


def _requires(out: Path, name: str) -> list[int]:
    found = _pylock(out, name).get("requires-python", "")
    return [int(part) for part in re.findall(r"\d+", found)[:2]]


def _pins(text: str) -> list[tuple[str, str]]:
    return [(project_name(name), version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)]


def _as_pylock(wheels: Iterable[Wheel]) -> str:
    """What uv reads its preferences from: only names and versions count."""
    lines = ['lock-version = "1.0"', 'created-by = "workbench"']
    for wheel in wheels:
        lines += ["[[packages]]", f"name = {json.dumps(wheel.name)}", f"version = {json.dumps(wheel.version)}"]
    return "\n".join(lines) + "\n"


def _platforms(machine: str) -> Iterator[str]:
    """manylinux platforms, newest first, with the old names (PEP 600)."""
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for minor in range(60, 4, -1):
        yield f"manylinux_2_{minor}_{machine}"
        if minor in legacy:
            yield f"{legacy[minor]}_{machine}"
    yield f"linux_{machine}"


def _file_name(address: str) -> str:
    return unquote(urlsplit(address).path.rpartition("/")[2])


# The index that the step serves to itself (PEP 503)


def _lay_out_index(folder: Path, wheels: Iterable[Wheel], taken: Mapping[str, Path]) -> None:
    lines = []
    for wheel in wheels:
        hand_over(folder, {f"{wheel.name}/{wheel.file}": taken[wheel.sha256]})
        link = f'<a href="{wheel.file}#sha256={wheel.sha256}">{wheel.file}</a>'
        (folder / wheel.name / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
        lines.append(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}")
    (folder / "requirements.txt").write_text("\n".join(sorted(lines)) + "\n")


# Where an index offers a wheel


def offers(project: str, wanted: Wheel | Source, web: Web, settings: Settings) -> Iterator[str]:
    """Addresses of a file at the indexes that the host uses (PEP 503, PEP 691). Raises Unreachable."""
    reasons = []
    found = False
    for index in indexes(settings):
        page = f"{index.rstrip('/')}/{project}/"
        try:
            text, kind = web.text(page, Accept="application/vnd.pypi.simple.v1+json, text/html;q=0.5")
        except Unreachable as error:
            reasons.append(str(error))
            continue
        for address, sha256 in _links(text, kind, page):
            if _file_name(address) == wanted.file and sha256 in ("", wanted.sha256):
                found = True
                yield address
    if not found:
        raise Unreachable(reasons[0] if reasons else "no index offers it any more")


def indexes(settings: Settings) -> list[str]:
    """The host's package indexes, in uv's order of preference."""
    env = dict(settings.env)
    more = " ".join(env.get(name, "") for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL")).split()
    own = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or _DEFAULT_INDEX
    return [re.sub(r"^[A-Za-z0-9._-]+=(?=https?:)", "", address) for address in (*more, own)]


def _links(text: str, kind: str, page: str) -> Iterator[tuple[str, str]]:
    """The files of an index page, each with its sha256 where the page tells it."""
    if "json" in kind:
        for entry in json.loads(text).get("files", ()):
            yield urljoin(page, entry["url"]), entry.get("hashes", {}).get("sha256", "")
        return
    parser = _Anchors()
    parser.feed(text)
    for link in parser.links:
        address, fragment = urldefrag(urljoin(page, link))
        yield address, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]


# uv itself


def host_uv() -> str:
    """The host's uv. Raises HostLacks."""
    try:
        import uv

        return os.path.realpath(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise HostLacks("install Python packages", "uv is not installed", "run `python3 -m pip install uv`")
    return os.path.realpath(found)


def uv_version(program: str) -> str:
    """As it says itself: it stands in the environment's pyvenv.cfg."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:2])
