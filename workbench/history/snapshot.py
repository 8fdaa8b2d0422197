"""A container's writable layer becomes an image: with a message, an author and a parent, as a commit has them.

Order: the tar, the image, then the container's own note of it (its *head*), the ref last. Killed before the note, the
container goes on from where it was, and what nobody was told of goes with the next gc. Killed after it, the next
snapshot finds nothing new, knows from the note that the last one was not told of, and tells it as its own.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from workbench.containers import pause, state
from workbench.containers.container import Container
from workbench.history import capture, log, machine
from workbench.images import config
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.linux import userns
from workbench.model import CREDENTIALS, NOT_ENVIRONMENT, Conflict, Image, InvalidInput, Meter, NotFound

_LONGEST = 64 << 10  # characters of a message
RULES = (*NOT_ENVIRONMENT, *CREDENTIALS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was taken. image: None when nothing had changed, or for a look only; ref: the name that points at it now.

    changes: number of files and folders; paths: up to 50,000 of them; skipped: what a rule left out; size: bytes
    of the layer as a tar; paused: seconds that the container stood still.
    """

    image: Image | None
    parent: str
    ref: str
    changes: int
    size: int
    paused: float
    paths: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def take(
    store: Store, refs: Refs, container: Container, *, message: str, author: str = "", name: str = "",
    when: int | None = None, look_only: bool = False, force: bool = False, meter: Meter | None = None,
) -> Snapshot:  # fmt: skip
    """Take one of a container, running or not; it goes on, over the same layers.

    author: ``Name <address>``, by default Git's (``default_author``); name: the ref to point at it from now on, by
    default the one that its last snapshot has; when: seconds since 1970, by default now; look_only: only say what
    would be taken; meter: may end it until the image is made. Raises Conflict when the container ends meanwhile, and
    when the ref has gone elsewhere, unless ``force``; InvalidInput, NotFound, HostLacks without space.
    """
    tried = f"take a snapshot of container {container.id}"
    author, message = _checked(author or default_author(), message if not look_only else message or "look")
    with alone(container, meter), store.staging() as staging:
        known, head = container.state, state.load_head(container.folder)
        ref = name or head["ref"] or _own_name(known, refs)
        parent = store.image(head["image"])
        refs.find(ref)  # a name that cannot be one is said before the work
        with store.lease(parent.id):
            out, index = str(staging / "layer.tar"), str(staging / "index.json")
            try:
                found = _captured(store, container, known, head, out, index, meter)
            except FileNotFoundError:
                raise Conflict(tried, "it has ended meanwhile", "see `jupyter workbench ps --all`") from None
            result = Snapshot(
                None, parent.id, ref, found["changes"], found["size"], found["paused"], found["paths"],
                found["skipped"],
            )  # fmt: skip
            untold = head.get("untold", 0)
            if look_only or not (found["changes"] or untold):
                return result
            layers = head["layers"]
            if meter is not None:  # the last time: what follows is short
                meter("keeping what changed", found["size"], found["size"])
            if found["changes"]:
                store.adopt_tar(out, found["diff_id"], found["size"])
                layers = [*layers, found["diff_id"]]
            else:
                parent = store.image(parent.parent)
                size = store.layer_size(layers[-1])
                result = replace(result, parent=parent.id, changes=untold, size=size)
            image = store.add_image(_config(store, parent, layers[-1], message, author, when))
            if not (force or (untold and refs.find(ref) == head["image"])):
                _check_forward(store, refs, ref, image)
            kept, tree = f"index-{image.id[7:19]}.json", state.tree(container.folder)
            os.replace(index, os.path.join(tree, kept))
            made = [*head["made"], image.id]
            new = {"image": image.id, "ref": ref, "layers": layers, "index": kept, "made": made}
            state.save_head(tree, new | {"untold": result.changes})
            refs.set(ref, image.id, f"snapshot: {message.splitlines()[0]}")
            state.save_head(tree, new, durable=False)
    return replace(result, image=image)


def _check_forward(store: Store, refs: Refs, ref: str, image: Image) -> None:
    """A name moves on along its own history, as a branch of Git's does when it is pushed. Raises Conflict."""
    known = refs.find(ref)
    if known is None:
        return
    if known not in (each.id for each in log.chain(store, image)):
        raise Conflict(
            f"move {ref} to the snapshot", f"it stands at {known[7:19]}, which this container does not come from",
            "give another name with -t NAME",
        )  # fmt: skip


