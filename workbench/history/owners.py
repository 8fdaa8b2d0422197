"""Which package each file of an environment belongs to, and the files that belong to none.

Sources: dpkg's lists (dpkg-query(1), --listfiles) and diversions, ``RECORD`` of Python's distributions (binary
distribution format), R's libraries, conda's ``conda-meta``, what a virtual environment is made of (PEP 405).
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from workbench.history.inventory import INFO, Package
from workbench.images.view import Shown, View
from workbench.model import NOT_ENVIRONMENT, project_name

#: An owner: a package's ``key``, or ``venv``, its folder and nothing for what a virtual environment is made of.
Owner = tuple[str, str, str]
#: So many files that nobody owns are listed; the others are counted.
MOST = 20_000

#: What packages, tools and the system write by themselves, wherever the same packages are.
_BY_ITSELF = re.compile(
    r"(?:.*/)?__pycache__/.*|.*\.py[co]"
    r"|etc/(?:ld\.so\.cache|alternatives/.*|mailcap|machine-id|\.pwd\.lock|ssl/certs/.*|hostname|hosts|resolv\.conf)"
    r"|etc/(?:passwd|group|shadow|gshadow|subuid|subgid)-"
    r"|etc/(?:rc[0-6S]\.d|systemd/system/[^/]+\.wants|fonts/conf\.d|mtab|localtime|timezone|shells)(?:/.*)?"
    r"|var/(?:lib/(?:dpkg|apt|ucf|pam|systemd|dbus|man-db|xml-core|sgml-base|emacsen-common|ieee-data|python|aspell)"
    r"|cache|log|backups|tmp|mail|spool)(?:/.*)?"
    r"|usr/share/(?:mime|icons|applications|glib-2\.0/schemas|info/dir|fonts|perl/.*\.pl)(?:\..*|/.*)?"
    r"|usr/lib/(?:locale/locale-archive|.*/(?:gconv-modules|giomodule|loaders|immodules)\.cache)"
    r"|(?:.*/)?(?:\.cache|\.ipynb_checkpoints)/.*|(?:.*/)?\.(?:bash|python)_history"
)
#: How a distribution was installed, beside what it is.
_NOTES = re.compile(r".*\.dist-info/(?:RECORD|INSTALLER|REQUESTED|direct_url\.json|uv_cache\.json)")
_VENV = re.compile(
    r"pyvenv\.cfg|lib64|include|\.gitignore|\.lock|CACHEDIR\.TAG|bin/(?:python[\d.]*|pypy[\d.]*|[aA]ctivate[^/]*"
    r"|deactivate\.bat|pydoc\.bat)|lib/python[^/]*/site-packages/_virtualenv\.(?:py|pth)"
)


def by_itself(path: str) -> bool:
    """Whether a path (relative to ``/``) is something that an environment makes by itself, and nobody put there."""
    below = (rule for rule in NOT_ENVIRONMENT if rule.endswith("/"))
    return bool(_BY_ITSELF.fullmatch(path)) or path.startswith(tuple(below)) or path in NOT_ENVIRONMENT


def is_note(path: str) -> bool:
    """Whether a path is an installer's note of how, not of what, it installed."""
    return bool(_NOTES.fullmatch(path))


