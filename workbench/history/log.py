"""History: which image a revision names, and what led to it. Words and forms are Git's (gitrevisions(7), git-log(1)).

::

    name, name:tag, ID      as everywhere
    name~N, name~, name^    the parent of the parent…, N times
    name@{N}                where the name was N moves ago
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workbench.history.machine import LABEL
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.model import Image, NotFound, WorkbenchError

_STEP = re.compile(r"(@\{\d{1,6}\}|~\d{0,6}|\^)")
_REVISION = re.compile(rf"(.+?)((?:{_STEP.pattern})+)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a history. names: the refs at it; summary: the first line of its message; when: RFC 3339.

    An image that was built has no parent, and says so in place of a message.
    """

    id: str
    parent: str
    names: tuple[str, ...]
    author: str
    when: str
    message: str
    size: int
    machine: dict[str, str]

    @property
    def summary(self) -> str:
        """The first line of the message."""
        return self.message.partition("\n")[0]


def resolve(store: Store, refs: Refs, text: str) -> str:
    """The image ID that a revision names. Raises NotFound, InvalidInput, Conflict as ``Refs.resolve`` does."""
    found = _REVISION.fullmatch(text)
    if found is None:
        return refs.resolve(text)
    name, steps = found[1], _STEP.findall(found[2])
    image_id = ""
    for step in steps:
        if step.startswith("@"):
            moves, number = refs.log(name), int(step[2:-1])
            if image_id or number >= max(len(moves), 1):
                raise NotFound("find an image", f"{name} has not moved {number} times", f"see its log: {len(moves)}")
            image_id = str(moves[number]["image"]) if moves else refs.resolve(name)
            continue
        image_id = image_id or refs.resolve(name)
        for _ in range(int(step[1:] or 1)):
            parent = store.image(image_id).parent
            if not parent:
                raise NotFound("find an image", f"{text}: {image_id[7:19]} has no parent", "see the log of it")
            image_id = parent
    return image_id


def chain(store: Store, image: Image) -> Iterator[Image]:
    """An image and those that it stands on, the newest first; the last one was built, or its parent is not here."""
    seen = {image.id}
    yield image
    while image.parent and image.parent not in seen:
        seen.add(image.parent)
        try:
            image = store.image(image.parent)
        except WorkbenchError:
            return
        yield image


def names_of(refs: Refs) -> dict[str, tuple[str, ...]]:
    """The names at each image."""
    names: dict[str, tuple[str, ...]] = {}
    for name, target in refs.all().items():
        names[target] = (*names.get(target, ()), name.removesuffix(":latest"))
    return names


def entries(store: Store, refs: Refs, image_id: str) -> Iterator[Entry]:
    """An image and those that it stands on, the newest first; the last one was built, or its parent is not here."""
    names = names_of(refs)
    for image in chain(store, store.image(image_id)):
        yield entry(store, image, names.get(image.id, ()))


def entry(store: Store, image: Image, names: tuple[str, ...] = ()) -> Entry:
    """What an image says of itself."""
    history = store.history(image.id)
    last: dict[str, Any] = (history or [{}])[-1] if image.parent else {}
    facts = dict(image.labels).get(LABEL, "") if image.parent else ""
    try:
        machine = {str(key): str(value) for key, value in json.loads(facts or "{}").items()}
    except (ValueError, AttributeError, RecursionError):
        machine = {}
    built = "built from a recipe" if history else "imported"
    return Entry(
        image.id, image.parent, names, str(last.get("author", "")), image.created,
        str(last.get("comment", "")) or built, store.layer_size(image.diff_ids[-1]) if image.diff_ids else 0, machine,
    )  # fmt: skip
