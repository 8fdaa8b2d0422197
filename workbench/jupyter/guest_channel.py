"""The host's end of a container's socket: what arrives, whose turn it is, and that nobody keeps the others waiting.

A request is one line of JSON, with bytes after it where it says so; the answer is one, with lines of progress before
it, and bytes where the launcher hands something out. Who does not finish its line, does not read, or asks for too much
at once is put off: a few requests are worked on side by side, a few more wait, and the rest is told to come again. An
end of the stream is noticed while the work goes on, which stops then.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.linux.sockets import bind_private
from workbench.model import Interrupted, InvalidInput, how_far, printable

_REQUEST = 128 << 10  # bytes of a line
_TIMEOUT = 10.0  # seconds for a request to arrive, and for an answer, or a megabyte of it, to be taken
_RATE = 2.0  # requests in a second, in the long run: each costs the host a tenth of one
_BURST = 20.0  # requests that may come at once
_ARRIVING, _WAITING, _WORKERS = 16, 8, 4
_PATIENCE = 5.0  # seconds that a request waits for its turn
_CHUNK = 1 << 20
_QUIET = 0.5  # seconds of work without a word of progress
_BETWEEN = 0.25  # seconds from one word to the next
_WORD = 200  # characters of one


class Channel:
    """One request that is being answered."""

    def __init__(self, connection: socket.socket, rest: bytes = b"") -> None:
        """rest: what has arrived after its line."""
        self._connection, self._rest = connection, rest
        self._next = time.monotonic() + _QUIET
        self._gone = select.poll()
        # Not an end of what it sends alone: who shuts that down reads still.
        self._gone.register(connection, select.POLLHUP | select.POLLERR)
        connection.settimeout(_TIMEOUT)

    def look(self) -> None:
        """Raises Interrupted when nobody waits for the answer any more."""
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in self._gone.poll(0)):
            raise Interrupted("answer %container", "it was interrupted", "nothing was changed")

    def meter(self, what: str, done: int, total: int) -> None:
        """A ``model.Meter``. Raises Interrupted."""
        self.say(how_far(what, done, total))

    def say(self, text: str) -> None:
        """A word of progress, if the last one is some time ago. Raises Interrupted."""
        self.look()
        if (now := time.monotonic()) >= self._next:
            self._next = now + _BETWEEN
            self._line({"progress": printable(text[:_WORD])})

    def body(self, size: int) -> bytes:
        """What follows the request's line. Raises Interrupted when it does not arrive in time."""
        data, self._rest = bytearray(self._rest[:size]), self._rest[size:]
        until = time.monotonic() + _TIMEOUT
        while len(data) < size:
            self._connection.settimeout(max(0.01, until - time.monotonic()))
            try:
                piece = self._connection.recv(min(_CHUNK, size - len(data)))
            except OSError:
                piece = b""
            if not piece:
                raise Interrupted("read a request", "it did not arrive whole")
            data += piece
        self._connection.settimeout(_TIMEOUT)
        return bytes(data)

    def tell(self, **about: Any) -> None:
        """Before the answer, something about it. Raises Interrupted."""
        self._line({"about": about})

    def stream(self, path: Path, **about: Any) -> str:
        """Hand a file out after a line ``about`` it and with its size; ``sha256:<hex>`` of it. Raises Interrupted."""
        whole = hashlib.sha256()
        with open(path, "rb") as file:
            self.tell(size=os.fstat(file.fileno()).st_size, **about)
            while data := file.read(_CHUNK):
                whole.update(data)
                self._send(data)
        return f"sha256:{whole.hexdigest()}"

    def answer(self, answer: dict[str, Any]) -> None:
        """The last line. Raises Interrupted."""
        self._line(answer)

    def _line(self, value: dict[str, Any]) -> None:
        self._send(json.dumps(value).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)  # the timeout is for all of it
        except OSError:
            raise Interrupted("answer %container", "the other end does not read") from None


