"""``workbench-kernel IMAGE CONNECTION_FILE``: the argv of our kernelspecs, for clients that start it themselves.

Clients built on jupyter_client honour the provisioner and never come here. The others (VS Code's own kernels,
Zed, Positron, emacs-jupyter) know a process, a connection file with TCP ports, and signals; so this process
stands for the kernel: it listens where the file says, joins each connection to the kernel's Unix socket in the
container, passes an interrupt on once, and neither it nor the container outlives the client.

Two processes: the one that the client has started only takes signals and hands on the exit code; the one that
works is no child of it. For VS Code interrupts *every descendant* of what it started, and then that: a kernel
below it would be interrupted directly, by way of its init and by us, the second time while it shows the first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from workbench.containers.relay import Relay, sockets_of
from workbench.jupyter import connection
from workbench.linux.sockets import bind_private
from workbench.model import Exit, InvalidInput, LaunchFailed, WorkbenchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from workbench.containers.client import HelperClient
    from workbench.containers.container import Container
    from workbench.jupyter.guest_api import GuestApi
    from workbench.model import Mount
    from workbench.workbench import Workbench

#: Interrupts closer to each other than this (seconds) are one: clients signal descendants, then the launcher.
DEBOUNCE = 0.3
#: Seconds in which a client must take something of what a dead kernel has said, or it is given up.
PATIENCE = 2.0
_LOOPBACK = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


def main(argv: list[str] | None = None) -> int:
    """Run one kernel for the client that started this process; the exit code is the kernel's."""
    # A client's Ctrl-C while this is still starting must not print a traceback. Not SIG_IGN: what is executed
    # from here on, the kernel at the end, would inherit it.
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
    words = sys.argv[1:] if argv is None else argv
    try:
        client = _pidfd_of_parent()
        link = _detach()
        if isinstance(link, _StandIn):
            return link.run()
    except WorkbenchError as error:
        return _refuse(error)
    code = 1
    try:
        code = _work(words, client, link)
    finally:
        with contextlib.suppress(OSError):
            link.sendall(str(code).encode())
    return code


def _work(words: list[str], client: int, link: socket.socket) -> int:
    try:
        if len(words) != 2:
            raise InvalidInput(
                "start a kernel", f"{len(words)} arguments", "usage: workbench-kernel IMAGE CONNECTION_FILE"
            )
        with contextlib.closing(_Launcher(words[0], words[1], client, link)) as launcher:
            return launcher.run()
    except WorkbenchError as error:
        return _refuse(error)


def _refuse(error: WorkbenchError) -> int:
    print(f"workbench-kernel: {error}", file=sys.stderr, flush=True)
    return 1


