"""Several long pieces of work at once, of which none is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event

#: More gain nothing where all of them wait for one disk.
_MOST = 4
#: Seconds between two words to who waits.
_OFTEN = 0.2

#: Called now and then by a piece of work; raises when that is to end.
GoOn = Callable[[], None]


def run(pieces: Iterable[Callable[[GoOn], None]], meanwhile: Callable[[int], None], most: int = _MOST) -> None:
    """Run them all, one for each processor at a time and no more than ``most``, in the order given.

    meanwhile: is told how many are done, some times a second. The first error, one of its own or Ctrl-C ends the others
    and is raised once they have ended.
    """
    ended = Event()

    def go_on() -> None:
        if ended.is_set():
            raise CancelledError

    with ThreadPoolExecutor(width(most), "workbench-piece") as pool, _all_or_none(pool, ended):
        pending = {pool.submit(piece, go_on) for piece in pieces}
        count = len(pending)
        while pending:
            meanwhile(count - len(pending))
            done, pending = wait(pending, _OFTEN, FIRST_COMPLETED)
            for future in done:
                future.result()


def width(most: int = _MOST) -> int:
    """How many pieces run at a time."""
    return min(most, len(os.sched_getaffinity(0)))


@contextmanager
def _all_or_none(pool: ThreadPoolExecutor, ended: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        ended.set()
        pool.shutdown(cancel_futures=True)
        raise
