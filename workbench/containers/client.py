"""The launching process's end of the helper: requests go out, answers and exits come back as futures.

One reader thread a helper; a future can be waited for from any thread or wrapped for asyncio.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from workbench.containers import state
from workbench.linux import userns
from workbench.model import Exit, LaunchFailed, WorkbenchError

Answer = tuple[dict[str, Any], list[int]]


class HelperClient:
    """Starts a helper when first needed, and again should it have been killed.

    fork: make the first one a copy of this process, which must have one thread when it is first needed.
    """

    def __init__(self, *, fork: bool = False) -> None:
        self._fork = fork
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: userns.Process | None = None
        self._pid_of_owner = 0
        self._waiting: dict[int, Future[Answer]] = {}
        self._exits: dict[str, Callable[[Exit], None]] = {}
        self._next = 0

    def request(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> Future[Answer]:
        """Send a request; the future holds (value, descriptors) or the WorkbenchError."""
        future: Future[Answer] = Future()
        with self._lock:
            self._ensure()
            assert self._socket is not None
            self._next += 1
            number = self._next
            self._waiting[number] = future
            try:
                message = json.dumps({"id": number, "op": op, **arguments}).encode()
                socket.send_fds(self._socket, [message], list(fds))
            except OSError as error:
                self._waiting.pop(number, None)
                future.set_exception(LaunchFailed(op, f"the helper process is gone ({error})", "try again"))
        return future

    def on_exit(self, container: str, tell: Callable[[Exit], None]) -> None:
        """Call ``tell`` once, from the reader thread, when the container ends (or the helper does)."""
        self._exits[container] = tell

    def forget(self, container: str) -> None:
        """It never started."""
        self._exits.pop(container, None)

    def _ensure(self) -> None:
        if self._socket is not None and self._pid_of_owner == os.getpid():
            return
        ids = userns.host_ids()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = userns.spawn(
                    "workbench.containers.helper:main",
                    (theirs.fileno(),),
                    [str(theirs.fileno()), json.dumps(asdict(ids)), state.run_base()],
                    fork=self._fork,
                )
                self._fork = False
            except BaseException:
                ours.close()
                raise
        self._socket, self._pid_of_owner = ours, os.getpid()
        threading.Thread(target=self._read, args=(ours, self._process), name="workbench-helper", daemon=True).start()

    def _read(self, ours: socket.socket, process: userns.Process) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(ours, 1 << 16, 8)
            except OSError:
                break
            if not data:
                break
            message = json.loads(data)
            if message.get("event") == "exited":
                tell = self._exits.pop(message["container"], None)
                if tell:
                    tell(Exit(**message["exit"]))
                continue
            with self._lock:
                future = self._waiting.pop(message["id"], None)
            if future is None:
                continue
            if "error" in message:
                future.set_exception(WorkbenchError.from_dict(message))
            else:
                future.set_result((message["value"], fds))
        process.wait()
        self._gone(ours)

    def _gone(self, ours: socket.socket) -> None:
        """The helper ended; its containers died with it (PR_SET_PDEATHSIG)."""
        with self._lock:
            if self._socket is ours:
                self._socket = None
            waiting, self._waiting = self._waiting, {}
            exits, self._exits = self._exits, {}
        with suppress(OSError):
            ours.close()
        for future in waiting.values():
            future.set_exception(LaunchFailed("start a container", "the helper process was killed", "try again"))
        for tell in exits.values():
            tell(Exit(137, "killed with its helper process"))

    def close(self) -> None:
        """End the helper and with it its containers; returns when it has tidied up."""
        with self._lock:
            ours, process = self._socket, self._process
        if ours is None or process is None or self._pid_of_owner != os.getpid():
            return
        with suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        process.wait()
