"""Containers as their owner sees them: made, started, signalled, waited for, removed.

What they are stands on disk (``state.py``), so any process of the user can list, stop or remove one; only the
process that started one can wait for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from workbench.containers import state
from workbench.containers.client import Answer, HelperClient
from workbench.containers.spec import ContainerSpec
from workbench.linux import processes, userns
from workbench.linux.cgroup import Cgroup, Usage
from workbench.model import Conflict, Exit, HostLacks, InvalidInput, NotFound

T = TypeVar("T")


def new_id() -> str:
    """Twelve hexadecimal digits."""
    return os.urandom(6).hex()


class Container:
    """One container: a folder on disk, and a process while it runs."""

    def __init__(self, folder: str, helper: HelperClient, name: str = "", held: int = -1) -> None:
        self.folder = folder
        self.held = held  # the lock of its run folder
        self.id = name or os.path.basename(folder)
        self._helper = helper
        self.pid = -1
        self.pidfd = -1
        self.terminal = -1
        self.exited: Future[Exit] = Future()
        self._over = threading.Lock()
        self._run_dir = ""

    @property
    def run_dir(self) -> str:
        """The host's folder that is ``/run/workbench`` inside; only the user may enter it."""
        if not self._run_dir:
            self._run_dir = str(state.load(self.folder)["run_dir"])
        return self._run_dir

    @property
    def upper(self) -> str:
        """The host's folder with what was changed."""
        return os.path.join(state.tree(self.folder), "upper")

    @property
    def log(self) -> str:
        """The host's file with what the main process printed."""
        return os.path.join(self.folder, "log")

    @property
    def state(self) -> dict[str, Any]:
        """What is on disk, its ``status`` judged by the lock (a launcher that was killed left no word)."""
        known = state.load(self.folder)
        running = state.is_running(self.folder)
        if running:
            known["status"] = "running"
        elif known["status"] == "running":
            known |= state.KILLED_WITH_ITS_LAUNCHER
        return known

    def usage(self) -> Usage | None:
        """What it uses now, told by its control group where it has one, else by its processes; None when it ended."""
        if group := Cgroup.of(self.id):
            return group.usage()
        pid = self.state["pid"]
        return processes.usage(pid) if pid else None

    @property
    def head(self) -> dict[str, Any]:
        """Its last snapshot, see ``state.load_head``."""
        return state.load_head(self.folder)

    @property
    def images(self) -> set[str]:
        """The images that it needs: the one that it runs over, and its last snapshot."""
        return {self.image_id, str(self.head["image"])}

    @property
    def labels(self) -> dict[str, str]:
        """What its maker noted of it."""
        return dict(state.load(self.folder)["labels"])

    @property
    def image_id(self) -> str:
        """The image that it runs over."""
        return str(state.load(self.folder)["image"])

    def claim(self, spec: ContainerSpec, labels: Mapping[str, str]) -> None:
        """Take a stopped one for another run by this process, with the same writable layer.

        spec: as it is to be now, under its own id. Raises Conflict while it runs or somebody else starts it.
        """
        mine = replace(spec, id=self.id, hostname=self.id)
        self._run_dir, self.held = state.claim(self.folder, _me(), {"spec": mine.to_json(), "labels": dict(labels)})

    def start(self, stdio: Sequence[int] | None = None) -> Future[None]:
        """Start it, anew after an end with the same writable layer.

        stdio: descriptors for 0, 1, 2; without, nothing to read and the log to write. The future raises
        LaunchFailed. Costs 10 ms, more where the helper or the network library is not up yet.
        """
        started: Future[None] = Future()
        exited: Future[Exit] = Future()
        self.exited = exited

        def ended(end: Exit) -> None:
            self.kill()  # should it have outlived a helper that was killed
            self._end(exited, end)

        self._helper.on_exit(self.id, ended)
        answer = self._helper.request("start", stdio or (), folder=self.folder)

        def done(future: Future[Answer]) -> None:
            error = future.exception()
            if error is not None:
                self._helper.forget(self.id)
                started.set_exception(error)
                self._end(exited, Exit(126, str(error)))
                return
            value, fds = future.result()
            with self._over:
                for fd in (self.pidfd, self.terminal):  # of the run before
                    if fd >= 0:
                        os.close(fd)
                self.pid, self.pidfd = value["pid"], fds[0]
                self.terminal = fds[1] if len(fds) > 1 else -1
            started.set_result(None)

        answer.add_done_callback(done)
        return started

    @staticmethod
    def _end(exited: Future[Exit], end: Exit) -> None:
        if not exited.done():
            exited.set_result(end)

    def signal(self, number: int) -> None:
        """To the init, which hands it to the process group of its child (tini(1), ``-g``)."""
        with self._over, suppress(ProcessLookupError, OSError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End everything in it at once: the kernel kills the pid namespace with its init."""
        self.signal(signal.SIGKILL)
        self._let_die()

    def _let_die(self) -> None:
        """By cgroup v1 what is frozen does not die, and a guard may have been killed together with who started it."""
        with suppress(OSError, HostLacks):
            if group := Cgroup.of(self.id):
                group.thaw()

    def settle(self) -> bool:
        """After its end: True when it stays, stopped, with its changes; False when it is gone."""
        try:
            value, _ = self._helper.request("settle", folder=self.folder).result()
        except NotFound:
            return False
        finally:
            self._close()
        return bool(value["kept"])

    def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after ``timeout`` seconds, from whichever process; returns when it has ended."""
        pid = self.state.get("pid")
        if not pid:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if not state.is_running(self.folder):  # the number may be somebody else's by now
                return
            with suppress(FileNotFoundError):  # it has just ended and gone
                state.ask_to_stop(self.folder)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if not self._ended_within(timeout):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._let_die()
                if not self._ended_within(10.0):
                    raise Conflict(f"stop container {self.id}", "its helper process does not answer", "try again")
        finally:
            os.close(pidfd)

    def _ended_within(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        while state.is_running(self.folder):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def remove(self) -> None:
        """Remove it with its changes. Raises Conflict while it runs."""
        self._close()
        state.load(self.folder)
        userns.call("workbench.containers.launch:remove", self.folder)

    def _close(self) -> None:
        for name in ("pidfd", "terminal", "held"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


class Containers:
    """The containers below one folder."""

    def __init__(self, home: str) -> None:
        self.folder = os.path.join(home, "containers")
        self.helper = HelperClient()

    def create(
        self, spec: ContainerSpec, *, image: str, labels: Mapping[str, str] | None = None, folder: str | None = None
    ) -> Container:
        """Lay a container out on disk. folder: elsewhere than among the listed ones (a build's staging)."""
        folder = folder or os.path.join(self.folder, spec.id)
        os.makedirs(os.path.dirname(folder), 0o700, exist_ok=True)
        known = {
            "id": spec.id, "image": image, "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "created", "pid": None, "exit": None, "labels": dict(labels or {}), "spec": spec.to_json(),
            "maker": _me(),
        }  # fmt: skip
        held = state.lay_out(folder, known)
        return Container(folder, self.helper, spec.id, held)

    def run(self, spec: ContainerSpec, folder: str, stdio: Sequence[int] | None = None) -> Exit:
        """Start a container in a folder of the caller's and wait for its end.

        The folder stays for the caller, who may run another over the same writable layer. Ctrl-C kills the
        container and is raised again.
        """
        with _Interrupt() as interrupt:
            container = self.create(spec, image="", folder=folder)
            try:
                container.start(stdio).result()  # one that is under way cannot be called back
                try:
                    return interrupt.during(container.exited.result)
                except BaseException:
                    container.kill()
                    container.exited.result()
                    raise
            finally:
                state.remove_run_dir(container.run_dir)
                container._close()

    def __iter__(self) -> Iterator[Container]:
        """Each container, oldest name first; what is being removed or half made is passed over."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return
        for name in names:
            folder = os.path.join(self.folder, name)
            if not name.startswith(".") and os.path.exists(os.path.join(folder, state.STATE)):
                yield Container(folder, self.helper)

    def get(self, text: str) -> Container:
        """By id or a beginning of it that only one has. Raises NotFound, InvalidInput."""
        if not text:
            raise InvalidInput("find a container", "no id was given", "see `jupyter workbench ps --all`")
        found = [container for container in self if container.id.startswith(text)]
        if len(found) == 1:
            return found[0]
        obstacle = f"{len(found)} ids begin with {text}" if found else f"no container is called {text!r}"
        raise NotFound("find a container", obstacle, "see `jupyter workbench ps --all`")

    def sweep(self) -> list[str]:
        """Tidy up after launchers that were killed together with their helper; ids of what was found.

        Containers that were laid out and never started, or ended without a word, are settled; half made and half
        removed ones are removed.
        """
        swept = []
        state.sweep_run_dirs(state.run_base())
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        for name in names:
            folder = os.path.join(self.folder, name)
            if name.startswith(".gone-"):
                userns.call("workbench.containers.launch:bury", folder, name.removeprefix(".gone-"))
            elif self._is_orphan(folder):
                userns.call("workbench.containers.launch:bury", folder, name)
            else:
                continue
            swept.append(name)
        return swept

    @staticmethod
    def _is_orphan(folder: str) -> bool:
        if state.is_running(folder):
            return False
        try:
            known = state.load(folder)
        except NotFound:
            return state.is_abandoned(folder)
        # One that was settled has no maker any more; others wait for theirs, as long as that lives.
        return bool(known.get("maker")) and not _alive(known["maker"])

    def close(self) -> None:
        """End the helper, and with it what it runs."""
        self.helper.close()


class _Interrupt:
    """Ctrl-C raises KeyboardInterrupt once and in ``during`` only; at the end, where it came outside of that.

    People press it twice, and a process whose parent dies with several threads gets PR_SET_PDEATHSIG once for
    each: what tidies up after the first must not be torn by the second.
    """

    def __init__(self) -> None:
        self._came = self._raised = self._armed = False
        self._mine = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )

    def _handle(self, *_: object) -> None:
        self._came = True
        self._raise_if_armed()

    def _raise_if_armed(self) -> None:
        if self._armed and self._came:
            self._armed = False
            self._raised = True
            raise KeyboardInterrupt

    def during(self, wait: Callable[[], T]) -> T:
        """What ``wait`` returns. Raises KeyboardInterrupt."""
        self._armed = True
        try:
            self._raise_if_armed()
            return wait()
        finally:
            self._armed = False

    def __enter__(self) -> _Interrupt:
        if self._mine:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._came and not self._raised and kind is None:
            raise KeyboardInterrupt


def _me() -> list[int]:
    return [os.getpid(), start_time(os.getpid())]


def _alive(maker: Any) -> bool:
    """Whether the process (pid, start time) of a state file still runs (proc_pid_stat(5), field 22)."""
    try:
        return bool(maker) and start_time(int(maker[0])) == int(maker[1])
    except (OSError, ValueError, IndexError):
        return False


def start_time(pid: int) -> int:
    """When a process began, in clock ticks after boot."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])