class Door:
    """Listens on a socket, in a thread of its own, and calls ``serve`` for each request, in others.

    serve: gets the line and the channel to answer on; Interrupted of it ends the connection, nothing else may come.
    """

    def __init__(self, serve: Callable[[bytes, Channel], None], name: str) -> None:
        self._serve, self._name = serve, name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._selector = selectors.DefaultSelector()
        self._arriving: dict[socket.socket, tuple[bytearray, float]] = {}
        self._waiting: deque[tuple[socket.socket, bytes, bytes, float]] = deque()
        self._working, self._guard = 0, threading.Lock()
        self._budget, self._then = _BURST, time.monotonic()
        self._opened = self._closed = False

    def open(self, path: str) -> None:
        """Listen at a name. Raises OSError."""
        bind_private(self._listener, path)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._opened = True
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def close(self) -> None:
        """Listen no more; what is being done is done to its end."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes its thread
        if not self._opened:
            self._listener.close()

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(0.05 if self._waiting else 1.0 if self._arriving else None):
                    if key.fileobj is not self._listener:
                        self._read(key.fileobj)  # type: ignore[arg-type]
                    elif not self._accept():
                        return
                self._tidy()
        finally:
            for connection in [*self._arriving, *(each[0] for each in self._waiting)]:
                connection.close()
            self._selector.close()
            self._listener.close()

    def _accept(self) -> bool:
        """Whether it goes on."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # also of one that is shut down, for good
            return not self._closed
        except OSError:
            return False
        connection.setblocking(False)
        if len(self._arriving) >= _ARRIVING:  # who came first has had the most time
            self._forget(next(iter(self._arriving)))
        self._arriving[connection] = bytearray(), time.monotonic() + _TIMEOUT
        self._selector.register(connection, selectors.EVENT_READ)
        return True

    def _forget(self, connection: socket.socket, close: bool = True) -> None:
        self._selector.unregister(connection)
        del self._arriving[connection]
        if close:
            connection.close()

    def _read(self, connection: socket.socket) -> None:
        if connection not in self._arriving:  # put off for another one since
            return
        data, _ = self._arriving[connection]
        try:
            piece = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        data += piece
        if not piece:
            self._forget(connection)
        elif (end := data.find(b"\n")) >= 0 or len(data) > _REQUEST:
            self._forget(connection, close=False)
            line = bytes(data[: end + 1])
            self._waiting.append((connection, line, bytes(data[end + 1 :]), time.monotonic() + _PATIENCE))

    def _tidy(self) -> None:
        """Whose turn it is, and who has waited too long."""
        now = time.monotonic()
        for connection, (_, until) in list(self._arriving.items()):
            if until < now:
                self._forget(connection)
        self._budget, self._then = min(_BURST, self._budget + (now - self._then) * _RATE), now
        while self._waiting and self._budget >= 1 and self._working < _WORKERS:
            connection, line, rest, _ = self._waiting.popleft()
            self._budget -= 1
            with self._guard:
                self._working += 1
            threading.Thread(target=self._work, args=(connection, line, rest), name=self._name, daemon=True).start()
        while len(self._waiting) > _WAITING:
            _put_off(self._waiting.pop()[0])
        while self._waiting and self._waiting[0][3] < now:
            _put_off(self._waiting.popleft()[0])

    def _work(self, connection: socket.socket, line: bytes, rest: bytes) -> None:
        try:
            with connection, suppress(Interrupted):
                self._serve(line, Channel(connection, rest))
        finally:
            with self._guard:
                self._working -= 1


def _put_off(connection: socket.socket) -> None:
    answer = {"error": "ask the launcher of this kernel: it is busy with other requests; try again", "busy": True}
    with connection, suppress(OSError):
        connection.send(json.dumps(answer).encode() + b"\n")


def checked(data: bytes, known: dict[str, dict[str, type]]) -> dict[str, Any]:
    """A request of known keys: of each verb, what may be in it. Raises InvalidInput."""
    tried = "answer %container"
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput(tried, "the request is no line of JSON, or too long") from None
    if not isinstance(request, dict) or not isinstance(request.get("do"), str) or request["do"] not in known:
        raise InvalidInput(tried, "it asks for nothing that is known here")
    for key, value in request.items():
        if key != "do" and (key not in known[request["do"]] or type(value) is not known[request["do"]][key]):
            raise InvalidInput(tried, f"{key[:40]!r} is not understood")
    if request["do"] == "tag" and not request.get("name"):
        raise InvalidInput(tried, "no name is given")
    if request.get("number", 0) < 0:
        raise InvalidInput(tried, "a number is negative")
    return request
