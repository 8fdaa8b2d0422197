"""Carries streams between the sockets of a client and those of a kernel, byte for byte.

ZMTP is the same stream of bytes over TCP and over Unix sockets (https://rfc.zeromq.org/spec/23/), so nothing
is parsed here: protocol extensions and CURVE pass end to end. What matters instead is the pace. A kernel's
iopub is a PUB socket, which *drops* what a slow reader has not taken; so the kernel's side is always read at
once, and what the client is not ready for waits in memory and then in an unlinked file.

One thread, one epoll (epoll(7), level-triggered). Standard library only: this is on the way of a launch.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

_CHUNK = 256 << 10
#: Bytes of one connection that may wait in memory before they go to disk.
MEMORY = 8 << 20
#: Seconds between attempts to reach a kernel that is not listening yet.
_RETRY = 0.005


class Backlog:
    """A first-in first-out queue of bytes: memory first, and a file without a name for what is beyond.

    As long as the file holds anything, all that is new goes to its end, so that the order stays.
    """

    def __init__(self, folder: str | None = None, memory: int = MEMORY) -> None:
        self._folder, self._limit = folder, memory
        self._queue: deque[memoryview] = deque()
        self._in_memory = 0
        self._file: BinaryIO | None = None
        self._start = self._end = 0
        self._after: deque[memoryview] = deque()  # what the disk refused; comes after the file

    def __len__(self) -> int:
        return self._in_memory + self._end - self._start + sum(map(len, self._after))

    def push(self, data: memoryview) -> None:
        """Append a copy of ``data``.

        Raises OSError when it had to go to disk and could not (it is kept all the same): push no more
        until the backlog is empty.
        """
        if self._end == self._start and self._in_memory + len(data) <= self._limit:
            self._queue.append(memoryview(bytes(data)))
            self._in_memory += len(data)
            return
        try:
            if self._file is None:
                self._file = _unlinked_file(self._folder)
            while data:
                written = os.pwrite(self._file.fileno(), data, self._end)
                self._end += written
                data = data[written:]
        except OSError:
            self._after.append(memoryview(bytes(data)))
            raise

    def send(self, sink: socket.socket) -> int:
        """Send what ``sink`` takes without waiting; bytes sent. Raises OSError, BlockingIOError among them."""
        if self._queue:
            head = self._queue[0]
            sent = sink.send(head)
            self._in_memory -= sent
            if sent == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[sent:]
            return sent
        if self._file is None or self._end == self._start:
            if not self._after:
                return 0
            self._queue, self._after = self._after, deque()
            self._in_memory = sum(map(len, self._queue))
            return self.send(sink)
        sent = os.sendfile(sink.fileno(), self._file.fileno(), self._start, min(self._end - self._start, _CHUNK))
        self._start += sent
        if self._start == self._end:  # all read: give the blocks back
            self._start = self._end = 0
            os.ftruncate(self._file.fileno(), 0)
        return sent

    def close(self) -> None:
        """Forget everything that waits."""
        self._queue.clear()
        self._after.clear()
        if self._file is not None:
            self._file.close()
        self._in_memory = self._start = self._end = 0


def _unlinked_file(folder: str | None) -> BinaryIO:
    """A file that no crash leaves behind. Not in /tmp by default, which may be memory itself."""
    import tempfile  # a tenth of a launch, and seldom needed

    for place in (folder, "/var/tmp", None):
        if place is None or os.path.isdir(place):
            with contextlib.suppress(OSError):
                return tempfile.TemporaryFile(dir=place, buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@dataclass(eq=False)
class _Flow:
    """One direction of a link."""

    backlog: Backlog
    ended: bool = False  # the source has nothing more to say
    shut: bool = False  # and the sink was told so
    stuck: bool = False  # the disk is full: not read on until the backlog has gone


@dataclass(eq=False)
class _Link:
    """A client's connection and the kernel's socket that answers it (none yet while the kernel starts)."""

    client: socket.socket
    target: str
    up: _Flow
    down: _Flow
    kernel: socket.socket | None = None
    masks: dict[int, int] = field(default_factory=dict)


class Relay:
    """Listens for clients and joins each connection to the kernel's socket of the same channel.

    channels: (listening socket, what ``connect`` makes of it) for each. The listening sockets belong to the relay
    from now on. connect: ``sockets_of`` or ``port``; it is asked again until the kernel listens.
    """

    def __init__(
        self, channels: Sequence[tuple[socket.socket, str]], connect: Connect, spill: str | None = None
    ) -> None:
        self._connect, self._spill = connect, spill
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._listeners: list[socket.socket] = []
        self._links: set[_Link] = set()
        self._waiting: list[_Link] = []
        self._buffer = memoryview(bytearray(_CHUNK))
        self._kernel_gone = False
        #: time.monotonic() of the last byte that moved.
        self.moved = time.monotonic()
        for listener, target in channels:
            listener.setblocking(False)
            self._listeners.append(listener)
            self.watch(listener.fileno(), self._acceptor(listener, target))

    # -- the loop ----------------------------------------------

    def watch(self, fd: int, call: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call ``call(events)`` whenever ``fd`` is ready."""
        self._epoll.register(fd, events)
        self._handlers[fd] = call

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; it may be unknown."""
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def step(self, timeout: float | None = None) -> None:
        """Wait up to ``timeout`` seconds (None: for ever) for something to do, and do it."""
        if self._waiting:
            timeout = _RETRY if timeout is None else min(timeout, _RETRY)
        for fd, events in self._epoll.poll(timeout):
            # an earlier event of this round may have closed it
            if handler := self._handlers.get(fd):
                handler(events)
        if self._waiting:
            self._reach_kernel()

    def close(self) -> None:
        """Close everything at once."""
        for link in list(self._links):
            self._close(link)
        self._stop_listening()
        self._epoll.close()

    @property
    def links(self) -> int:
        """How many connections are open."""
        return len(self._links)

    def kernel_gone(self) -> None:
        """The kernel has exited: take no new connection, and let what it said still reach its clients."""
        self._kernel_gone = True
        self._stop_listening()
        for link in self._waiting:
            self._close(link)
        self._waiting.clear()
        for link in list(self._links):
            while link in self._links and link.kernel is not None and not link.down.ended and not link.down.stuck:
                if not self._read(link, link.kernel, link.client, link.down):
                    link.down.ended = True
            self._settle(link)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            self.unwatch(listener.fileno())
            listener.close()
        self._listeners.clear()

    # -- connections ----------------------------------------------

    def _acceptor(self, listener: socket.socket, target: str) -> Callable[[int], None]:
        def accept(_events: int) -> None:
            try:
                client, _ = listener.accept()
            except OSError:  # it went away again, or we are out of descriptors
                return
            client.setblocking(False)
            if client.family != socket.AF_UNIX:
                # Nagle's algorithm waits for the peer's delayed ACK: 40 ms a message
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, target, _Flow(Backlog(self._spill)), _Flow(Backlog(self._spill)))
            self._links.add(link)
            self._waiting.append(link)
            self._reach_kernel()

        return accept

    def _reach_kernel(self) -> None:
        still: list[_Link] = []
        for link in self._waiting:
            kernel = self._connect(link.target)
            if kernel is None:
                still.append(link)  # the client's bytes wait in its socket
                continue
            link.kernel = kernel
            client = link.client
            self.watch(client.fileno(), lambda events, link=link: self._on_client(link, events), 0)  # type: ignore[misc]
            self.watch(kernel.fileno(), lambda events, link=link: self._on_kernel(link, events), 0)  # type: ignore[misc]
            link.masks = {client.fileno(): 0, kernel.fileno(): 0}
            self._settle(link)
        self._waiting = still

    def _on_client(self, link: _Link, events: int) -> None:
        assert link.kernel is not None
        if events & select.EPOLLOUT:
            self._flush(link, link.client, link.down)
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and link in self._links:
            self._read(link, link.client, link.kernel, link.up)
        self._settle(link)

    def _on_kernel(self, link: _Link, events: int) -> None:
        assert link.kernel is not None
        if events & select.EPOLLOUT:
            self._flush(link, link.kernel, link.up)
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and link in self._links:
            self._read(link, link.kernel, link.client, link.down)
        self._settle(link)

    def _read(self, link: _Link, source: socket.socket, sink: socket.socket, flow: _Flow) -> bool:
        """Move one chunk on; False when there was nothing."""
        if flow.ended:
            # reported by EPOLLHUP, which cannot be masked: both directions are over
            if source is link.client:
                self._close(link)
            else:
                self.unwatch(source.fileno())
                link.up.backlog.close()
                link.up.shut = True
            return False
        try:
            count = source.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError:
            if source is link.client:
                self._close(link)
                return False
            count = 0
        if count == 0:
            flow.ended = True
            return False
        self.moved = time.monotonic()
        data = self._buffer[:count]
        if flow.shut:
            return True  # nobody is there to take it
        try:
            if not flow.backlog:
                with contextlib.suppress(BlockingIOError):
                    data = data[sink.send(data) :]
        except OSError:
            self._lost(link, sink, flow)
            return True
        if data:
            try:
                flow.backlog.push(data)
            except OSError as error:
                # Better wait than lose: from here the kernel's own queue has to hold, as with any slow reader.
                print(f"workbench-kernel: cannot store output on its way: {error}", file=sys.stderr)
                flow.stuck = True
        return True

    def _flush(self, link: _Link, sink: socket.socket, flow: _Flow) -> None:
        try:
            if flow.backlog and flow.backlog.send(sink):
                self.moved = time.monotonic()
        except BlockingIOError:
            return
        except OSError:
            self._lost(link, sink, flow)

    def _lost(self, link: _Link, sink: socket.socket, flow: _Flow) -> None:
        """``sink`` takes nothing any more."""
        if sink is link.client:
            self._close(link)
        else:  # the kernel has died; what it has said before is still to be read
            flow.backlog.close()
            flow.shut = True

    def _settle(self, link: _Link) -> None:
        """Pass on an end of stream, close what is over, and ask epoll for what is still of interest."""
        if link not in self._links or link.kernel is None:
            return
        for flow, sink in ((link.up, link.kernel), (link.down, link.client)):
            if not flow.backlog:
                flow.stuck = False
                if flow.ended and not flow.shut:
                    flow.shut = True
                    with contextlib.suppress(OSError):
                        sink.shutdown(socket.SHUT_WR)
        if link.up.ended and link.down.ended and link.up.shut and link.down.shut:
            self._close(link)
            return
        # From the client only what the kernel has room for; from the kernel always.
        self._interest(link, link.client, not link.up.ended and not link.up.backlog, bool(link.down.backlog))
        self._interest(link, link.kernel, not link.down.ended and not link.down.stuck, bool(link.up.backlog))

    def _interest(self, link: _Link, sock: socket.socket, read: bool, write: bool) -> None:
        fd = sock.fileno()
        mask = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        if link.masks.get(fd) != mask and fd in self._handlers:
            self._epoll.modify(fd, mask)
            link.masks[fd] = mask

    def _close(self, link: _Link) -> None:
        self._links.discard(link)
        if link in self._waiting:
            self._waiting = [other for other in self._waiting if other is not link]
        for sock in (link.client, link.kernel):
            if sock is not None:
                if sock.fileno() >= 0:
                    self.unwatch(sock.fileno())
                sock.close()
        link.up.backlog.close()
        link.down.backlog.close()


Connect = Callable[[str], socket.socket | None]


def sockets_of(folder: int) -> Connect:
    """Reaches the Unix sockets of an open folder by their names.

    It is writable from inside the container, so a name in it is only followed if it *is* a socket.
    """

    def connect(name: str) -> socket.socket | None:
        try:
            handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None
        kernel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not stat.S_ISSOCK(os.fstat(handle).st_mode):
                raise OSError("no socket")
            kernel.setblocking(False)
            # by descriptor: a sun_path holds 108 bytes only, and what was checked is what is reached
            kernel.connect(f"/proc/self/fd/{handle}")
        except OSError:  # bound but not listening yet, or its queue of connections is full
            kernel.close()
            return None
        finally:
            os.close(handle)
        return kernel

    return connect


def port(number: str) -> socket.socket | None:
    """Reaches a TCP port of this network namespace's loopback."""
    kernel = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        kernel.settimeout(0.2)  # at once, there is no way to go; unless the kernel's queue is full
        kernel.connect(("127.0.0.1", int(number)))
        kernel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kernel.setblocking(False)
    except OSError:
        kernel.close()
        return None
    return kernel
