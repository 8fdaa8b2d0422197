"""Several histories as one drawing, as ``git log --graph --oneline --all`` has it (git-log(1)).

An image has one parent at the most, so lines fork and never merge. Each fork's lines are drawn one after the other, the
newest first, so that a line ends beside the one that it joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from workbench.history import log
from workbench.history.log import Entry
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.model import WorkbenchError

#: What stands before an entry; None for a line that only joins two others.
Row = tuple[str, Entry | None]


def every(store: Store, refs: Refs) -> list[Entry]:
    """All images that a name leads to, by itself or as what another stands on; each once."""
    names = log.names_of(refs)
    found: dict[str, Entry] = {}
    for image_id in names:
        try:
            top = store.image(image_id)
        except WorkbenchError:
            continue  # `check` names it
        for image in log.chain(store, top):
            if image.id in found:
                break
            found[image.id] = log.entry(store, image, names.get(image.id, ()))
    return list(found.values())


def draw(entries: Iterable[Entry]) -> Iterator[Row]:
    """The rows of the drawing: every entry after all that stand on it, the newest first."""
    known = {each.id: each for each in entries}
    children: dict[str, list[Entry]] = {}
    for each in known.values():
        children.setdefault(each.parent if each.parent in known else "", []).append(each)
    newest = _newest(children)
    for siblings in children.values():
        siblings.sort(key=lambda one: (newest[one.id], one.id), reverse=True)
    # What is still to be drawn, the next one last: an entry (None joins two lines), its column, and whether what stands
    # on it is drawn.
    pending: list[tuple[Entry | None, int, bool]] = [(root, 0, False) for root in reversed(children.get("", ()))]
    while pending:
        entry, column, ready = pending.pop()
        if entry is None:
            yield "| " * column + "|/", None
            continue
        above = children.get(entry.id, ())
        if ready or not above:
            yield "| " * column + "*", entry
            continue
        pending.append((entry, column, True))
        for number, child in reversed(list(enumerate(above))):
            if number:
                pending.append((None, column, True))
            pending.append((child, column + bool(number), False))


def _newest(children: Mapping[str, Sequence[Entry]]) -> dict[str, str]:
    """For each entry the date of the newest that stands on it, itself included."""
    found: dict[str, str] = {}
    pending = [(root, False) for root in children.get("", ())]
    while pending:
        entry, ready = pending.pop()
        above = children.get(entry.id, ())
        if ready:
            found[entry.id] = max([entry.when, *(found[child.id] for child in above)])
        else:
            pending += [(entry, True), *((child, False) for child in above)]
    return found
