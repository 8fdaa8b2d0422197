"""How far long work is, on a line that is written over."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Nothing is shown before the first ``show``. In a notebook a display, in a terminal a line, else lines."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._kind = ""
        self._began = time.monotonic()

    def show(self, text: str) -> None:
        """In the place of what was said before."""
        if not self._kind:
            self._kind = "notebook" if _in_a_notebook() else "terminal" if sys.stderr.isatty() else "lines"
        if self._kind == "notebook":
            self._display(text)
        elif self._kind == "terminal":
            print("\r\033[K" + text, end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _display(self, text: str) -> None:
        from IPython import display

        if self._handle is None:
            show: Any = display.display
            self._handle = show({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)

    def end(self, stopped: bool = False) -> None:
        """It has come to its end, or was stopped; the first one counts."""
        if self._kind == "notebook":
            self._display("{} {:.1f} s".format("stopped after" if stopped else "took", time.monotonic() - self._began))
        elif self._kind == "terminal":
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._kind = "over" if self._kind else ""


def _in_a_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
