"""Clients that start a kernelspec's argv themselves, as plain processes, and what all tests of kernels share."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking import BlockingKernelClient
from jupyter_core.paths import jupyter_data_dir

from tests.conftest import our_processes

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


def spec(name: str = "wb-python") -> dict[str, Any]:
    """The kernelspec, as a client reads it from the disk."""
    return dict(json.loads((Path(jupyter_data_dir()) / "kernels" / name / "kernel.json").read_text()))


def free_ports(count: int = 5) -> list[int]:
    """Ports that were free a moment ago, as every client finds them."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def connection(folder: Path, *, transport: str = "tcp", curve: bool = False, **more: Any) -> Path:
    """A connection file as a client writes it."""
    content: dict[str, Any] = {
        "transport": transport,
        "ip": "127.0.0.1" if transport == "tcp" else str(folder / "s"),
        "key": uuid.uuid4().hex,
        "signature_scheme": "hmac-sha256",
        "kernel_name": "wb-python",
    }
    ports = free_ports() if transport == "tcp" else range(1, 6)
    content |= {f"{channel}_port": port for channel, port in zip(CHANNELS, ports, strict=True)}
    if curve:
        public, secret = zmq.curve_keypair()
        content |= {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
    path = folder / f"kernel-{uuid.uuid4()}.json"
    path.write_text(json.dumps(content | more))
    path.chmod(0o600)
    return path


def descendants(pids: list[int]) -> list[int]:
    """Every process below these, deepest first."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path("/proc", name, "stat").read_text()
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(name))
    found, todo = [], list(pids)
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found[::-1]


def family(before: set[int]) -> list[int]:
    """Every process of this test session that was not there before, and what is below it."""
    own = [pid for pid in our_processes() if pid not in before]
    return sorted({*own, *descendants(own)})


class Argv:
    """A kernel started by its argv."""

    def __init__(self, folder: Path, *, file: Path | None = None, ref: str | None = None, **options: Any) -> None:
        before = set(our_processes())
        self.file = file or connection(folder)
        found = spec()
        argv = [str(self.file) if word == "{connection_file}" else word for word in found["argv"]]
        if ref:
            argv[-2] = ref
        self.process = subprocess.Popen(
            argv, cwd=folder, env=os.environ | found.get("env", {}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        self.client: BlockingKernelClient | None = None
        self._before = before

    def family(self) -> list[int]:
        """Every process that came with it, also those that are no descendants."""
        return family(self._before)

    def connect(self, timeout: float = 60) -> BlockingKernelClient:
        """Connect as soon as somebody listens and wait for the kernel."""
        self.client = client = BlockingKernelClient()
        client.load_connection_file(str(self.file))
        client.start_channels()
        until = time.monotonic() + timeout
        while True:
            try:
                client.wait_for_ready(timeout=timeout)
                return client
            except RuntimeError:  # this client calls a kernel dead that has not answered for a second
                if self.process.poll() is not None or time.monotonic() > until:
                    raise

    def descendants(self) -> list[int]:
        """Every process below the one that was started, deepest first: what a client can find."""
        return descendants([self.process.pid])

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code and stderr."""
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def close(self) -> None:
        """End it whatever it does."""
        if self.client is not None:
            self.client.stop_channels()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=30)
        self.file.unlink(missing_ok=True)


def ask_to_end(process: subprocess.Popen[Any], log: Path) -> None:
    """SIGTERM for a server that writes to ``log``, until it has ended.

    Its handler writes a line first. Where that interrupts the writing of another, Python refuses it (RuntimeError:
    reentrant call) and the server goes on as if nobody had asked; so it is asked again.
    """
    until = time.monotonic() + 60
    process.terminate()
    while True:
        try:
            process.wait(timeout=2)
            return
        except subprocess.TimeoutExpired:
            text = log.read_text()
            assert time.monotonic() < until, text
            if "reentrant call" in text and not re.search(r"received signal \d", text):
                process.terminate()


@contextlib.contextmanager
def argv_kernel(folder: Path, **options: Any) -> Iterator[tuple[Argv, BlockingKernelClient]]:
    """A kernel by its argv, ready."""
    kernel = Argv(folder, **options)
    try:
        yield kernel, kernel.connect()
    finally:
        kernel.close()


class Outputs:
    """What one execution gave."""

    def __init__(self) -> None:
        self.stdout = self.stderr = ""
        self.size = 0
        self.data: list[dict[str, Any]] = []
        self.error = ""
        self.reply: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        """The last result as text."""
        return str(self.data[-1]["text/plain"])

    def take(self, message: dict[str, Any]) -> bool:
        """Add an iopub message; True when it was the last one."""
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "stream":
            self.size += len(content["text"])
            if self.size < 1 << 20:
                setattr(self, content["name"], getattr(self, content["name"]) + content["text"])
        elif kind in ("display_data", "execute_result"):
            self.data.append(content["data"])
        elif kind == "error":
            self.error = content["ename"]
        else:
            self.messages.append(message)
        return bool(kind == "status" and content["execution_state"] == "idle")


def run(
    client: BlockingKernelClient,
    code: str,
    timeout: float = 60,
    after: Callable[[], None] | None = None,
    delay: float = 0.5,
    answer: str | None = None,
) -> Outputs:
    """Execute and gather until idle and reply; ``after`` is called ``delay`` seconds after the cell began."""
    outputs = Outputs()
    request = client.execute(code, allow_stdin=answer is not None)
    until = time.monotonic() + timeout
    began: float | None = None
    idle = False
    while not (idle and outputs.reply):
        if time.monotonic() > until:
            raise TimeoutError(f"{code!r}: {outputs.stdout[-500:]} {outputs.stderr[-500:]}")
        if after is not None and began is not None and time.monotonic() - began >= delay:
            after()
            after = None
        if answer is not None:
            with contextlib.suppress(queue.Empty):
                client.get_stdin_msg(timeout=0.01)
                client.input(answer)
                answer = None
        with contextlib.suppress(queue.Empty):
            message = client.get_iopub_msg(timeout=0.05 if not idle else 0.001)
            if message["parent_header"].get("msg_id") == request:
                began = began or time.monotonic()
                idle = outputs.take(message) or idle
        if idle:
            with contextlib.suppress(queue.Empty):
                reply = client.get_shell_msg(timeout=0.5)
                if reply["parent_header"].get("msg_id") == request:
                    outputs.reply = reply["content"]
    return outputs


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def gone(pids: list[int], within: float = 10) -> bool:
    """Whether all these processes end in time."""
    until = time.monotonic() + within
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def interrupt_message(client: BlockingKernelClient) -> None:
    """As a client whose kernelspec says interrupt_mode "message"."""
    client.control_channel.send(client.session.msg("interrupt_request", {}))


#: Takes all memory there is. Where rlimits stand in for a control group, one call, so that Python has some left to
#: tell it; else in steps, so that the kernel's own threads get their turn before it is killed.
HUNGRY = "x = []\nwhile True: x.append(bytearray(1_000_000))" if os.getuid() == 0 else "x = bytearray(2_000_000_000)"