class _StandIn:
    """The process that the client knows: signals go to the one that works, its exit code comes back.

    Should this one be killed, the end of the stream tells the other.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        said = b""
        while part := self._link.recv(16):
            said += part
        return int(said) if said else 1

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            self._link.send(bytes([number]), socket.MSG_DONTWAIT)


def _detach() -> socket.socket | _StandIn:
    """Go on in a process that is no descendant of this one, and in a session of its own."""
    theirs, ours = socket.socketpair()
    child = os.fork()
    if child:
        ours.close()
        os.waitpid(child, 0)
        return _StandIn(theirs)
    if os.fork():
        os._exit(0)
    theirs.close()
    os.setsid()
    return ours


class _Launcher:
    """One kernel, from the connection file to its exit."""

    def __init__(self, ref: str, connection_file: str, client: int, link: socket.socket) -> None:
        self._ref, self._client, self._link = ref, client, link
        self._pending: list[int] = []
        self._interrupted = float("-inf")
        self._ended_by = 0
        self._container: Container | None = None
        self._workbench: Workbench | None = None
        self._run_dir = -1
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._file = connection.read(connection_file)
        # Before the container exists: clients look for open ports to see whether a kernel comes up.
        self._listeners = listen(self._file)
        self._helper = _helper_ahead()
        self._relay: Relay | None = None
        self._guest: GuestApi | None = None
        self._content: dict[str, Any] = {}
        self._between: Callable[[], None] | None = None  # what is to be done before the kernel is started again

    def run(self) -> int:
        """Start the container, carry bytes until the kernel exits or the client goes; the exit code."""
        container = self._create()
        relay = self._relay
        assert relay is not None
        started = self._start(container)
        container_exit: Future[Any] | None = None
        while not self._ended_by:
            relay.step()
            self._take_signals(container if container_exit else None)
            if container_exit is None and started.done():
                started.result()
                container_exit = container.exited
                container_exit.add_done_callback(self._wake)
            if container_exit is not None and container_exit.done():
                if self._between is None:
                    break
                between, self._between, container_exit = self._between, None, None
                between()
                started = self._start(container)
        if container_exit is None or not container_exit.done():
            return self._kill(container, started)
        ended: Exit = container_exit.result()
        relay.kernel_gone()
        self._let_out(relay)
        if ended.reason:
            print(f"workbench-kernel: {ended.reason}", file=sys.stderr, flush=True)
        return ended.code if ended.code >= 0 else 128 - ended.code

    def close(self) -> None:
        """Leave nothing behind: no socket, no process; the writable layer stays only if it holds changes."""
        if self._relay is not None:
            self._relay.close()
        for listener, _ in self._listeners:
            listener.close()
        if self._file.transport == "ipc":
            for path in _ipc_paths(self._file):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        if self._guest is not None:
            self._guest.close()
        try:
            if self._container is not None:
                self._container.settle()
        finally:
            self._helper.close()

    # -- steps ----------------------------------------------

    def _create(self) -> Container:
        from workbench.jupyter import shared  # late, so that the ports are open by now
        from workbench.jupyter.guest_api import GuestApi

        self._workbench = workbench = shared.workbench()
        workbench.containers.helper = self._helper
        image = workbench.image(self._ref)
        kernel = image.kernel
        if kernel is None:
            raise LaunchFailed(
                f"start a kernel of {self._ref}",
                "the image has no kernel",
                "`jupyter workbench run` starts it",
            )
        if self._file.curve:
            connection.require_curve(kernel, self._ref)
        container = workbench.create(
            self._ref,
            argv=list(connection.command(kernel)),
            cwd=os.getcwd(),
            env=connection.kernel_env(os.environ, image),
            mounts=_mounts(),
            guest=True,
            forwards=connection.forwards(kernel),
            labels={"kind": "kernel", "client": "launcher"},
        )
        self._container = container
        self._guest = GuestApi(workbench, container, self._start_again)
        self._guest.start()
        run_dir = str(container.run_dir)
        self._content = connection.guest_content(
            key=self._file.key,
            signature_scheme=self._file.signature_scheme,
            kernel_name=self._ref,
            curve=self._file.curve,
            transport=kernel.transport,
        )
        self._run_dir = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._relay = relay = Relay(self._listeners, sockets_of(self._run_dir))
        relay.watch(self._wake_read, self._on_wake)
        relay.watch(self._link.fileno(), self._on_signals)
        if self._client >= 0:
            relay.watch(self._client, self._on_client_gone)
        return container

    def _start(self, container: Container) -> Future[None]:
        connection.clear_sockets(container.run_dir)
        connection.write_guest(container.run_dir, self._content)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # What the kernel prints beside its messages is shown by the client as the kernel's log.
            started = container.start(stdio=(null, 1, 2))
        finally:
            os.close(null)
        started.add_done_callback(self._wake)
        return started

    def _start_again(self, between: Callable[[], None]) -> None:
        """End the kernel, do something, and start it again; in any thread."""
        self._between = between
        assert self._container is not None
        self._container.kill()

    def _kill(self, container: Container, started: Future[None]) -> int:
        """The client is gone or said so: the kernel goes at once."""
        with contextlib.suppress(WorkbenchError, OSError, TimeoutError):
            started.result(timeout=10)
            container.kill()
            container.exited.result(timeout=10)
        return 128 + self._ended_by

    def _let_out(self, relay: Relay) -> None:
        """The kernel has exited; its last output still reaches a client that takes it."""
        relay.moved = time.monotonic()
        while relay.links and not self._ended_by and time.monotonic() - relay.moved < PATIENCE:
            relay.step(0.05)
            self._take_signals(None)

    # -- events ----------------------------------------------

    def _on_signals(self, _events: int) -> None:
        # no bytes: the process that the client started was killed
        self._pending += self._link.recv(512) or bytes([signal.SIGKILL])

    def _wake(self, _future: Future[Any]) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 512):
                pass

    def _on_client_gone(self, _events: int) -> None:
        self._ended_by = signal.SIGHUP

    def _take_signals(self, container: Container | None) -> None:
        pending, self._pending = self._pending, []
        for number in pending:
            if number != signal.SIGINT:
                self._ended_by = number
            elif container is not None:
                now = time.monotonic()
                if now - self._interrupted >= DEBOUNCE:
                    with contextlib.suppress(OSError):
                        container.signal(signal.SIGINT)
                self._interrupted = now


def _mounts() -> list[Mount]:
    """What the kernelspec adds. Raises InvalidInput."""
    import json  # late, as what parses them: most kernelspecs add nothing

    from workbench.containers.spec import parse_mount

    text = os.environ.get("WORKBENCH_KERNEL_MOUNTS", "")  # kernelspecs.MOUNTS, without its imports
    try:
        return [parse_mount(each) for each in json.loads(text)] if text else []
    except ValueError:
        raise InvalidInput("read the kernelspec's mounts", f"{text!r} is no JSON", "build the recipe again") from None


def listen(file: connection.ClientFile) -> list[tuple[socket.socket, str]]:
    """Listening sockets where the client's file says, each with the name of the kernel's socket to join.

    TCP on the loopback interface only. Raises LaunchFailed, InvalidInput.
    """
    tried = "listen for the kernel's client"
    listeners: list[tuple[socket.socket, str]] = []
    address = "127.0.0.1" if file.ip == "localhost" else file.ip
    try:
        for target, port in zip(connection.SOCKETS, file.ports, strict=True):
            if file.transport == "ipc":
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listeners.append((listener, target))
                bind_private(listener, f"{file.ip}-{port}")
            else:
                if address not in _LOOPBACK:
                    raise InvalidInput(
                        tried,
                        f"the connection file asks for {file.ip}",
                        "ask for 127.0.0.1: a kernel never listens elsewhere",
                    )
                listener = socket.socket(_LOOPBACK[address], socket.SOCK_STREAM)
                listeners.append((listener, target))
                # as libzmq does; a client hands out ports that it has just closed
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address, port))
            listener.listen(128)
    except (OSError, InvalidInput) as error:
        for listener, _ in listeners:
            listener.close()
        if isinstance(error, InvalidInput):
            raise
        raise LaunchFailed(tried, f"{file.ip}, port {port}: {error.strerror or error}") from None
    return listeners


def _ipc_paths(file: connection.ClientFile) -> list[str]:
    return [f"{file.ip}-{port}" for port in file.ports]


def _helper_ahead() -> HelperClient:
    """The helper gets ready beside the imports of this process, not after them. Before any thread is started."""
    from workbench.containers.client import HelperClient

    helper = HelperClient(fork=True)
    with contextlib.suppress(WorkbenchError, OSError):  # it fails again, with its message, when it is asked
        helper.request("warm", network="outbound")
    return helper


def _pidfd_of_parent() -> int:
    """A descriptor that becomes readable when the client's process ends, also by SIGKILL; -1 without a parent.

    Not PR_SET_PDEATHSIG: it fires when the *thread* that started us ends (prctl(2)), and some clients start
    kernels from threads that come and go.
    """
    parent = os.getppid()
    if parent == 0:  # the client lives in another pid namespace
        return -1
    try:
        handle = os.pidfd_open(parent)
    except ProcessLookupError:
        raise LaunchFailed("start a kernel", "its client has gone") from None
    if os.getppid() != parent:
        raise LaunchFailed("start a kernel", "its client has gone")
    return handle


if __name__ == "__main__":
    sys.exit(main())
