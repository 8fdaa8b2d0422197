"""What the code in one container may ask of the process that launched it, over a socket in its run folder.

It can do what concerns its own container and the images that came of it, and nothing else. Whatever arrives is data:
a request is one line of JSON of a few known keys, bounded in size, one at a time, and not too many in a second. The
socket's name can be taken away from inside, which harms nobody else.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.jupyter.events import IMAGE, Tell, nobody
from workbench.linux.sockets import bind_private
from workbench.model import Conflict, InvalidInput, NotFound, WorkbenchError

if TYPE_CHECKING:
    from workbench.containers.container import Container
    from workbench.history.log import Entry
    from workbench.history_face import Checkout
    from workbench.workbench import Workbench

#: In the run folder; inside it is /run/workbench/api.
NAME = "api"
_REQUEST = 128 << 10  # bytes
_TIMEOUT = 10.0  # seconds for a request to arrive, and for an answer to be taken
_RATE = 2.0  # requests in a second, in the long run: each costs the host a tenth of one
_BURST = 20.0  # requests that may come at once
_PATHS = 1000

_KNOWN: dict[str, dict[str, type]] = {
    "status": {"brief": bool}, "dashboard": {"model": str},
    "snapshot": {"message": str, "tag": str, "author": str, "dry_run": bool},
    "log": {"image": str, "number": int}, "diff": {"one": str, "other": str, "files": bool},
    "show": {"image": str}, "tag": {"name": str, "image": str}, "branch": {"name": str, "image": str},
    "checkout": {"image": str, "create": str, "force": bool}, "reset": {"image": str, "hard": bool},
    "again": {"reply": dict}, "hello": {},
}  # fmt: skip


#: Puts another environment in the place of a container's. Raises Conflict while it runs, and the other named errors.
Wish = Callable[[], "Checkout"]


class GuestApi:
    """Serves one container from ``start`` to ``close``, through restarts of its kernel."""

    def __init__(
        self, bench: Workbench, container: Container, restart: Callable[[Callable[[], None]], None], tell: Tell = nobody
    ) -> None:
        """restart: ends the kernel, calls what it is given and starts it anew; returns at once."""
        self.bench, self.container, self._restart, self._tell = bench, container, restart, tell
        self._wish: Wish | None = None
        #: What the next kernel is to say first, and the request that it answers for the one before.
        self.notice = ""
        self._reply: dict[str, Any] = {}
        #: The widget that shows the status, which the next kernel makes anew.
        self._dashboard = ""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._budget, self._then = _BURST, time.monotonic()

    def start(self) -> None:
        """Listen; before the container starts, so that the socket becomes its root's. Raises OSError."""
        bind_private(self._listener, os.path.join(self.container.run_dir, NAME))
        self._listener.listen(4)
        threading.Thread(target=self._serve, name=f"workbench-guest-{self.container.id}", daemon=True).start()

    def close(self) -> None:
        """Stop listening; what is being done is done to its end."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            with channel, suppress(OSError):
                channel.settimeout(_TIMEOUT)
                self._wait_for_budget()
                answer = self._answer(_line(channel))
                channel.sendall(json.dumps(answer).encode() + b"\n")

    def _wait_for_budget(self) -> None:
        now = time.monotonic()
        self._budget = min(_BURST, self._budget + (now - self._then) * _RATE) - 1
        self._then = now
        if self._budget < 0:
            time.sleep(-self._budget / _RATE)

    def _answer(self, data: bytes) -> dict[str, Any]:
        try:
            request = _checked(data)
            return {"value": getattr(self, f"do_{request.pop('do')}")(**request)}
        except WorkbenchError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"{error.strerror or error}"}
        except Exception:  # the next request is answered all the same
            self.bench.log.exception("%%container of container %s", self.container.id)
            return {"error": "the launcher of this kernel could not do that; its log says why"}

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
        }  # fmt: skip
        if brief:
            return found
        taken = self.bench.snapshot(self.container.id, message="", look_only=True)
        before = sum(self.bench.store.layer_size(diff_id) for diff_id in head["layers"])
        size = taken.size if taken.changes else 0
        return found | {"changes": taken.changes, "size": size, "disk": before + size}

    def do_dashboard(self, model: str) -> bool:
        """Which widget shows the status."""
        if not re.fullmatch(r"[0-9a-f]{32}", model):
            raise InvalidInput("keep the ID of a widget", "it is none")
        self._dashboard = model
        return True

    def do_snapshot(self, message: str = "", tag: str = "", author: str = "", dry_run: bool = False) -> dict[str, Any]:
        """See ``history.snapshot.take``; a name that is another's is refused."""
        from workbench.jupyter import kernelspecs

        if tag:
            self._allow(tag)
        taken = self.bench.snapshot(self.container.id, message=message, author=author, name=tag, look_only=dry_run)
        kernelspecs.offer(taken.ref, taken.image)
        if taken.image is not None and not dry_run:
            self._tell(IMAGE, name=taken.ref, image=taken.image.id, action="snapshot")
        return asdict(taken) | {"image": taken.image.id if taken.image else None, "paths": taken.paths[:_PATHS]}

    def do_log(self, image: str = "", number: int | None = None) -> list[dict[str, Any]]:
        """The history of one of its images."""
        entries = [asdict(entry) for entry in self.bench.history(self._own(image))]
        return entries[:number]

    def do_diff(self, one: str = "", other: str = "", files: bool = False) -> dict[str, Any]:
        """Between two of its images; by default from the parent of the last to it."""
        later = self._own(other)
        earlier = self._own(one) if one else self.bench.image(later).parent or later
        found = asdict(self.bench.diff(earlier, later))
        return found if files else found | {"files": [row | {"path": ""} for row in found["files"]]}

    def do_show(self, image: str = "") -> dict[str, Any]:
        """One of its images, and what it changed."""
        own = self._own(image)
        entry = next(iter(self.bench.history(own)))
        found = asdict(self.bench.diff(entry.parent, own)) if entry.parent else None
        return asdict(entry) | {"diff": found}

    def do_tag(self, name: str, image: str = "") -> str:
        """Another name for one of its images."""
        from workbench.jupyter import kernelspecs

        self._allow(name)
        made = self.bench.tag(name, self._own(image), force=True)
        kernelspecs.offer(name, made)
        self._tell(IMAGE, name=name, image=made.id, action="tagged")
        return f"{name} {made.id[7:19]}"

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


def _line(channel: socket.socket) -> bytes:
    """One line. Raises OSError when it does not arrive whole in time."""
    data = b""
    until = time.monotonic() + _TIMEOUT
    while not data.endswith(b"\n"):
        channel.settimeout(max(0.01, until - time.monotonic()))
        piece = channel.recv(1 << 16)
        if not piece:
            raise ConnectionError("it has gone")
        data += piece
        if len(data) > _REQUEST:
            return b""
    return data


def _checked(data: bytes) -> dict[str, Any]:
    """A request of known keys. Raises InvalidInput."""
    tried = "answer %container"
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput(tried, "the request is no line of JSON, or too long") from None
    if not isinstance(request, dict) or not isinstance(request.get("do"), str) or request["do"] not in _KNOWN:
        raise InvalidInput(tried, "it asks for nothing that is known here")
    known: Mapping[str, type] = _KNOWN[request["do"]]
    for key, value in request.items():
        if key != "do" and (key not in known or type(value) is not known[key]):
            raise InvalidInput(tried, f"{key[:40]!r} is not understood")
    if request["do"] == "tag" and not request.get("name"):
        raise InvalidInput(tried, "no name is given")
    if request.get("number", 0) < 0:
        raise InvalidInput(tried, "a number is negative")
    return request
