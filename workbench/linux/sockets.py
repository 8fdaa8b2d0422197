"""Unix sockets that only their owner may connect to (unix(7))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def bind_private(listener: socket.socket, path: str) -> None:
    """Give a socket a name, in place of what has it now, with mode 0600 from its first moment. Raises OSError.

    The name gets the socket's own mode: nothing is to be changed afterwards, when somebody may have put a link there,
    and the umask, which all threads share, stays as it is.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(path)
