"""Kernels of each side, and a client that sends its request at once.

jupyter_client's own client waits: ``wait_for_ready`` 0.2 s by itself, and its sockets try again only 0.1 s after
a kernel that was not there yet. This one tries every 2 ms, on every side.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from jupyter_client.manager import KernelManager
from jupyter_client.session import Session

from benchmarks.peers import Podman
from benchmarks.scene import OURS, PLAIN, Scene, write_kernelspec

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
TIMEOUT = 60.0


class Client:
    """Shell and iopub of one kernel, without anything in between."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._context = zmq.Context.instance()
        self._session = Session(key=_bytes(info["key"]), signature_scheme=info["signature_scheme"])
        self._shell = self._connect(zmq.DEALER, info, "shell")
        self._iopub = self._connect(zmq.SUB, info, "iopub")
        self._iopub.subscribe(b"")

    def _connect(self, kind: int, info: dict[str, Any], channel: str) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.linger = 0
        made.reconnect_ivl = 2
        between = "-" if info["transport"] == "ipc" else ":"
        made.connect(f"{info['transport']}://{info['ip']}{between}{info[channel + '_port']}")
        return made

    def result(self, code: str = "", expression: str = "6 * 7") -> None:
        """Run some code, ask for what is 42, and wait for the answer."""
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {"answer": expression},
                   "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        self._session.send(self._shell, "execute_request", content)
        reply = self._receive(self._shell)
        answer = reply["content"]["user_expressions"]["answer"]["data"]["text/plain"]
        assert answer == "42", reply

    def round_trip(self) -> None:
        """Execute a trivial cell; until its reply and the kernel's word that it is idle are both there."""
        content = {"code": "1", "silent": False, "store_history": True, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        sent = self._session.send(self._shell, "execute_request", content)["header"]["msg_id"]
        assert self._receive(self._shell)["parent_header"]["msg_id"] == sent
        while True:
            message = self._receive(self._iopub)
            ours = message["parent_header"].get("msg_id") == sent
            if ours and message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return

    def settle(self) -> None:
        """Until iopub is surely connected: a subscription takes its time."""
        self.result()
        time.sleep(0.3)
        while self._iopub.poll(50):
            self._iopub.recv_multipart()

    def _receive(self, channel: zmq.Socket[bytes]) -> dict[str, Any]:
        if not channel.poll(TIMEOUT * 1000):
            raise TimeoutError("the kernel does not answer")
        _, frames = self._session.feed_identities(channel.recv_multipart())
        return self._session.deserialize(frames)

    def close(self) -> None:
        """Close both sockets."""
        self._shell.close()
        self._iopub.close()


def _bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def managed(name: str, folder: str) -> KernelManager:
    """A manager with its kernel started, as servers do it: the connection file is in the runtime folder."""
    file = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], f"kernel-{secrets.token_hex(8)}.json")
    manager = KernelManager(kernel_name=name, connection_file=file)
    manager.start_kernel(cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return manager


class Managed:
    """A kernel under jupyter_client, as servers start them: the plain one or ours, by its kernelspec."""

    def __init__(self, scene: Scene, name: str, *asked: str) -> None:
        start = time.perf_counter()
        self.manager = managed(name, str(scene.work))
        self.client = Client(self.manager.get_connection_info())
        try:
            self.client.result(*asked)
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - start

    def close(self) -> None:
        """End the kernel."""
        self.client.close()
        self.manager.shutdown_kernel(now=True)

    def __enter__(self) -> Managed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def first_result(scene: Scene, name: str, *asked: str) -> float:
    """Seconds from nothing to the first result; asked: see ``Client.result``."""
    with Managed(scene, name + scene.mark, *asked) as kernel:
        return kernel.seconds


def ours(scene: Scene, *asked: str) -> Callable[[], float]:
    """Starts a container kernel; seconds to its first result."""
    return lambda: first_result(scene, OURS, *asked)


def plain(scene: Scene, *asked: str) -> Callable[[], float]:
    """Starts a plain kernel; seconds to its first result."""
    return lambda: first_result(scene, PLAIN, *asked)


def in_podman(scene: Scene, podman: Podman) -> Callable[[], float]:
    """Starts a kernel in ``podman run``; seconds to its first result.

    With a kernelspec whose argv is podman, sockets in a mounted folder as on our side, and the same manager.
    """
    kernel = scene.image.kernel
    assert kernel is not None
    count = 0

    def start() -> float:
        nonlocal count
        count += 1
        folder = scene.base / f"p{count}"
        folder.mkdir()
        argv = podman.run(
            "-v", f"{folder}:{folder}", "-v", f"{scene.work}:{scene.work}", "-w", str(scene.work), command=kernel.argv
        )
        write_kernelspec(scene.base, f"podman{count}", {"argv": argv})
        begin = time.perf_counter()
        manager = KernelManager(
            kernel_name=f"podman{count}", connection_file=str(folder / "c.json"), transport="ipc", ip=f"{folder}/k"
        )
        manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = Client(manager.get_connection_info())
        try:
            client.result()
            return time.perf_counter() - begin
        finally:
            client.close()
            podman.end_all()
            manager.shutdown_kernel(now=True)

    return start


def _info(transport: str, ip: str, ports: list[int]) -> dict[str, Any]:
    numbers = {f"{channel}_port": port for channel, port in zip(CHANNELS, ports, strict=True)}
    return {"transport": transport, "ip": ip, "key": os.urandom(16).hex(), "signature_scheme": "hmac-sha256", **numbers}


@contextlib.contextmanager
def by_launcher(scene: Scene) -> Iterator[Client]:
    """A kernel as clients start it that know no provisioner: TCP on loopback, by way of ``workbench-kernel``."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in CHANNELS]
    info = _info("tcp", "127.0.0.1", [sock.getsockname()[1] for sock in taken])
    for sock in taken:
        sock.close()
    file = scene.base / "launcher.json"
    file.write_text(json.dumps(info))
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.jupyter.launcher", scene.image.id, str(file)],
        cwd=scene.work, env=os.environ | {"WORKBENCH_HOME": scene.workbench.home},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = Client(info)
    try:
        client.result()
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait()
