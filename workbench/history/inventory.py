"""The packages of an environment, read from its files: Debian's, Python's and R's. Nothing is run.

Sources: dpkg's status file (deb-control(5)), ``*.dist-info`` and ``*.egg-info`` (core metadata specification), and R's
DESCRIPTION files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from workbench.images.view import View
from workbench.model import project_name

#: kind, name, place -> version
Packages = dict[tuple[str, str, str], str]

_LIBRARIES = ("usr/lib", "usr/local/lib", "opt/venv/lib")
_R = ("usr/lib/R/library", "usr/lib/R/site-library", "usr/local/lib/R/site-library")
_HEAD = 1 << 16  # bytes of a metadata file that are looked at


def packages(view: View) -> Packages:
    """All of them: by kind (``deb``, ``python``, ``r``), name and the folder that they are in."""
    found: Packages = {}
    for name, version in _debian(view):
        found["deb", name, ""] = version
    for place in _site_packages(view):
        for name, version in _python(view, place):
            found["python", name, "/" + place] = version
    for place in _R:
        for name in view.names(place):
            fields = _fields(view.read(f"{place}/{name}/DESCRIPTION"))
            if "Version" in fields:
                found["r", fields.get("Package", name), "/" + place] = fields["Version"]
    return found


def _debian(view: View) -> Iterator[tuple[str, str]]:
    data = view.read("var/lib/dpkg/status") or b""
    for stanza in data.decode("utf-8", "replace").split("\n\n"):
        fields = _fields(stanza.encode())
        if fields.get("Status", "").endswith(" installed") and "Package" in fields:
            yield fields["Package"], fields.get("Version", "")


def _site_packages(view: View) -> Iterator[str]:
    for library in _LIBRARIES:
        for name in view.names(library):
            if re.fullmatch(r"python3(\.\d+)?", name):
                for kind in ("site-packages", "dist-packages"):
                    if view.find(f"{library}/{name}/{kind}").is_folder:
                        yield f"{library}/{name}/{kind}"


def _python(view: View, place: str) -> Iterator[tuple[str, str]]:
    for name in view.names(place):
        if name.endswith(".dist-info"):
            metadata = f"{place}/{name}/METADATA"
        elif name.endswith(".egg-info"):
            folder = view.find(f"{place}/{name}").is_folder
            metadata = f"{place}/{name}/PKG-INFO" if folder else f"{place}/{name}"
        else:
            continue
        fields = _fields(view.read(metadata))
        if fields.get("Name") and fields.get("Version"):
            yield project_name(fields["Name"]), fields["Version"]


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
