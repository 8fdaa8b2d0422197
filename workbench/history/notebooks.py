"""What a notebook says of its environment: ``metadata.workbench`` of the notebook and of each cell that was run.

Described by ``notebook.schema.json``. It is small and changes only with the environment, for version control. What a
notebook names is kept by gc as long as the notebook says so (a *pin*).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.images import files
from workbench.model import KERNEL_PREFIX, NotFound

KEY = "workbench"
SCHEMA = Path(__file__).parent / "notebook.schema.json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST = 200 << 20  # bytes of a notebook that is looked into
_PLACES = 3


@dataclass(frozen=True, slots=True)
class Record:
    """What a notebook says. kernel: the kernelspec that it names; seen: names of archives that held the image."""

    image: str
    ref: str
    parent: str
    seen: tuple[str, ...]
    kernel: str

    @property
    def absence(self) -> str:
        """What is to be said of an image that is not here."""
        named = f" ({self.ref})" if self.ref else ""
        where = f", last seen in {', '.join(self.seen)}" if self.seen else ""
        return f"image {self.image[7:19]}{named} is not here{where}"

    def missing(self, path: str) -> NotFound:
        """The error when the image is not here."""
        return NotFound(
            f"open {os.path.basename(path)} in its environment", self.absence,
            "import it with `jupyter workbench import`, or choose another kernel",
        )  # fmt: skip


def recorded(path: str) -> Record | None:
    """What the notebook file says, None where it says nothing that is understood."""
    try:
        if os.path.getsize(path) > _LARGEST:
            return None
        with open(path, encoding="utf-8") as file:
            metadata = json.load(file)["metadata"]
        said = metadata[KEY]
        if not _DIGEST.fullmatch(said["image"]):
            return None
        kernel = metadata.get("kernelspec", {}).get("name", "")
        seen = tuple(str(place) for place in said.get("seen", ())[:_PLACES])
        return Record(said["image"], str(said.get("ref", "")), str(said.get("parent", "")), seen, str(kernel))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def annotate(
    notebook: dict[str, Any], before: Mapping[str, Any], *, head: Record | None, running: bool, ran: Mapping[str, str]
) -> None:
    """Write into a notebook that is about to be saved what is known of its environment.

    before: the notebook as it is on disk, whose word stays for what is the same. head: the environment now, if it is
    a snapshot, and the kernel that launches it. running: whether a kernel of ours works for it. ran: by cell id the
    image that it was last run in.
    """
    metadata, old = notebook.setdefault("metadata", {}), before.get("metadata", {})
    if head is not None:
        said = {"version": 1, "image": head.image, "ref": head.ref, "parent": head.parent, "seen": list(head.seen)}
        metadata[KEY] = {key: value for key, value in said.items() if value}
        if head.kernel:
            metadata["kernelspec"] = metadata.get("kernelspec", {}) | {"name": head.kernel}
    elif KEY in old and not running and str(metadata.get("kernelspec", {}).get("name", "")).startswith(KERNEL_PREFIX):
        # An editor holds what it read or chose before; one that has chosen since has a kernel running.
        metadata[KEY] = old[KEY]
        metadata["kernelspec"] = metadata["kernelspec"] | {"name": old.get("kernelspec", {}).get("name", "")}
    else:
        metadata.pop(KEY, None)
    known = {cell.get("id"): cell for cell in before.get("cells", ()) if cell.get("id")}
    for cell in notebook.get("cells", ()):
        if cell.get("cell_type") != "code":
            continue
        own, was = cell.setdefault("metadata", {}), known.get(cell.get("id"), {})
        if cell.get("id") in ran:
            own[KEY] = {"image": ran[cell["id"]]}
        elif KEY in was.get("metadata", {}) and all(
            _plain(was.get(key)) == _plain(cell.get(key)) for key in ("source", "outputs", "execution_count")
        ):
            own.setdefault(KEY, was["metadata"][KEY])


def _plain(value: Any) -> str:
    """The same for a text and for its lines, which nbformat writes to disk."""

    def joined(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return "".join(value)
        if isinstance(value, list):
            return [joined(each) for each in value]
        return {key: joined(each) for key, each in value.items()} if isinstance(value, dict) else value

    return json.dumps(joined(value), sort_keys=True, default=str)


# What is kept for notebooks


def pin(home: str, path: str, image: str) -> None:
    """Keep an image for the notebook that names it."""
    folder = os.path.join(home, "pins")
    name = os.path.join(folder, hashlib.sha256(os.fsencode(path)).hexdigest()[:32])
    data = json.dumps({"notebook": path, "image": image}).encode()
    with contextlib.suppress(OSError), open(name, "rb") as file:
        if file.read() == data:
            return
    os.makedirs(folder, 0o700, exist_ok=True)
    with files.staging(os.path.join(home, "tmp")) as staging:
        fresh = os.path.join(staging, "pin")
        files.write_file(fresh, data)
        files.publish(fresh, name)


def pinned(home: str) -> Iterator[str]:
    """The images that notebooks name; what a notebook names no more is forgotten."""
    folder = os.path.join(home, "pins")
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
            record = recorded(known["notebook"])
            gone = not os.path.exists(known["notebook"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if gone or (record is not None and record.image != known["image"]):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        else:
            yield str(known["image"])


def note_place(home: str, image: str, place: str) -> None:
    """An archive (the name of its file) holds an image."""
    path = os.path.join(home, "seen")
    line = json.dumps({"image": image, "place": os.path.basename(place)}) + "\n"
    with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(line)


def places(home: str, image: str) -> tuple[str, ...]:
    """The last archives that were written or read with an image in them, the newest first."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError), open(os.path.join(home, "seen"), encoding="utf-8") as file:
        for line in reversed(file.readlines()[-10_000:]):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["image"] == image:
                    found[str(entry["place"])] = None
    return tuple(found)[:_PLACES]
