"""The part of `Workbench` that is about history: snapshots, what a container is over, and what lies between images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.model import Conflict, WorkbenchError

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.containers.container import Container, Containers
    from workbench.history.diff import Diff
    from workbench.history.graph import Row
    from workbench.history.inventory import Inventory
    from workbench.history.log import Entry
    from workbench.history.snapshot import Snapshot
    from workbench.history.worktree import Unsaved
    from workbench.images.refs import Refs
    from workbench.images.store import Store
    from workbench.model import Image, Meter


@dataclass(frozen=True, slots=True)
class Checkout:
    """What a container is over now. ref: the name that its snapshots move; moved: whether the files are other ones."""

    image: str
    ref: str
    moved: bool


class HistoryFace:
    """What `Workbench` inherits; it brings ``store``, ``refs``, ``containers`` and the other methods named here."""

    if TYPE_CHECKING:
        containers: Containers

        @property
        def store(self) -> Store:
            """See `Workbench`."""

        @property
        def refs(self) -> Refs:
            """See `Workbench`."""

        def container(self, text: str) -> Container:
            """See `Workbench`."""

        def image(self, text: str) -> Image:
            """See `Workbench`."""

        def _resolve(self, text: str) -> str: ...

        def _over(self, known: Any, before: Image, image: Image) -> dict[str, Any]: ...

    def snapshot(
        self, text: str, *, message: str, author: str = "", name: str = "", when: int | None = None,
        look_only: bool = False, force: bool = False, meter: Meter | None = None,
    ) -> Snapshot:  # fmt: skip
        """Take a snapshot of a container, by its ID; see ``history.snapshot.take``."""
        from workbench.history import snapshot

        return snapshot.take(
            self.store, self.refs, self.container(text), message=message, author=author, name=name, when=when,
            look_only=look_only, force=force, meter=meter,
        )  # fmt: skip

    def changed(self, text: str) -> tuple[int, int]:
        """How many files and folders of a container no snapshot has, and their bytes; it goes on meanwhile."""
        from workbench.history import snapshot

        container = self.container(text)
        try:
            found = snapshot.look(self.store, container)
        except OSError:  # files come and go: it stands still for a moment after all
            taken = snapshot.take(self.store, self.refs, container, message="", look_only=True)
            return taken.changes, taken.size
        return found["changes"], found["size"]

    def unsaved(self, text: str) -> Unsaved:
        """What of a container no snapshot holds."""
        from workbench.history import worktree

        return worktree.unsaved(self.store, self.refs, self.container(text))

    def target(self, text: str, revision: str = "", *, create: str = "", follow: bool = True) -> Checkout:
        """What ``checkout`` of the same arguments would come to. Raises NotFound, InvalidInput, Conflict."""
        from workbench.history import worktree

        head = self.container(text).head
        image_id, ref = worktree.target(self.refs, self._resolve, revision, head, create)
        moved = image_id != head["image"]
        return Checkout(image_id, ref if create or follow else str(head["ref"]) if not moved else "", moved)

    def checkout(
        self, text: str, revision: str = "", *, create: str = "", force: bool = False, follow: bool = True
    ) -> Checkout:
        """Put another environment in the place of what a stopped container has, or only another name to its head.

        revision: what `log` names, "" or HEAD~1 of its last snapshot; a name is followed from then on, unless not
        ``follow``. create: a new name, followed. force: drop what no snapshot holds. Raises Conflict while it runs
        (but for a mere name), and for what would be lost; NotFound, InvalidInput.
        """
        from workbench.history import worktree

        container = self.container(text)
        done = self.target(text, revision, create=create, follow=follow)
        if done.moved:
            tried = f"check {revision or create or 'HEAD'} out"
            self._switch(container, done.image, done.ref, tried, "" if force else "checkout --force")
        if create:
            self.refs.set(create, done.image, f"branch: created from {revision or 'HEAD'}")
        if not done.moved:
            worktree.follow(container, done.ref)
        return done

    def reset(self, text: str, revision: str = "", *, hard: bool = False) -> Checkout:
        """Start a stopped container anew from its last snapshot, or from another revision, to which its name goes.

        hard: drop what no snapshot holds. Raises as ``checkout`` does.
        """
        container = self.container(text)
        head = container.head
        image_id = self.target(text, revision, follow=False).image
        tried = f"reset container {container.id}"
        self._switch(container, image_id, head["ref"], tried, "" if hard else "reset --hard")
        if head["ref"] and image_id != head["image"]:
            self.refs.set(head["ref"], image_id, f"reset: moving to {revision}")
        return Checkout(image_id, head["ref"], True)

    def _switch(self, container: Container, image_id: str, ref: str, tried: str, how: str) -> None:
        from workbench.history import worktree

        image, before = self.store.image(image_id), self.store.image(container.image_id)
        if image.kernel != before.kernel:
            raise Conflict(tried, "its kernel is started in another way", "launch the image by its own name")
        worktree.switch(
            self.store, self.refs, container, image, ref, lambda known: self._over(known, before, image),
            tried=tried, how=how,
        )  # fmt: skip

    def branches(self, pattern: str = "") -> list[dict[str, Any]]:
        """A row for each name with its image, and the containers whose snapshots move it."""
        from workbench.history import worktree

        heads = {container.id: str(container.head["ref"]) for container in self.containers}
        return worktree.branches(self.refs, heads, pattern)

    def branch(self, name: str, revision: str, *, force: bool = False) -> Image:
        """Make a name for a revision, which no container follows yet. Raises Conflict for one that is there."""
        image = self.image(revision)
        if not force and self.refs.find(name) is not None:
            raise Conflict(f"make the branch {name}", "that name is an image's", "take another, or --force")
        self.refs.set(name, image.id, f"branch: created from {revision}")
        return image

    def history(self, text: str) -> Iterator[Entry]:
        """An image and those that it stands on, the newest first. Raises NotFound, InvalidInput."""
        from workbench.history import log

        return log.entries(self.store, self.refs, self._resolve(text))

    def show(self, text: str) -> tuple[Entry, Diff | None]:
        """An image, and what it changed, where its parent is here. Raises as ``history``."""
        entry = next(self.history(text))
        return entry, self.brought(entry)

    def brought(self, entry: Entry) -> Diff | None:
        """What one of a history changed, where its parent is here."""
        from workbench.history import diff

        try:
            parent = self.store.image(entry.parent) if entry.parent else None
        except WorkbenchError:
            return None
        return diff.between(self.store, parent, self.store.image(entry.id)) if parent else None

    def graph(self, text: str | None = None) -> Iterator[Row]:
        """Histories as a drawing, row by row: of one image, or of all that names lead to. Raises as ``history``."""
        from workbench.history import graph

        return graph.draw(self.history(text) if text else graph.every(self.store, self.refs))

    def inventory(self, text: str, *, unowned: bool = False) -> Inventory:
        """The packages of an image, and files that none owns; see ``history.inventory.take``."""
        from workbench.history import inventory

        return inventory.take(self.store, self.image(text), unowned=unowned)

    def diff(self, one: str, other: str) -> Diff:
        """What lies between two images: packages and files. Raises NotFound, InvalidInput."""
        from workbench.history import diff

        return diff.between(self.store, self.image(one), self.image(other))

    def tag(self, name: str, text: str, *, force: bool = False) -> Image:
        """Give an image another name. Raises Conflict for a name that is another image's, unless ``force``."""
        image = self.image(text)
        self.refs.move(name, image.id, f"tag: {text}", force=force)
        return image

    def export(
        self, text: str, out: str, *, form: str = "none", along: Sequence[str] = (), meter: Meter | None = None
    ) -> int:
        """Write an image into one file that other tools read; see ``history.share.save``."""
        from workbench.history import share

        return share.save(self.store, self.refs, self.image(text), text, out, form=form, along=along, meter=meter)

    def packed(
        self, text: str, *, form: str = "none", along: Sequence[str] = (), meter: Meter | None = None, image: str = ""
    ) -> AbstractContextManager[Path]:
        """An image's archive for who hands it on at once; see ``history.share.packed``. image: what ``text`` means."""
        from workbench.history import share

        found = self.image(image or text)
        return share.packed(self.store, self.refs, found, text, form=form, along=along, meter=meter)

    def load(
        self, path: str, name: str = "", *, force: bool = False, place: str | None = None, meter: Meter | None = None
    ) -> tuple[str, Image, dict[str, bytes]]:
        """Take an image from an archive; see ``history.share.load``."""
        from workbench.history import share

        return share.load(self.store, self.refs, path, name, force=force, place=place, meter=meter)
