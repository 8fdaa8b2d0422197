"""What the code in one container may ask of the process that launched it, over a socket in its run folder.

It can do what concerns its own container and the images that came of it, and nothing else. Whatever arrives is data:
a request is one line of JSON of a few known keys (``guest_channel`` sees to its size and its turn). No path of the host
is ever taken from it: what is written where it says is written inside, by its own process. The socket's name can be
taken away from inside, which harms nobody else.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from workbench.jupyter.events import IMAGE, Tell, nobody
from workbench.jupyter.guest_channel import Channel, Door, checked
from workbench.model import Conflict, Interrupted, InvalidInput, NotFound, WorkbenchError

if TYPE_CHECKING:
    from workbench.containers.container import Container
    from workbench.history.log import Entry
    from workbench.history_face import Checkout
    from workbench.workbench import Workbench

#: In the run folder; inside it is /run/workbench/api.
NAME = "api"
_NOTEBOOKS = 16 << 20  # bytes of those that go along with an archive
_PATIENCE = 5.0  # seconds until the one before has ended that was interrupted
_IMPATIENCE = 2.0  # seconds that a look waits for a snapshot
_PATHS = 1000

_KNOWN: dict[str, dict[str, type]] = {
    "status": {"brief": bool}, "dashboard": {"model": str},
    "snapshot": {"message": str, "tag": str, "author": str, "dry_run": bool},
    "log": {"image": str, "number": int, "stat": bool}, "diff": {"one": str, "other": str, "files": bool},
    "show": {"image": str}, "tag": {"name": str, "image": str}, "branch": {"name": str, "image": str},
    "checkout": {"image": str, "create": str, "force": bool}, "reset": {"image": str, "hard": bool},
    "export": {"image": str, "along": dict}, "freeze": {"image": str, "build": bool},
    "again": {"reply": dict}, "hello": {},
}  # fmt: skip
#: What may take long: it gets the channel, says how far it is, and ends when nobody waits for it any more.
_LONG = ("snapshot", "export", "freeze")


#: Puts another environment in the place of a container's. Raises Conflict while it runs, and the other named errors.
Wish = Callable[[], "Checkout"]


class GuestApi:
    """Serves one container from ``start`` to ``close``, through restarts of its kernel."""

    def __init__(
        self, bench: Workbench, container: Container, restart: Callable[[Callable[[], None]], None],
        tell: Tell = nobody, watchers: Callable[[], int | None] = lambda: None,
    ) -> None:  # fmt: skip
        """restart: ends the kernel, calls what it is given and starts it anew; returns at once.

        watchers: how many front ends listen to the kernel; None where that is not known.
        """
        self._watchers = watchers
        self.bench, self.container, self._restart, self._tell = bench, container, restart, tell
        self._wish: Wish | None = None
        #: What the next kernel is to say first, and the request that it answers for the one before.
        self.notice = ""
        self._reply: dict[str, Any] = {}
        #: The widget that shows the status, which the next kernel makes anew.
        self._dashboard = ""
        self._door = Door(self._serve, f"workbench-guest-{container.id}")
        self._turns = {verb: threading.Lock() for verb in _LONG}

    def start(self) -> None:
        """Listen; before the container starts, so that the socket becomes its root's. Raises OSError."""
        self._door.open(os.path.join(self.container.run_dir, NAME))

    def close(self) -> None:
        """Stop listening; what is being done is done to its end."""
        self._door.close()

    def _serve(self, line: bytes, channel: Channel) -> None:
        channel.answer(self._answer(line, channel))

    def _answer(self, line: bytes, channel: Channel) -> dict[str, Any]:
        try:
            request = checked(line, _KNOWN)
            verb = request.pop("do")
            act = getattr(self, f"do_{verb}")
            return {"value": act(channel, **request) if verb in _LONG else act(**request)}
        except Interrupted:  # nobody waits for this
            raise
        except WorkbenchError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"{error.strerror or error}"}
        except Exception:  # the next request is answered all the same
            self.bench.log.exception("%%container of container %s", self.container.id)
            return {"error": "the launcher of this kernel could not do that; its log says why"}

    @contextmanager
    def _turn(self, channel: Channel, verb: str) -> Iterator[None]:
        """One of a kind at a time. Raises Conflict when the one before does not end soon, Interrupted."""
        turn, until = self._turns[verb], time.monotonic() + _PATIENCE
        while not turn.acquire(timeout=0.1):
            channel.say(f"waiting for another {verb}")
            if time.monotonic() > until:
                raise Conflict(
                    f"%container {verb}", "another one of this container is under way", "wait, and try again"
                )
        try:
            yield
        finally:
            turn.release()

    # What can be asked

    def do_status(self, brief: bool = False) -> dict[str, Any]:
        """This container: its image, what it uses, and, unless ``brief``, what changed since its last snapshot."""
        head = self._head()
        known = self.container.state
        usage = self.container.usage()
        found = {
            "id": self.container.id, "image": str(known["labels"].get("image", "")), "image_id": known["image"],
            "head": head["image"], "ref": head["ref"], "network": known["spec"]["network"],
            "limits": known["spec"]["limits"], "usage": asdict(usage) if usage else None,
            "watchers": self._watchers(),
        }  # fmt: skip
        if brief:
            return found
        turn = self._turns["snapshot"]
        if not turn.acquire(timeout=_IMPATIENCE):  # there is no telling yet
            return found | {"changes": None, "size": None, "disk": None}
        try:
            changes, size = self.bench.changed(self.container.id)
        finally:
            turn.release()
        before = sum(self.bench.store.layer_size(diff_id) for diff_id in head["layers"])
        return found | {"changes": changes, "size": size, "disk": before + size}

    def do_dashboard(self, model: str) -> bool:
        """Which widget shows the status."""
        if not re.fullmatch(r"[0-9a-f]{32}", model):
            raise InvalidInput("keep the ID of a widget", "it is none")
        self._dashboard = model
        return True

    def do_snapshot(
        self, channel: Channel, message: str = "", tag: str = "", author: str = "", dry_run: bool = False
    ) -> dict[str, Any]:
        """See ``history.snapshot.take``; a name that is another's is refused."""
        from workbench.jupyter import kernelspecs

        if tag:
            self._allow(tag)
        with self._turn(channel, "snapshot"):
            taken = self.bench.snapshot(
                self.container.id, message=message, author=author, name=tag, look_only=dry_run, meter=channel.meter
            )
        kernelspecs.offer(taken.ref, taken.image)
        if taken.image is not None and not dry_run:
            self._tell(IMAGE, name=taken.ref, image=taken.image.id, action="snapshot")
        return asdict(taken) | {"image": taken.image.id if taken.image else None, "paths": taken.paths[:_PATHS]}

    def do_log(self, image: str = "", number: int | None = None, stat: bool = False) -> list[dict[str, Any]]:
        """The history of one of its images; stat: with what each changed."""
        entries = list(islice(self.bench.history(self._own(image)), number))
        if not stat:
            return [asdict(entry) for entry in entries]
        brought = map(self.bench.brought, entries)
        return [
            asdict(entry) | {"changed": found and found.counts} for entry, found in zip(entries, brought, strict=True)
        ]

    def do_diff(self, one: str = "", other: str = "", files: bool = False) -> dict[str, Any]:
        """Between two of its images; by default from the parent of the last to it."""
        later = self._own(other)
        earlier = self._own(one) if one else self.bench.image(later).parent or later
        found = asdict(self.bench.diff(earlier, later))
        return found if files else found | {"files": [row | {"path": ""} for row in found["files"]]}

    def do_show(self, image: str = "") -> dict[str, Any]:
        """One of its images, and what it changed."""
        entry, found = self.bench.show(self._own(image))
        return asdict(entry) | {"diff": asdict(found) if found else None}

    def do_tag(self, name: str, image: str = "") -> str:
        """Another name for one of its images."""
        from workbench.jupyter import kernelspecs

        self._allow(name)
        made = self.bench.tag(name, self._own(image), force=True)
        kernelspecs.offer(name, made)
        self._tell(IMAGE, name=name, image=made.id, action="tagged")
        return f"{name} {made.id[7:19]}"

    def do_export(
        self, channel: Channel, image: str = "", along: dict[str, Any] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """The archive of one of its images, as a stream. along: notebooks, whose bytes follow: their sizes, by name."""
        own, text = self._named(image)
        sizes = along or {}
        if any(type(size) is not int or size < 0 for size in sizes.values()) or sum(sizes.values()) > _NOTEBOOKS:
            raise InvalidInput(f"export {text}", "the notebooks are too large to go along", "leave them out")
        data = {name: channel.body(size) for name, size in sizes.items()}
        for name in data:
            _check_notebook(text, name, data[name])
        with self._turn(channel, "export"), self.bench.store.staging() as staging:
            for name in data:
                (staging / name).write_bytes(data[name])
            files = [str(staging / name) for name in data]
            with self.bench.packed(text, along=files, meter=channel.meter, image=own) as path:
                digest = channel.stream(path, name=text)
        return {"name": text, "image": own, "sha256": digest}

    def do_freeze(self, channel: Channel, image: str = "", build: bool = True) -> dict[str, Any]:
        """The recipe of one of its images: texts, by file name. What is built for it gets no name."""
        from workbench.jupyter import guest_freeze

        own, text = self._named(image)
        if build and self.container.state["spec"]["network"] == "none":
            # Nothing inside may make the host ask for anything in its place.
            raise Conflict(
                f"freeze {text}", "a build fetches packages, and this container reaches nothing",
                "%container freeze --no-build",
            )  # fmt: skip
        with self._turn(channel, "freeze"):
            return guest_freeze.freeze(self.bench, channel, text, own, build=build)

    def do_branch(self, name: str = "", image: str = "") -> list[dict[str, Any]]:
        """Its own names, the one that its snapshots move marked; before that a new one, if ``name`` says so."""
        if name:
            self._allow(name)
            self.bench.branch(name, self._own(image))
        head, own = self._head(), {entry.id for entry in self._all()}
        return [
            {"name": row["name"], "image": row["image"], "current": self.container.id in row["containers"]}
            for row in self.bench.branches() if row["image"] in own or row["name"] == head["ref"]
        ]  # fmt: skip

    def do_checkout(self, image: str = "", create: str = "", force: bool = False) -> dict[str, Any]:
        """Another of its images, or a name for its last one. ``again`` follows where the kernel must be another."""
        self._own_revision(image)
        if create:
            self._allow(create)
        options: dict[str, Any] = {"create": create, "follow": self._is_mine(image)}
        target = self.bench.target(self.container.id, image, **options)
        act = partial(self.bench.checkout, self.container.id, image, force=force, **options)
        return self._begin(act, target.moved, "" if force else "%container checkout --force")

    def do_reset(self, image: str = "", hard: bool = False) -> dict[str, Any]:
        """Its last snapshot anew, or another of its images."""
        self._own_revision(image)
        act = partial(self.bench.reset, self.container.id, image, hard=hard)
        return self._begin(act, True, "" if hard else "%container reset --hard")

    def _begin(self, wish: Wish, moved: bool, how: str) -> dict[str, Any]:
        """Do at once what a running container allows, else wait for ``again``. how: what drops what would be lost."""
        if not moved:
            return asdict(wish()) | {"again": False}
        if how:
            self.bench.unsaved(self.container.id).refuse("change the environment", how)
        self._wish = wish
        return {"again": True}

    def do_again(self, reply: dict[str, Any] | None = None) -> bool:
        """Start the kernel anew in what was checked out; it answers the request ``reply`` in this one's place."""
        wish, self._wish = self._wish, None
        if wish is None:
            raise Conflict("start the kernel anew", "nothing was checked out", "see %container help")
        self._reply = reply or {}

        def again() -> None:
            try:
                done = wish()
                self.notice = f"now in {done.image[7:19]}" + (f" ({done.ref})" if done.ref else "")
            except WorkbenchError as error:  # it has changed since it was asked
                self.notice = str(error)

        self._restart(again)
        return True

    def do_hello(self) -> dict[str, Any]:
        """What a kernel that has just started is to say."""
        notice, reply = self.notice, self._reply
        self.notice, self._reply = "", {}
        return {"notice": notice, "reply": reply, "dashboard": self._dashboard}

    # What is its own

    def _head(self) -> dict[str, Any]:
        return self.container.head

    def _own(self, text: str) -> str:
        """The ID of an image that this container stands on or has made. Raises NotFound for any other."""
        head = str(self._head()["image"])
        if not text:
            return head
        with suppress(NotFound):  # whose word would name others
            found = self.bench.image(text).id
            if found in {entry.id for entry in self._all()}:
                return found
        raise NotFound(f"find the image {text}", "it is none that this container stands on", "see %container log")

    def _named(self, text: str) -> tuple[str, str]:
        """As ``_own``, and how it is called: as the text says, by default as its last snapshot."""
        own, head = self._own(text), self._head()
        named = head["ref"] if not text and head["ref"] and self.bench.refs.find(head["ref"]) == own else ""
        return own, text or named or own[7:19]

    def _own_revision(self, text: str) -> None:
        """As ``_own``; whatever begins with HEAD is its own."""
        if not text.startswith(("HEAD", "@")):
            self._own(text)

    def _is_mine(self, name: str) -> bool:
        """Whether its snapshots may move a name."""
        try:
            self._allow(name)
        except WorkbenchError:
            return False
        return True

    def _all(self) -> Iterator[Entry]:
        """The images that it stands on, or that were made of it."""
        for image in {self._head()["image"], *self._head()["made"]}:
            with suppress(NotFound):  # removed meanwhile
                yield from self.bench.history(image)

    def _allow(self, name: str) -> None:
        """Nothing inside moves a name that somebody else has given. Raises Conflict, InvalidInput."""
        from workbench.jupyter import kernelspecs

        named = self.bench.refs.find(name)
        own = set(self._head()["made"])
        spec = kernelspecs.kernel_name(name)
        taken = named not in {None, *own} or any(
            kernelspecs.kernel_name(other) == spec and image not in own
            for other, image in self.bench.refs.all().items()
        )
        if taken:
            raise Conflict(f"name an image {name}", "that name is another image's", "choose another name")


class _Notebook(msgspec.Struct):
    """What every notebook has (nbformat 4), as far as it is looked into."""

    cells: msgspec.Raw
    metadata: msgspec.Raw
    nbformat: int


def _check_notebook(text: str, name: str, data: bytes) -> None:
    """Whether something from inside may go along with an image. Raises InvalidInput."""
    from workbench.history import share

    share.check_notebook(text, name)
    try:
        found = msgspec.json.decode(data, type=_Notebook)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = None
    if found is None or not bytes(found.cells).startswith(b"["):
        raise InvalidInput(f"export {text}", f"{name} is no notebook", "save it and export again")