class Owners:
    """Who owns what in a view."""

    def __init__(self, view: View, packages: Iterable[Package]) -> None:
        self.exact: dict[str, Owner] = {}
        self.below: dict[str, Owner] = {}  # folders with all that is in them
        self.venvs: set[str] = set()
        self._links = {
            name: os.readlink(shown.path).strip("/")
            for name in view.names("")
            if (shown := view.find(name)).found is not None and stat.S_ISLNK(shown.found.st_mode)
        }  # where /lib is /usr/lib, lists still say /lib
        self.exact |= dict.fromkeys(self._links, ("deb", "base-files", ""))
        packages = list(packages)
        self._debian(view, {package.name for package in packages if package.kind == "deb"})
        for package in packages:
            place = package.place.lstrip("/")
            if package.kind == "r":
                self.below.setdefault(f"{place}/{package.name}", package.key)
        for place in sorted({package.place.lstrip("/") for package in packages if package.kind == "python"}):
            self._python(view, place)
        for prefix in sorted({package.environment for package in packages if package.kind == "conda"}):
            self._conda(view, prefix.lstrip("/"))

    def of(self, path: str) -> Owner | None:
        """Who owns a path (relative to ``/``), or a folder that it is in."""
        if found := self.exact.get(path):
            return found
        at = path
        while at:
            if found := self.below.get(at):
                return found
            at = at.rpartition("/")[0]
            if at in self.venvs and _VENV.fullmatch(path[len(at) + 1 :]):
                return "venv", f"/{at}", ""
        return None

    def _real(self, path: str) -> str:
        top, slash, rest = path.strip("/").partition("/")
        return self._links.get(top, top) + slash + rest

    def _debian(self, view: View, installed: set[str]) -> None:
        for file in view.names(INFO):
            name = file.removesuffix(".list").partition(":")[0]
            if not file.endswith(".list") or name not in installed:
                continue
            for line in _lines(view.read(f"{INFO}/{file}")):
                self.exact[self._real(line)] = "deb", name, ""
        diverted = list(_lines(view.read("var/lib/dpkg/diversions")))
        for original, moved in zip(diverted[::3], diverted[1::3], strict=False):
            if owner := self.exact.get(self._real(original)):
                self.exact.setdefault(self._real(moved), owner)

    def _python(self, view: View, place: str) -> None:
        prefix = re.sub(r"/?lib(?:64)?/python[^/]*/(?:site|dist)-packages$", "", place)
        if view.find(f"{prefix}/pyvenv.cfg").found is not None:
            self.venvs.add(prefix)
        for name in view.names(place):
            if not name.endswith((".dist-info", ".egg-info", ".egg")):
                continue
            owner = "python", project_name(name.removesuffix(name[name.rindex(".") :]).partition("-")[0]), f"/{place}"
            self.below.setdefault(f"{place}/{name}", owner)
            for row in csv.reader(_lines(view.read(f"{place}/{name}/RECORD"))):
                self.exact.setdefault(_join("", place, row[0] if row else ""), owner)
            for line in _lines(view.read(f"{place}/{name}/installed-files.txt")):  # of an egg-info
                self.exact.setdefault(_join(place, name, line), owner)
            if name.endswith(".egg-info"):
                for line in _lines(view.read(f"{place}/{name}/top_level.txt")):
                    self.below.setdefault(f"{place}/{line}", owner)
                    self.below.setdefault(f"{place}/{line}.py", owner)

    def _conda(self, view: View, prefix: str) -> None:
        place = f"/{prefix}/conda-meta"
        for name in view.names(place[1:]):
            self.exact[f"{place[1:]}/{name}"] = "conda", "", place
            try:
                said = json.loads(view.read(f"{place[1:]}/{name}") or b"") if name.endswith(".json") else {}
                for path in said.get("files", ()):
                    self.exact.setdefault(f"{prefix}/{path}", ("conda", str(said["name"]), place))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue


def unowned(view: View, packages: Iterable[Package], below: View | None = None, most: int = MOST) -> dict[str, Any]:
    """Files that no package owns and no environment makes by itself: ``count``, ``size`` (bytes) and ``files``, the
    first ``most`` by path, each with its bytes. below: leave out what it shows as well."""
    owners = Owners(view, packages)
    found = sorted(
        (path, shown.found.st_size) for path, shown in files(view)
        if shown.found is not None and not by_itself(path) and owners.of(path) is None and not is_alternative(shown)
        and (below is None or below.find(path).path != shown.path)
    )  # fmt: skip
    return {"count": len(found), "size": sum(size for _, size in found), "files": found[:most]}


def is_alternative(shown: Shown) -> bool:
    """Whether it is a link that update-alternatives(1) made."""
    link = shown.found is not None and stat.S_ISLNK(shown.found.st_mode)
    return link and os.readlink(shown.path).startswith("/etc/alternatives/")


def _join(*parts: str) -> str:
    """A path relative to ``/``; one that begins there stays what it is."""
    return os.path.normpath(os.path.join("/", *parts)).lstrip("/")


def _lines(data: bytes | None) -> Iterator[str]:
    return (line for line in (data or b"").decode("utf-8", "surrogateescape").split("\n") if line)


def files(view: View) -> Iterator[tuple[str, Shown]]:
    """Every path that is no folder."""
    pending = [""]
    while pending:
        at = pending.pop()
        for name in view.names(at):
            path = f"{at}/{name}" if at else name
            shown = view.find(path)
            if shown.is_folder:
                pending.append(path)
            else:
                yield path, shown
