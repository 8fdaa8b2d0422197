"""A container on disk: its folder, what it is, how it ended, and whether it changed anything.

::

    containers/<id>/state.json      what it is and how it ended; replaced, never edited
                    lock            held (flock(2)) by the helper while it runs
                    log             what its main process wrote outside of the protocol
                    stop            there when its owner stopped it, until it is started again
                    writable/       upper/ and work/ of the overlay: the working tree, and with it
                        head.json   the last snapshot taken of it; index-*.json: what that holds

Another environment is checked out by making a ``writable-2/`` beside it, which ``state.json`` then names.

Sockets and connection file are in a folder of their own (``run_dir``), at /run/workbench inside: its path is short
(``sun_path`` holds 108 bytes, unix(7)) and says nothing about where the user keeps things, for mountinfo shows it.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from workbench.linux import trees
from workbench.model import NOT_ENVIRONMENT, Conflict, Exit, NotFound, Running

STATE = "state.json"
STOP = "stop"
HEAD = "head.json"
TREE = "writable"
#: What is known of the end of a container that nobody saw.
KILLED_WITH_ITS_LAUNCHER = {"status": "exited", "pid": None, "exit": asdict(Exit(137, "killed with its launcher"))}


def lay_out(folder: str, state: dict[str, Any]) -> int:
    """Make a container's folder, or use one that is there; it counts once its state is written.

    Returns a descriptor that holds its run folder for as long as it is open.
    """
    state["run_dir"], held = make_run_dir(state["id"])
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        make_tree(os.path.join(folder, TREE))
        save(folder, state)
    except BaseException:
        os.close(held)
        remove_run_dir(state["run_dir"])
        raise
    return held


def make_tree(path: str) -> None:
    """An empty writable layer, or the one that is there."""
    for name in ("", "upper", "work"):
        with suppress(FileExistsError):
            os.mkdir(os.path.join(path, name), 0o700)
    os.chmod(os.path.join(path, "upper"), 0o755)  # its mode becomes that of /


def tree(folder: str, known: Mapping[str, Any] | None = None) -> str:
    """The writable layer of a container: a folder with ``upper`` and ``work``. known: its state, if that is at hand."""
    return os.path.join(folder, str((known or load(folder)).get("tree", TREE)))


def is_abandoned(folder: str) -> bool:
    """Whether a folder without a state is half made by somebody who is gone.

    Its maker holds a run folder from before the first mkdir, and one that nobody holds is swept first. The two
    seconds are for a maker whose environment puts run folders elsewhere.
    """
    try:
        age = time.time() - os.stat(folder).st_mtime
    except FileNotFoundError:
        return False
    held = any(os.path.exists(os.path.join(base, os.path.basename(folder))) for base in run_bases())
    return not held and age > 2


def load(folder: str) -> dict[str, Any]:
    """What is known of a container. Raises NotFound."""
    try:
        with open(os.path.join(folder, STATE)) as file:
            return dict(json.load(file))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise NotFound(
            "look at a container", f"{os.path.basename(folder)} is not there", "see `jupyter workbench ps --all`"
        ) from None


def save(folder: str, state: dict[str, Any], *, durable: bool = False) -> None:
    """Replace the state; ``durable`` waits for the disk (fsync(2))."""
    _replace(os.path.join(folder, STATE), state, durable)


def _replace(path: str, value: dict[str, Any], durable: bool) -> None:
    new = f"{path}.{os.getpid()}"
    with open(new, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(json.dumps(value))  # all at once: dump() is slower
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(new, path)


def hold(folder: str) -> int:
    """Take the lock of a container; a descriptor that holds it. Raises Running."""
    fd = os.open(os.path.join(folder, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Running(f"use container {os.path.basename(folder)}", "it is running", "stop it first") from None
    return fd


def ask_to_stop(folder: str) -> None:
    """Put on record that its end is its owner's wish, for whoever would start it again otherwise."""
    os.close(os.open(os.path.join(folder, STOP), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def was_asked_to_stop(folder: str) -> bool:
    """Whether ``ask_to_stop`` was called since its start."""
    return os.path.exists(os.path.join(folder, STOP))


def forget_the_wish_to_stop(folder: str) -> None:
    """It is started again."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, STOP))


def is_running(folder: str) -> bool:
    """Whether a helper holds its lock."""
    try:
        fd = os.open(os.path.join(folder, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def settle(folder: str) -> bool:
    """After the end of a container: True when its changes stay as a stopped container, False when it is gone.

    Runs in B, where a container's files can be read whoever owns them.
    """
    state = load(folder)
    upper = os.path.join(tree(folder, state), "upper")
    if not has_changes(upper, state["spec"]["layers"]):
        remove(folder)
        return False
    trees.remove(os.path.join(upper, "tmp"))
    remove_run_dir(state["run_dir"])
    save(folder, state | {"status": "exited", "maker": None}, durable=True)
    return True


def claim(folder: str, maker: list[int], now: dict[str, Any]) -> tuple[str, int]:
    """Take a stopped container for another run: its new run folder, and a descriptor that holds that.

    maker: pid and start time of the process that has it from now on; now: what else is other. Raises Conflict while it
    runs, or when somebody else is at it.
    """
    held = hold(folder)
    try:
        known = load(folder)
        if known.get("maker") not in (None, maker):
            raise Conflict(f"use container {known['id']}", "another process is starting it", "try again")
        run_dir, fd = make_run_dir(known["id"])
        save(folder, known | now | {
            "status": "created", "run_dir": run_dir, "maker": maker, "exit": None, "pid": None,
        })  # fmt: skip
        return run_dir, fd
    finally:
        os.close(held)


def remove(folder: str) -> None:
    """Remove a container's folder; the name goes first, so that nobody sees half of one."""
    with suppress(NotFound):
        remove_run_dir(load(folder)["run_dir"])
    doomed = os.path.join(os.path.dirname(folder), f".gone-{os.path.basename(folder)}")
    with suppress(FileNotFoundError):
        os.rename(folder, doomed)
        trees.remove(doomed)


def run_bases() -> list[str]:
    """Where run folders of anybody can be, whatever each one's environment said."""
    return [
        "/run/workbench",
        *(path for path in glob.glob("/tmp/workbench-*") if path[15:].isdigit()),
    ]


def run_base() -> str:
    """Where run folders are: root's /run/workbench, the user's runtime folder (XDG), else one below /tmp."""
    uid = os.getuid()
    if uid == 0:
        return "/run/workbench"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == uid and len(runtime) < 60:
        return os.path.join(runtime, "workbench")
    return f"/tmp/workbench-{uid}"


def _check_own(base: str) -> None:
    """Raises Conflict when somebody else has taken the name below /tmp; FileNotFoundError."""
    found = os.lstat(base)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Conflict("make a folder for sockets", f"{base} is not this user's own", f"remove {base}")


def make_run_dir(name: str) -> tuple[str, int]:
    """A container's folder for sockets, open to its user only; and a descriptor whose lock says that it is in use.

    Raises Conflict when somebody else has taken the name below /tmp.
    """
    base = run_base()
    path = os.path.join(base, name)
    while True:
        try:
            with suppress(FileExistsError):
                os.mkdir(base, 0o700)
            _check_own(base)
            os.mkdir(path, 0o700)
            os.mkdir(os.path.join(path, "host"), 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the last container that ended took it along, or a sweep was quicker than the lock
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.exists(path):
            return path, fd
        os.close(fd)


def sweep_run_dirs(base: str) -> None:
    """Remove run folders that no process holds: their launchers were killed. base: as by ``run_base``.

    Raises Conflict when that is somebody else's, who may have made it a link to what is this user's.
    """
    try:
        _check_own(base)
        names = os.listdir(base)
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(base, name)
        if len(name) != 12:
            continue
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                trees.remove(path)
            finally:
                os.close(fd)
    with suppress(OSError):
        os.rmdir(base)


def remove_run_dir(run_dir: str) -> None:
    """Remove a run folder, and with the last one the folder above."""
    trees.remove(run_dir)
    with suppress(OSError):
        os.rmdir(os.path.dirname(run_dir))


def load_head(folder: str) -> dict[str, Any]:
    """The last snapshot: ``image``, ``ref``, ``layers`` (of its snapshots, the oldest first) and the ``index``'s name.

    ``made``: the snapshots that were ever taken of this container. ``untold``, where it stands: the number of changes
    of one whose name was perhaps not moved. Before the first the image that it runs over, and no index.
    """
    known = load(folder)
    empty = {"image": known["image"], "ref": "", "layers": [], "index": "", "made": []}
    try:
        with open(os.path.join(tree(folder, known), HEAD)) as file:
            found: dict[str, Any] = json.load(file)
            return empty | found
    except FileNotFoundError:
        return empty


def save_head(tree: str, head: dict[str, Any], *, durable: bool = True) -> None:
    """Replace that of a writable layer; an index that it no longer names goes.

    ``durable`` waits for the disk (fsync(2)).
    """
    _replace(os.path.join(tree, HEAD), head, durable)
    for path in glob.glob(os.path.join(glob.escape(tree), "index-*.json")):
        if os.path.basename(path) != head["index"]:
            os.unlink(path)


def has_changes(upper: str, layers: Iterable[str]) -> bool:
    """Whether a writable layer holds something that belongs to the environment (``model.NOT_ENVIRONMENT``).

    layers: the folders below it. A folder counts when it is new and empty: what is in others speaks for itself.
    """
    below = list(layers)
    pending = [""]
    while pending:
        path = pending.pop()
        try:
            children = list(os.scandir(os.path.join(upper, path)))
        except OSError:  # too deep a path to be looked at is nobody's default
            return True
        if path and not children and _is_new(path, below):
            return True
        for entry in children:
            inside = os.path.join(path, entry.name)
            if any(f"{inside}/".startswith(rule) or inside == rule for rule in NOT_ENVIRONMENT):
                continue
            if not entry.is_dir(follow_symlinks=False):
                return True
            pending.append(inside)
    return False


def _is_new(folder: str, below: Iterable[str]) -> bool:
    """Whether an empty folder is in no layer, and is not one that only leads to what does not count."""
    leads = any(rule.startswith(folder + "/") for rule in NOT_ENVIRONMENT)
    return not leads and not any(os.path.lexists(os.path.join(layer, folder)) for layer in below)
