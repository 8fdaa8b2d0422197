"""Waits for a kernel that was started to listen, so that the first attempt of every client meets it.

A client whose connection is refused tries again only 0.1 to 0.2 s later, each of its channels by a clock of its own
(ZMQ_RECONNECT_IVL, zmq_setsockopt(3)): a kernel this quick would answer on shell before the client hears its iopub,
and the outputs in between are nobody's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from workbench.jupyter import connection

#: Seconds that a start waits for the kernel's sockets; a kernel that is slower is met by its clients' next attempt.
_LISTENING = 10.0
#: Seconds between two looks for them.
_LOOK = 0.005


async def until_listening(run_dir: str, ended: Callable[[], bool]) -> None:
    """Until the kernel has made all of its sockets, or has ended, or takes too long for it."""
    names = [f"{run_dir}/{name}" for name in connection.SOCKETS]
    patience = time.monotonic() + _LISTENING
    while not (all(map(os.path.lexists, names)) or ended() or time.monotonic() > patience):
        await asyncio.sleep(_LOOK)
