"""The packages of an environment and where each came from, read from its files: Debian's, Python's, R's and conda's.
Nothing is run.

Sources: dpkg's status file (deb-control(5)), ``*.dist-info`` and ``*.egg-info`` (core metadata specification) with
``INSTALLER`` and ``direct_url.json`` (PEP 376, PEP 610), R's DESCRIPTION files (Writing R Extensions, 1.1.1), conda's
``conda-meta``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from workbench.images.store import Store
from workbench.images.view import View
from workbench.linux import userns
from workbench.model import Image, project_name

if TYPE_CHECKING:
    import pandas

_R = ("usr/lib/R/library", "usr/lib/R/site-library", "usr/local/lib/R/site-library")
_HEAD = 1 << 16  # bytes of a metadata file that are looked at
_STATUS = "var/lib/dpkg/status"
INFO = "var/lib/dpkg/info"

#: Debian's own Python packages: of one place, and each of a package of Debian's.
DEBIANS = "usr/lib/python3/dist-packages"
#: Where nobody looks for an environment; what is large and holds none.
_NOT_THERE = {"proc", "sys", "dev", "run", "tmp", "usr/share", "usr/include", "usr/src", "var/lib/dpkg", "var/lib/apt",
              "var/cache", "root/.cache"}  # fmt: skip
_NOT_BELOW = {"__pycache__", "node_modules", ".git", "site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Package:
    """A package. kind: ``deb``, ``python``, ``r`` or ``conda``; place: the folder that it is in, empty for Debian's.

    environment: the folder that its Python belongs to, such as ``/opt/venv``; installer: who says to have installed
    it. origin: ``index``, ``url`` (one archive), ``vcs``, ``folder``, ``editable``, ``deb``, ``conda``, for R's the
    name of a repository, or empty where nothing tells. source: the address or folder, in pip's form (PEP 440's direct
    references), without what logs in.
    """

    kind: str
    name: str
    version: str
    place: str = ""
    environment: str = ""
    installer: str = ""
    origin: str = ""
    source: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it among all: kind, name and place."""
        return self.kind, self.name, self.place

    @property
    def plain(self) -> bool:
        """Whether its name and version say all: anybody finds it where such packages are found."""
        return self.origin in ("", "index", "deb", "conda", "CRAN")

    @property
    def told(self) -> str:
        """Where it came from, for people; empty for what is plain."""
        return "" if self.plain else f"{self.origin} {self.source}".rstrip()


@dataclass(frozen=True, slots=True)
class Environment:
    """A place that Python packages are in. kind: ``system``, ``venv``, ``user``, ``conda`` or ``folder``.

    python: the version that it says, or that its folder does; packages: how many.
    """

    prefix: str
    kind: str
    python: str
    packages: int


