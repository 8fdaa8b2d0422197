"""Names of images: ``refs/<name>/<tag>``, one file a name, set by atomic rename as Git sets its branches.

Where a name has been is told by its log, ``logs/<name>/<tag>``: a line of JSON for each move that is worth one.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.images import files
from workbench.model import Conflict, Corrupt, InvalidInput, NotFound

DEFAULT_TAG = "latest"

_PART = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")
_LONGEST = 200
_LOG_LENGTH = 1000  # moves of a name


def split(text: str) -> tuple[str, str]:
    """``"team/tools:v1"`` as name and tag, ``latest`` where none is written. Raises InvalidInput."""
    name, colon, tag = text.partition(":")
    if not colon:
        tag = DEFAULT_TAG
    # "sha256" is left to digests, whatever comes after the colon.
    if len(name) > _LONGEST or name == "sha256" or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise InvalidInput(
            "read an image's name",
            f"{text[:_LONGEST]!r} is not one",
            "use lower-case letters and digits, with single . _ - between them and / between parts",
        )
    if not _TAG.fullmatch(tag):
        raise InvalidInput(
            "read an image's name",
            f"{tag[:_LONGEST]!r} is no tag",
            "use up to 128 letters, digits, dots, dashes and underscores after the colon",
        )
    return name, tag


class Refs:
    """The names below one home. Safe for several processes at once."""

    def __init__(self, home: Path | str) -> None:
        self.home = os.fspath(home)
        self._root = os.path.join(self.home, "refs")
        self._blobs = os.path.join(self.home, "blobs")
        self._tmp = os.path.join(self.home, "tmp")
        self._logs = os.path.join(self.home, "logs")

    def set(self, name: str, image_id: str, why: str = "") -> None:
        """Point a name at an image, durable when this returns. why: a word for the name's log; without, none is kept.

        Raises InvalidInput for a name that cannot be one, NotFound when the image is not in the store,
        Conflict when a name such as ``a/b`` would need a folder where ``a:b`` has its file, HostLacks
        without space.
        """
        path = self._path(name)
        if not _DIGEST.fullmatch(image_id):
            raise InvalidInput(f"name an image {name}", f"{image_id!r} is no image ID", "give sha256:<64 hex>")
        # The store's lock keeps gc from taking the image between the look and the rename.
        with (
            files.clear_errors(f"name an image {name}", self.home),
            files.locked(self._blobs, exclusive=False),
            files.locked(self._root, exclusive=True),
            files.staging(self._tmp) as staging,
        ):
            if not os.path.exists(os.path.join(self._blobs, "sha256", image_id[7:])):
                raise NotFound(f"name an image {name}", f"there is no image {image_id[:19]}", "build or pull it first")
            try:
                self._make_folders(os.path.dirname(path))
                if why:
                    self._write_down(name, image_id, why)
                fresh = os.path.join(staging, "ref")
                files.write_file(fresh, f"{image_id}\n".encode())
                files.publish(fresh, path)
            except (NotADirectoryError, FileExistsError, IsADirectoryError):
                raise Conflict(
                    f"name an image {name}",
                    "a part of the name is taken by another name's tag or folder",
                    "choose another name",
                ) from None

    def find(self, name: str) -> str | None:
        """The image ID behind a name, None where there is none. Raises InvalidInput for what cannot be a name."""
        with suppress(NotFound, Corrupt):
            return self.get(name)
        return None

    def move(self, name: str, image_id: str, why: str, *, force: bool = False) -> None:
        """``set`` a name that is nobody's, or this image's already. Raises Conflict for another's, unless ``force``."""
        known = self.find(name)
        if known not in (None, image_id) and not force:
            obstacle = f"{name} is the name of {str(known)[7:19]}"
            raise Conflict(f"name an image {name}", obstacle, "give another name, or move it with --force")
        self.set(name, image_id, why)

    def _write_down(self, name: str, image_id: str, why: str) -> None:
        """Before the name moves: a line too many says something that was about to be, one too few loses an image."""
        before = self.find(name)
        path = os.path.join(self._logs, *split(name))
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        known = self.log(name)
        if before and (not known or known[0]["image"] != before):
            known.insert(0, {"image": before, "time": int(time.time()), "why": "was here before"})
        known.insert(0, {"image": image_id, "time": int(time.time()), "why": why})
        lines = [json.dumps(entry) + "\n" for entry in reversed(known[:_LOG_LENGTH])]
        with files.staging(self._tmp) as staging:
            fresh = os.path.join(staging, "log")
            files.write_file(fresh, "".join(lines).encode())
            files.publish(fresh, path)

    def log(self, name: str) -> list[dict[str, Any]]:
        """Where a name has been, the newest first: ``image``, ``time`` (seconds since 1970) and ``why``."""
        found: list[dict[str, Any]] = []
        with suppress(OSError), open(os.path.join(self._logs, *split(name)), encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    if _DIGEST.fullmatch(entry["image"]):
                        found.insert(0, entry)
        return found

    def logged(self) -> frozenset[str]:
        """The images that any name's log tells of."""
        found = []
        for name in self._names():
            with suppress(InvalidInput):
                found += [str(entry["image"]) for entry in self.log(name)]
        return frozenset(found)

    def get(self, name: str) -> str:
        """The image ID behind a name. Raises InvalidInput, NotFound (with the nearest name), Corrupt."""
        path = self._path(name)
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                text = file.read(100).strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._unknown(name) from None
        if not _DIGEST.fullmatch(text):
            raise Corrupt(
                f"read the name {name}", f"{path} holds no image ID", "run `jupyter workbench check --repair`"
            )
        return text

    def delete(self, name: str) -> None:
        """Forget a name, durably; the image stays until gc. Raises InvalidInput, NotFound."""
        path = self._path(name)
        with files.locked(self._root, exclusive=True):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise self._unknown(name) from None
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._logs, *split(name)))
            folder = os.path.dirname(path)
            files.sync_folder(folder)
            with suppress(OSError):
                while folder != self._root:
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)

    def all(self) -> dict[str, str]:
        """``"name:tag"`` to image ID, sorted; files that hold no ID are left to ``check``."""
        found = {}
        for name in self._names():
            with suppress(Corrupt, NotFound, InvalidInput):
                found[name] = self.get(name)
        return dict(sorted(found.items()))

    def broken(self) -> list[tuple[str, str]]:
        """Files that are no ref: their path, and what is wrong with them in a few words."""
        wrong = []
        for name in self._names():
            try:
                self.get(name)
            except Corrupt:
                wrong.append((self._path(name), "holds no image ID"))
            except InvalidInput:
                path, _, tag = name.rpartition(":")
                wrong.append((os.path.join(self._root, path, tag), "has a name that no image can have"))
            except NotFound:
                continue
        return wrong

    def resolve(self, text: str) -> str:
        """The image ID that a person means: ``name[:tag]``, ``sha256:<hex>``, or 4 or more digits of an ID.

        A name wins over digits. Raises NotFound (with the nearest known name), Conflict for digits that
        several images begin with, InvalidInput for what can be neither.
        """
        if not text.startswith("sha256:"):
            try:
                return self.get(text)
            except InvalidInput:
                raise
            except NotFound:
                if not _HEX.fullmatch(text):
                    raise
        digits = _HEX.fullmatch(text)
        if digits is None:
            raise InvalidInput("find an image", f"{text!r} is no image ID", "give sha256: and 4 or more hex digits")
        matches = [hexes for hexes in os.listdir(os.path.join(self._blobs, "sha256")) if hexes.startswith(digits[1])]
        if len(digits[1]) < 64:
            matches = [hexes for hexes in matches if self._is_image(hexes)]
        if not matches:
            raise self._unknown(text)
        if len(matches) > 1:
            raise Conflict("find an image", f"{len(matches)} images begin with {text}", "give more digits")
        return f"sha256:{matches[0]}"

    def _is_image(self, hexes: str) -> bool:
        from workbench.images import config  # msgspec is not needed for plain names

        path = os.path.join(self._blobs, "sha256", hexes)
        try:
            if os.path.getsize(path) > config.MAX_SIZE:
                return False
            with open(path, "rb") as file:
                config.decode(file.read())
        except (OSError, Corrupt, InvalidInput):
            return False
        return True

    def _path(self, name: str) -> str:
        return os.path.join(self._root, *split(name))

    def _make_folders(self, folder: str) -> None:
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            os.mkdir(path, 0o700)
            files.sync_folder(os.path.dirname(path))

    def _names(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self._root):
            folders.sort()
            for tag in sorted(names):
                yield f"{os.path.relpath(folder, self._root)}:{tag}"

    def _unknown(self, text: str) -> NotFound:
        known = [name.removesuffix(f":{DEFAULT_TAG}") for name in self._names()]
        import difflib

        near = difflib.get_close_matches(text.removesuffix(f":{DEFAULT_TAG}"), known, n=1)
        if near:
            remedy = f"did you mean {near[0]}?"
        else:
            remedy = "`jupyter workbench images` lists what is there" if known else "build an image first"
        return NotFound("find an image", f"there is none named {text}", remedy)
