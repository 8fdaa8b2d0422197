"""The writable layer of a container as its working tree: what it holds that no snapshot does, and how another
environment takes its place. Words are Git's (git-checkout(1), git-reset(1), git-branch(1)).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from workbench.containers import state
from workbench.containers.container import Container
from workbench.history import snapshot
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.linux import userns
from workbench.model import Conflict, Image, InvalidInput, count, format_size

#: Files by which a package is known, of Python, Debian and R (``inventory`` reads what is in them).
_PACKAGE = re.compile(
    r".*/(?P<python>[\w.]+-[\w.!+]+)\.dist-info/METADATA|var/lib/dpkg/info/(?P<deb>[^/:]+)(?::\w+)?\.list"
    r"|.*/R/.*library/(?P<r>[\w.]+)/DESCRIPTION"
)
_NAMED = 5  # packages


@dataclass(frozen=True, slots=True)
class Unsaved:
    """What no snapshot of a container holds. size: bytes; packages: those that came or changed, by name."""

    container: str
    changes: int
    size: int
    packages: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.changes > 0

    def __str__(self) -> str:
        more = f" and {len(self.packages) - _NAMED} more" if len(self.packages) > _NAMED else ""
        named = f" ({', '.join(self.packages[:_NAMED])}{more})" if self.packages else ""
        return f"{count(self.changes, 'change')}{named}, {format_size(self.size)}"

    def refuse(self, tried: str, how: str) -> None:
        """Raises Conflict if there is anything. how: the way to lose it."""
        if self:
            keep = f'`jupyter workbench snapshot {self.container} -m "…"` (%container snapshot) keeps it'
            raise Conflict(tried, f"it holds {self} that no snapshot has", f"{keep}, {how} drops it")


def unsaved(store: Store, refs: Refs, container: Container) -> Unsaved:
    """What would be lost with a container. Raises NotFound when it goes meanwhile, HostLacks without space."""
    taken = snapshot.take(store, refs, container, message="", look_only=True)
    found = (_PACKAGE.fullmatch(path) for path in taken.paths)
    names = {str(next(filter(None, match.groups()))) for match in found if match}
    return Unsaved(container.id, taken.changes, taken.size, tuple(sorted(names)))


def follow(container: Container, ref: str) -> None:
    """From now on its snapshots move ``ref``; "" for none of the names that there are."""
    with snapshot.alone(container):
        state.save_head(state.tree(container.folder), state.load_head(container.folder) | {"ref": ref})


def switch(
    store: Store, refs: Refs, container: Container, image: Image, ref: str, spec: Callable[[Any], Any], *, tried: str,
    how: str = "",
) -> None:  # fmt: skip
    """Put an empty working tree over ``image`` in the place of what a stopped container has.

    spec: makes the new spec of the old one. how: the flag that would drop what no snapshot holds; without, it is
    dropped. One rename decides: killed before it, all is as it was, killed after it, all is new. Raises Conflict
    while it runs, and when something would be lost.
    """
    if how:
        unsaved(store, refs, container).refuse(tried, how)
    with snapshot.alone(container), store.lease(image.id):
        held = state.hold(container.folder)
        try:
            known, head = state.load(container.folder), state.load_head(container.folder)
            old = str(known.get("tree", state.TREE))
            new = f"{state.TREE}-{int(old.rpartition('-')[2]) + 1 if '-' in old else 2}"
            path = os.path.join(container.folder, new)
            with suppress(FileNotFoundError):  # of one who was killed
                userns.call("workbench.linux.trees:remove", path)
            state.make_tree(path)
            state.save_head(path, head | {"image": image.id, "ref": ref, "layers": [], "index": "", "untold": 0})
            now = {"tree": new, "image": image.id, "spec": spec(known["spec"])}
            state.save(container.folder, known | now, durable=True)
            userns.call("workbench.linux.trees:remove", os.path.join(container.folder, old))
        finally:
            os.close(held)


def branches(refs: Refs, heads: dict[str, str], pattern: str = "") -> list[dict[str, Any]]:
    """A row for each name: its image, and the containers (by id) whose snapshots move it. heads: id -> ref."""
    rows = []
    for name, image in refs.all().items():
        if pattern in name:
            users = [container for container, ref in heads.items() if ref and _full(ref) == name]
            rows.append({"name": name.removesuffix(":latest"), "image": image, "containers": users})
    return rows


def _full(ref: str) -> str:
    return ref if ":" in ref else f"{ref}:latest"


def target(refs: Refs, resolve: Callable[[str], str], text: str, head: dict[str, Any], create: str) -> tuple[str, str]:
    """What ``checkout TEXT`` means: an image, and the name that snapshots move from then on.

    text: a revision, "" or one that begins with HEAD for the container's last snapshot. create: a name to make.
    Raises NotFound, InvalidInput; Conflict for a name to make that is there.
    """
    image = _revision(resolve, text, head)
    if create:
        if refs.find(create) is not None:
            raise Conflict(f"make the branch {create}", "there is such a name", f"check {create} out instead")
        return image, create
    with suppress(InvalidInput):
        if refs.find(text) == image:
            return image, text
    return image, str(head["ref"]) if image == head["image"] else ""


def _revision(resolve: Callable[[str], str], text: str, head: dict[str, Any]) -> str:
    if text in ("", "HEAD", "@"):
        return str(head["image"])
    if text.startswith(("HEAD~", "HEAD^", "@~", "@^")):
        return resolve(str(head["image"]) + text.removeprefix("HEAD").removeprefix("@"))
    return resolve(text)
