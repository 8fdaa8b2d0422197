"""A terminal inside, shown on the one outside: raw mode, bytes both ways, the size followed (termios(3))."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CHUNK = 1 << 16


class Terminal:
    """Descriptors 0 and 1 tied to a pty's master while the block lasts; restored however it ends."""

    def __init__(self, master: int) -> None:
        # A copy: the container closes its own when it is settled.
        self.master = os.dup(master)
        self._before: list[Any] = []

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(0)
        self.resize()
        tty.setraw(0, termios.TCSADRAIN)
        return self

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(0, termios.TCSADRAIN, self._before)
        os.close(self.master)

    def resize(self) -> None:
        """Give the inner terminal the outer one's rows and columns; its programs get a SIGWINCH."""
        with suppress(OSError):
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def attend(self, pass_on: Callable[[int], None], wakeup: int, done: int) -> None:
        """Carry bytes until the container has ended and all its output is shown.

        wakeup: delivers signals as bytes; done: becomes readable at the container's end.
        """
        os.set_blocking(self.master, False)
        poll = select.poll()
        for fd in (0, self.master, wakeup, done):
            poll.register(fd, select.POLLIN)
        pending = b""
        while True:
            # What was typed and not yet taken: don't read more, and wait until the inner side takes it.
            poll.modify(self.master, select.POLLIN | (select.POLLOUT if pending else 0))
            for fd, event in poll.poll():
                if fd == wakeup:
                    for number in os.read(wakeup, 64):
                        self.resize() if number == signal.SIGWINCH else pass_on(number)
                elif fd == done:
                    if os.read(done, 1) == b"e":
                        self._drain()
                        return
                elif fd == 0:
                    if pending:
                        continue
                    typed = os.read(0, _CHUNK)
                    if typed:
                        pending = typed
                    else:  # the outer terminal was hung up
                        poll.unregister(0)
                        pass_on(signal.SIGHUP)
                else:
                    if event & (select.POLLIN | select.POLLHUP) and not self._show():
                        poll.unregister(self.master)
                        poll.register(self.master, 0)
                    if event & select.POLLOUT and pending:
                        with suppress(BlockingIOError):
                            pending = pending[os.write(self.master, pending) :]

    def _show(self) -> bool:
        """Some output; False when there is nobody left on the inner side (EIO, pty(7))."""
        try:
            data = os.read(self.master, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        while data:
            data = data[os.write(1, data) :]
        return bool(data == b"")

    def _drain(self) -> None:
        while select.select([self.master], [], [], 0)[0] and self._show():
            pass
