"""The helper: one trusted process for each process that launches, the parent of its containers.

It is root in the user namespace B (``linux/userns.py``), has one thread, and holds nothing that is not on disk.
When its client goes, however it goes, the socket between them ends and the helper ends its containers, tidies up
and follows. Messages are JSON over SOCK_SEQPACKET (unix(7)), descriptors ride along.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from workbench.containers import launch, state
from workbench.linux import mounts
from workbench.linux.userns import HostIds
from workbench.model import Exit, WorkbenchError

MESSAGE = 1 << 16
DESCRIPTORS = 8


class Helper:
    """Serves one client until it is gone."""

    def __init__(self, client: socket.socket, ids: HostIds, run_base: str) -> None:
        self.client = client
        self.run_base = run_base
        self.launcher = launch.Launcher(ids)
        self.running: dict[int, launch.Running] = {}  # by pidfd
        self.unsettled: dict[str, None] = {}  # folders of what was started, in order
        self.poll = select.poll()
        self.poll.register(client, select.POLLIN)

    def serve(self) -> None:
        """Answer requests and tell of exits until the client's end is closed; then end everything."""
        try:
            while True:
                for fd, _ in self.poll.poll():
                    if fd != self.client.fileno():
                        self.ended(fd)
                    elif not self.request():
                        return
        finally:
            self.close()

    def request(self) -> bool:
        """One request; False at the end of file."""
        try:
            data, fds, _, _ = socket.recv_fds(self.client, MESSAGE, DESCRIPTORS)
        except ConnectionError:
            return False
        if not data:
            return False
        message = json.loads(data)
        answer: dict[str, Any] = {"id": message["id"]}
        back: list[int] = []
        try:
            answer["value"], back = getattr(self, "do_" + message["op"])(message, fds)
        except WorkbenchError as error:
            answer |= error.as_dict()
        except Exception as error:  # whatever one container brings up, the others go on
            obstacle = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            answer |= {"error": "LaunchFailed", "tried": message["op"], "obstacle": obstacle, "remedy": ""}
        finally:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
        self.send(answer, back)
        return True

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """To the client, if it is still there."""
        with suppress(OSError):
            socket.send_fds(self.client, [json.dumps(message).encode()], fds or [])

    def do_start(self, message: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Start the container whose folder is named; answers its pid, its pidfd and its terminal, if it has one.

        fds: its standard streams; without, nothing to read and its log to write.
        """
        self.unsettled[message["folder"]] = None
        if not fds:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            log = mounts.open_in(message["folder"], "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            fds += [null, log]
        running = self.launcher.start(message["folder"], fds if len(fds) > 2 else (fds[0], fds[1], fds[1]))
        self.running[running.pidfd] = running
        self.poll.register(running.pidfd, select.POLLIN)
        back = [running.pidfd] + ([running.terminal] if running.terminal >= 0 else [])
        return {"pid": running.pid}, back

    def do_settle(self, message: dict[str, Any], _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """After the end: keep what was changed, remove what was not."""
        self.unsettled.pop(message["folder"], None)
        return {"kept": launch.settle(message["folder"])}, []

    def do_warm(self, message: dict[str, Any], _fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Do ahead of time what every launch needs."""
        self.launcher.warm(message.get("network", "none"))
        return {}, []

    def ended(self, pidfd: int) -> None:
        """An init ended, and with it everything in its container: tidy up, then tell."""
        running = self.running.pop(pidfd)
        self.poll.unregister(pidfd)
        end = self.launcher.finish(running)
        self.send({
            "event": "exited", "container": running.id,
            "exit": asdict(end),
        })  # fmt: skip

    def close(self) -> None:
        """The client is gone: no container outlives it, and unchanged ones leave nothing."""
        self.client.close()
        gone = Exit(137, "its launcher ended")
        for pidfd in self.running:  # all of them, before the first is waited for
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd, running in list(self.running.items()):
            self.running.pop(pidfd)
            self.launcher.finish(running, gone)
        for folder in self.unsettled:
            with suppress(WorkbenchError, OSError):  # removed meanwhile, or left to the next sweep
                launch.settle(folder)
        with suppress(WorkbenchError, OSError):
            # of what was laid out and not asked for yet, or whose folder somebody has tidied up before
            state.sweep_run_dirs(self.run_base)
        self.launcher.close()


def main(fd: str, ids: str, run_base: str) -> None:
    """Entry point in the fresh interpreter (``userns.spawn``).

    ids: the host's ``HostIds`` as JSON; run_base: the client's, which here has another uid.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the client decides, by closing its end
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o022)
    data = json.loads(ids)
    data["sub_uids"], data["sub_gids"] = tuple(data["sub_uids"]), tuple(data["sub_gids"])
    Helper(socket.socket(fileno=int(fd)), HostIds(**data), run_base).serve()
    sys.exit(0)
