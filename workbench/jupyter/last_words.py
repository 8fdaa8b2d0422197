"""Tells the user why a kernel died, in the cell that was running.

A kernel killed by its memory limit says nothing itself. Its iopub socket is a Unix socket whose name the host
may take over: every client's SUB socket reconnects to that name by itself (libzmq does within 0.2 s), and gets
one ``stream`` message on stderr, signed like the kernel's own. To be shown, it must name the request that was
running as its parent. So a SUB socket of ours follows the kernel's ``status`` messages, two short ones for each
execution (``busy`` is the first that a kernel says of a request), and takes them out of its queue at most twice a
second, so that the kernel's round trips don't feel it.

A kernel that dies in the first milliseconds of a cell, or in one call that holds the interpreter's lock from there
on, takes that message along in a queue of its own memory. A server knows nevertheless what was asked of it, for the
requests go through it (``Listener.sent``). With another client only the log has the reason then.

One thread, for all kernels of this process, that sleeps while nothing happens. It owns the sockets: a ZeroMQ
socket is not to be shared between threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import zmq

#: Seconds between two looks at the queues of kernels.
_LOOK = 0.5
#: Seconds that clients get to reconnect, and in which the message waits for each of them.
WINDOW = 0.6
_DELIMITER = b"<IDS|MSG>"
# ipykernel publishes under "kernel.<id>.<type>"; outputs have other topics and never come here.
_ANY = b"kernel."
_REQUEST = b".status"


@dataclass(eq=False)
class Listener:
    """What is known of one kernel. ``address``: its iopub as the host reaches it."""

    address: str
    session: Any  # jupyter_client.session.Session
    curve: tuple[bytes, bytes] | None = None
    socket: zmq.Socket[bytes] | None = None
    topic: bytes = _ANY
    #: The header of the last execution that the kernel said something of, and whether it said that it is over.
    parent: dict[str, Any] = field(default_factory=dict)
    over: bool = False
    #: Headers of the executions that were asked for through this process and are not known to be over, in order.
    asked: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=1000))

    def sent(self, frames: Sequence[Any]) -> str:
        """Take notice of a message that went to the shell channel; the id of the cell that it runs, if it says one.

        From any thread.
        """
        with contextlib.suppress(ValueError, IndexError):
            delimiter = next(
                (at for at, frame in enumerate(frames) if len(frame) == 9 and bytes(frame) == _DELIMITER), 0
            )
            header = bytes(frames[delimiter + 2])
            if b'"execute_request"' in header:
                self.asked.append(json.loads(header))
                return str(json.loads(bytes(frames[delimiter + 4])).get("cellId", ""))
        return ""

    def finished(self, request: str) -> None:
        """A kernel takes one execution after the other: what was asked for before is over as well."""
        if any(header.get("msg_id") == request for header in list(self.asked)):
            while self.asked and self.asked.popleft().get("msg_id") != request:
                pass

    def running(self) -> dict[str, Any]:
        """The header of the execution that runs, as far as anybody knows; else of the last one, or nothing."""
        waiting = list(self.asked) if self.over or not self.parent else []
        return waiting[0] if waiting else self.parent


class LastWords:
    """The thread. Every method can be called from any thread and returns at once."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._orders: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._listeners: set[Listener] = set()
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="workbench-last-words", daemon=True).start()

    def follow(self, listener: Listener) -> None:
        """Begin to follow a kernel that is starting."""
        self._order(lambda: self._follow(listener))

    def forget(self, listener: Listener) -> Future[None]:
        """The kernel ends as it should. Done when its socket is closed."""
        done: Future[None] = Future()

        def order() -> None:
            self._forget(listener)
            done.set_result(None)

        self._order(order)
        return done

    def say(self, listener: Listener, text: str) -> Future[int]:
        """In the place of the kernel that has died, tell its clients ``text``; how many it reached.

        Takes WINDOW seconds; then the name is free for the next run of the kernel.
        """
        done: Future[int] = Future()

        def order() -> None:
            self._look(listener)
            self._forget(listener)
            # its own thread: other kernels may die in the same moment, and be followed meanwhile
            threading.Thread(target=self._say, args=(listener, text, done), daemon=True).start()

        self._order(order)
        return done

    # -- the thread ----------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        with self._lock:
            self._orders.append(order)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        while True:
            ready = dict(self._poller.poll())
            if self._wake_read not in ready:
                # A message has come; let more of them gather, unless there is an order.
                wake = zmq.Poller()
                wake.register(self._wake_read, zmq.POLLIN)
                wake.poll(int(_LOOK * 1000))
            with contextlib.suppress(BlockingIOError):
                while os.read(self._wake_read, 512):
                    pass
            with self._lock:
                orders, self._orders = self._orders, []
            for order in orders:
                order()
            for listener in self._listeners:
                self._look(listener)

    def _follow(self, listener: Listener) -> None:
        self._forget(listener)
        socket = self._context.socket(zmq.SUB)
        socket.linger = 0
        socket.reconnect_ivl = 10  # ms; a client may ask at once when the kernel is up
        socket.rcvhwm = 0  # a full queue would keep the oldest; the latest counts
        if listener.curve:
            socket.curve_publickey, socket.curve_secretkey = listener.curve
            socket.curve_serverkey = listener.curve[0]
        listener.topic = _ANY
        socket.subscribe(_ANY)
        socket.connect(listener.address)
        listener.socket = socket
        self._poller.register(socket, zmq.POLLIN)
        self._listeners.add(listener)

    def _forget(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        if listener.socket is not None:
            self._poller.unregister(listener.socket)
            listener.socket.close()
            listener.socket = None

    def _look(self, listener: Listener) -> None:
        socket = listener.socket
        if socket is None:
            return
        last: list[bytes] = []
        try:
            while True:
                frames = socket.recv_multipart(zmq.NOBLOCK)
                topic = frames[0]
                if topic.endswith(_REQUEST) and b'"execute_request"' in frames[-3]:
                    last = frames
                    if listener.asked and b'"idle"' in frames[-1]:
                        listener.finished(_parent(frames).get("msg_id", ""))
                if listener.topic == _ANY and topic.count(b".") >= 2:
                    # from now on only what is needed, not even the kernel's other small messages
                    narrow = topic[: topic.rindex(b".")] + _REQUEST
                    socket.subscribe(narrow)
                    socket.unsubscribe(_ANY)
                    listener.topic = narrow
        except zmq.ZMQError:  # EAGAIN: the queue is empty
            pass
        if last and (parent := _parent(last)):
            listener.parent, listener.over = parent, b'"idle"' in last[-1]

    def _say(self, listener: Listener, text: str, done: Future[int]) -> None:
        reached = 0
        try:
            reached = self._publish(listener, text)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(reached)

    def _publish(self, listener: Listener, text: str) -> int:
        session = listener.session.clone()
        running = listener.running()
        parent = {"header": running} if running else None
        # The second ends the request for those who follow its status: a server takes a kernel that died while it
        # was busy for busy when it has started it again, and does not wait until its channels are connected.
        contents = (("stream", {"name": "stderr", "text": text + "\n"}), ("status", {"execution_state": "idle"}))
        messages = [session.serialize(session.msg(kind, content, parent=parent)) for kind, content in contents]
        reached = 0
        with self._context.socket(zmq.XPUB) as socket:
            socket.linger = 200
            # Manual: each subscriber is given a topic of its own, so that each gets the message once, however
            # late it comes. A SUB socket filters again by what it asked for itself, mostly everything.
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)
            socket.setsockopt(zmq.XPUB_MANUAL, 1)
            if listener.curve:
                socket.curve_publickey, socket.curve_secretkey = listener.curve
                socket.curve_server = True
            socket.bind(listener.address)
            end = time.monotonic() + WINDOW
            while (left := end - time.monotonic()) > 0:
                if not socket.poll(int(left * 1000) + 1):
                    break
                request = socket.recv()
                if not request.startswith(b"\x01") or request[1:].startswith(_ANY):
                    continue
                topic = request[1:] + b"last-words.%d" % reached
                socket.setsockopt(zmq.SUBSCRIBE, topic)
                for frames in messages:
                    socket.send_multipart([topic, *frames])
                reached += 1
        return reached


def _parent(frames: list[bytes]) -> dict[str, Any]:
    """The parent header of a message: topic, delimiter, signature, header, parent header, metadata, content."""
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(frames[frames.index(_DELIMITER) + 3])
        if isinstance(found, dict):
            return found
    return {}


_instance: LastWords | None = None


def instance() -> LastWords:
    """The one of this process (a fork starts its own)."""
    global _instance
    if _instance is None or _instance._pid != os.getpid():
        _instance = LastWords()
    return _instance