@dataclass(frozen=True, slots=True)
class Unowned:
    """Files that no package owns: how many, their bytes, and (path, bytes) of so many of them as are listed."""

    count: int
    size: int
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an image holds. unowned: None where it was not asked for."""

    packages: tuple[Package, ...]
    environments: tuple[Environment, ...]
    unowned: Unowned | None = None

    def frame(self) -> pandas.DataFrame:
        """The packages as a table, one a row; ``kind`` and ``origin`` are categories."""
        import pandas

        columns = list(Package.__dataclass_fields__)
        frame = pandas.DataFrame([asdict(package) for package in self.packages], columns=columns)
        return frame.astype({"kind": "category", "origin": "category"})


def take(store: Store, image: Image, *, unowned: bool = False) -> Inventory:
    """The inventory of an image. unowned: look for files that no package owns, too; of a snapshot for those that were
    not there when it was built. Raises NotFound, HostLacks."""
    from workbench.history import log  # not where trees are looked at

    built = list(log.chain(store, image))[-1]
    below = store.trees(built.diff_ids) if built.id != image.id else []
    found = userns.call("workbench.history.inventory:look", store.trees(image.diff_ids), below, unowned)
    files = found["unowned"]
    return Inventory(
        tuple(Package(*row) for row in found["packages"]), tuple(Environment(*row) for row in found["environments"]),
        Unowned(files["count"], files["size"], tuple((path, size) for path, size in files["files"])) if files else None,
    )  # fmt: skip


def folder_of(path: str) -> str:
    """The folder of a path (relative to ``/``), as far down as three names, for tables."""
    return "/" + "/".join(path.split("/")[:-1][:3])


def look(trees: list[str], below: list[str], unowned: bool) -> dict[str, Any]:
    """``take`` on trees, highest first; below: those of what was built, if that is another; through ``userns.call``."""
    from workbench.history import owners

    view = View(trees)
    found = packages(view)
    return {
        "packages": [list(asdict(package).values()) for package in found],
        "environments": [list(asdict(one).values()) for one in _environments(view, found)],
        "unowned": owners.unowned(view, found, View(below) if below else None) if unowned else None,
    }


def packages(view: View) -> list[Package]:
    """All of them, by kind, name and place."""
    found = {package.key: package for package in _all(view)}
    return [found[key] for key in sorted(found)]


def _all(view: View) -> Iterator[Package]:
    for fields in _debian(view):
        yield Package("deb", fields["Package"], fields.get("Version", ""))
    for place in _places(view):
        name = place.rpartition("/")[2]
        if name == "conda-meta":
            yield from _conda(view, place)
        elif name in ("site-packages", "dist-packages"):
            yield from _python(view, place)
        elif name != "pyvenv.cfg":
            yield from _r(view, place)


def _debian(view: View) -> Iterator[dict[str, str]]:
    data = view.read(_STATUS) or b""
    for stanza in data.decode("utf-8", "replace").split("\n\n"):
        fields = _fields(stanza.strip("\n").encode())
        if fields.get("Status", "").endswith(" installed") and "Package" in fields:
            yield fields


# Where environments are


def _places(view: View) -> list[str]:
    """Folders of Python packages, ``conda-meta`` and R's libraries, and each ``pyvenv.cfg``: wherever they are.

    Folders of each layer are looked through, but for what is large and holds none.
    """
    found = {place for tree in view.find("").folders for place in _candidates(tree)}
    return sorted(place for place in {*found, *_R} if view.find(place).found is not None)


def _candidates(tree: str) -> Iterator[str]:
    for folder, names, files in os.walk(tree):
        at = os.path.relpath(folder, tree)
        start = "" if at == "." else f"{at}/"
        if "pyvenv.cfg" in files:
            yield f"{start}pyvenv.cfg"
        for name in names:
            if name in ("site-packages", "dist-packages", "conda-meta"):
                yield start + name
            elif re.fullmatch(r"R/[^/]+-library/[\d.]+", "/".join(f"{start}{name}".split("/")[-3:])):
                yield start + name  # a user's own (R's .libPaths)
        names[:] = [name for name in names if name not in _NOT_BELOW and start + name not in _NOT_THERE]


def prefix(place: str) -> str:
    """The folder of the environment that a folder of packages belongs to."""
    found = re.fullmatch(r"(.*?)/?lib(?:64)?/python[\d.]*t?/(?:site|dist)-packages", place)
    return f"/{found[1]}" if found else f"/{place}"


def _environments(view: View, found: list[Package]) -> Iterator[Environment]:
    numbers: dict[str, int] = {}
    places: dict[str, str] = {}
    for place in _places(view):
        if place.endswith("-packages"):
            places[prefix(place)] = place  # which tells Python's version
        elif place.endswith(("pyvenv.cfg", "conda-meta")):
            places.setdefault(f"/{place}".rpartition("/")[0], place)
    for package in found:
        if package.kind == "python":
            numbers[package.environment] = numbers.get(package.environment, 0) + 1
    for at, place in sorted(places.items()):
        number = numbers.get(at, 0)
        settings = _settings(view.read(f"{at.lstrip('/')}/pyvenv.cfg"))
        named = re.search(r"/python(\d[\d.]*)/", place)
        version = settings.get("version_info") or settings.get("version") or (named[1] if named else "")
        if settings:
            kind = "venv"
        elif view.find(f"{at.lstrip('/')}/conda-meta").is_folder:
            kind = "conda"
        elif at in ("/usr", "/usr/local"):
            kind = "system"
        else:
            kind = "user" if at.endswith("/.local") else "folder"
        if number or kind in ("venv", "conda"):
            yield Environment(at, kind, re.sub(r"\.final\.\d+$", "", version), number)


def _settings(data: bytes | None) -> dict[str, str]:
    """A ``pyvenv.cfg`` (PEP 405)."""
    lines = (line.partition("=") for line in (data or b"")[:_HEAD].decode("utf-8", "replace").splitlines())
    return {key.strip().lower(): value.strip() for key, equals, value in lines if equals}


# Python's


def _python(view: View, place: str) -> Iterator[Package]:
    names = view.names(place)
    editable = {
        project_name(name[len("__editable__.") : -len(".pth")].rpartition("-")[0])
        for name in names if name.startswith("__editable__.") and name.endswith(".pth")
    }  # fmt: skip
    for name in names:
        if name.endswith(".dist-info"):
            yield from _distribution(view, place, f"{place}/{name}", editable)
        elif name.endswith(".egg-info"):
            folder = view.find(f"{place}/{name}").is_folder
            fields = _fields(view.read(f"{place}/{name}/PKG-INFO" if folder else f"{place}/{name}"))
            yield from _told(fields, place)
        elif name.endswith(".egg-link"):  # `setup.py develop`, before PEP 660
            target = (view.read(f"{place}/{name}") or b"").decode("utf-8", "replace").partition("\n")[0].strip()
            stem = name.removesuffix(".egg-link")
            info = f"{target.strip('/')}/{stem.replace('-', '_')}.egg-info/PKG-INFO"
            fields = {"Name": stem, "Version": "?"} | _fields(view.read(info))
            yield from _told(fields, place, "", "editable", _from_folder(target))


def _distribution(view: View, place: str, info: str, editable: set[str]) -> Iterator[Package]:
    fields = _fields(view.read(f"{info}/METADATA"))
    installer = (view.read(f"{info}/INSTALLER") or b"")[:64].decode("utf-8", "replace").strip()
    origin, source = direct(view.read(f"{info}/direct_url.json"))
    if installer == "conda":
        origin, source = "conda", ""
    elif project_name(fields.get("Name", "")) in editable and origin != "editable":
        origin = "editable"
    yield from _told(fields, place, installer, origin or ("index" if installer else ""), source)


def _told(
    fields: dict[str, str], place: str, installer: str = "", origin: str = "", source: str = ""
) -> Iterator[Package]:
    name, version = fields.get("Name"), fields.get("Version")
    if not name or not version:
        return
    if place == DEBIANS:
        installer, origin = "dpkg", "deb"
    yield Package("python", project_name(name), version, f"/{place}", prefix(place), installer, origin, source)


def direct(data: bytes | None) -> tuple[str, str]:
    """What a ``direct_url.json`` says (PEP 610): an origin and a source as ``Package`` has them."""
    try:
        said = json.loads(data or b"")
        url = _without_login(str(said["url"]))
    except (ValueError, KeyError, TypeError):
        return "", ""
    vcs, archive, folder = (
        value if isinstance(value := said.get(f"{name}_info"), dict) else None for name in ("vcs", "archive", "dir")
    )
    below = f"#subdirectory={said['subdirectory']}" if said.get("subdirectory") else ""
    if vcs is not None:
        at = vcs.get("commit_id") or vcs.get("requested_revision")
        return "vcs", f"{vcs.get('vcs', 'git')}+{url}" + (f"@{at}" if at else "") + below
    if folder is not None:
        return "editable" if folder.get("editable") else "folder", url + below
    hashes = (archive or {}).get("hashes")
    sha256 = hashes.get("sha256") if isinstance(hashes, dict) else None
    if not sha256 and str((archive or {}).get("hash", "")).startswith("sha256="):
        sha256 = str((archive or {})["hash"]).removeprefix("sha256=")
    return "url", url + (f"#sha256={sha256}" if sha256 else below)


def _from_folder(path: str) -> str:
    return f"file://{path}" if path.startswith("/") else path


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


# R's and conda's


def _r(view: View, place: str) -> Iterator[Package]:
    for name in view.names(place):
        fields = _fields(view.read(f"{place}/{name}/DESCRIPTION"))
        if "Version" not in fields:
            continue
        called = fields.get("Package", name)
        origin, source = fields.get("Repository", ""), ""
        if place.startswith("usr/lib/R/"):
            debians = place == _R[0] or view.find(f"{INFO}/r-cran-{called.lower()}.list").found is not None
            origin = "deb" if debians else origin
        elif kind := fields.get("RemoteType", "").replace("standard", ""):
            where = f"{fields.get('RemoteUsername', '')}/{fields.get('RemoteRepo', '')}".strip("/")
            origin, source = kind, f"{where or fields.get('RemoteUrl', '')}@{fields.get('RemoteSha', '')}".strip("@")
        yield Package("r", called, fields["Version"], f"/{place}", origin=origin, source=source)


def _conda(view: View, place: str) -> Iterator[Package]:
    for name in view.names(place):
        try:
            said = json.loads(view.read(f"{place}/{name}") or b"") if name.endswith(".json") else {}
            yield Package(
                "conda", str(said["name"]), str(said["version"]), f"/{place}", f"/{place}".rpartition("/")[0],
                "conda", "conda", _without_login(str(said.get("channel", ""))),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            continue


def _fields(data: bytes | None) -> dict[str, str]:
    """The one-line fields at the head of a file like a mail's (RFC 822)."""
    found: dict[str, str] = {}
    for line in (data or b"")[:_HEAD].decode("utf-8", "replace").splitlines():
        if not line.strip():
            break
        key, colon, value = line.partition(":")
        if colon and key and not key[0].isspace():
            found.setdefault(key, value.strip())
    return found