def look(store: Store, container: Container) -> dict[str, int]:
    """How much a snapshot would take: ``changes`` (files and folders) and ``size`` (bytes of the files).

    Nothing stands still and nothing is written, so that it may be asked every few seconds. Raises OSError where
    files go while they are looked at, NotFound when the container goes.
    """
    with alone(container):
        known, head = container.state, state.load_head(container.folder)
        old, tars = _before(store, container, head)
        found: dict[str, int] = userns.call(
            "workbench.history.capture:look", container.upper, list(known["spec"]["layers"]), old, list(RULES), tars
        )
    return found


def _before(store: Store, container: Container, head: dict[str, Any]) -> tuple[str, list[str]]:
    """The index of the last snapshot, or "", and the tars of all of them."""
    index = os.path.join(state.tree(container.folder), head["index"]) if head["index"] else ""
    return index, [store.tar(diff_id) or "" for diff_id in head["layers"]]


def _captured(
    store: Store, container: Container, known: dict[str, Any], head: dict[str, Any], out: str, index: str,
    meter: Meter | None,
) -> dict[str, Any]:  # fmt: skip
    """See ``capture.capture``; a container that does not run is kept from being started meanwhile."""
    running = known["status"] == "running"
    old, tars = _before(store, container, head)
    with pause.guard(container.id, known["pid"]) if running else _kept_still(container) as guard:
        found: dict[str, Any] = userns.call(
            "workbench.history.capture:capture", container.upper, list(known["spec"]["layers"]), out, old, index,
            list(RULES), guard, tars, fds=(guard,) if running else (), apart=True,
            meanwhile=meter and (lambda: meter("reading what changed", *capture.progress(out))),
        )  # fmt: skip
    return found


@contextmanager
def _kept_still(container: Container) -> Iterator[int]:
    """Nobody starts it meanwhile."""
    held = state.hold(container.folder)
    try:
        yield -1
    finally:
        os.close(held)


@contextmanager
def alone(container: Container, meter: Meter | None = None) -> Iterator[None]:
    """One snapshot of a container at a time; the second waits, and finds what is new since the first."""
    try:
        fd = os.open(container.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound("take a snapshot", f"container {container.id} is gone", "") from None
    try:
        while meter is not None and not _locked(fd):
            meter("waiting for another snapshot", 0, 0)
            time.sleep(0.1)
        if meter is None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _config(store: Store, parent: Image, diff_id: str, message: str, author: str, when: int | None) -> bytes:
    created = datetime.fromtimestamp(int(time.time()) if when is None else when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = dict(parent.labels) | {machine.LABEL: json.dumps(machine.facts(), sort_keys=True)}
    entry = {"created": created, "created_by": "workbench: snapshot", "author": author, "comment": message}
    return config.encode(
        diff_ids=[*parent.diff_ids, diff_id], env=parent.env, cmd=parent.cmd, working_dir=parent.working_dir,
        kernel=parent.kernel, limits=parent.limits, network=parent.network, parent=parent.id, created=created,
        labels=labels, history=[*store.history(parent.id), entry],
    )  # fmt: skip


def _checked(author: str, message: str) -> tuple[str, str]:
    """Both as they are kept. Raises InvalidInput."""
    message = message.strip()
    if not message:
        raise InvalidInput("take a snapshot", "it has no message", 'say what changed with -m "…"')
    if len(message) > _LONGEST or "\0" in message + author or "\n" in author:
        raise InvalidInput("take a snapshot", "the message is too long, or holds what is no text", "shorten it")
    return author.strip(), message


def _own_name(known: dict[str, Any], refs: Refs) -> str:
    """A name for the first snapshot that was given none: nothing that was acknowledged may be lost."""
    label = str(known["labels"].get("image", "")).partition(":")[0]
    base = "snapshot" if not label or label.startswith("sha256") else label
    short = f"{base}-{known['id'][:4]}"
    return short if refs.find(short) is None else f"{base}-{known['id']}"


def default_author() -> str:
    """Git's ``user.name`` and ``user.email`` where it has them (git-config(1)), else the name of the account."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):
        account = f"uid {os.getuid()}"
    if shutil.which("git") is None:
        return account

    def said(key: str) -> str:
        done = subprocess.run(["git", "config", "--get", key], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name, address = said("user.name"), said("user.email")
    return f"{name or account} <{address}>" if address else name or account
