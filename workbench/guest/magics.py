"""``%container`` in a notebook: snapshots, history and state of the container that the kernel runs in."""

from __future__ import annotations

import os
import sys
from typing import Any

from . import files, succession, tables, words
from .api import SOCKET, Refused, ask, ask_shell

_SHOWN = {
    "status": tables.show_status, "snapshot": tables.show_snapshot, "log": tables.show_log, "diff": tables.show_diff,
    "show": tables.show_show, "tag": tables.show_tag, "branch": tables.show_branch,
    "export": tables.show_export, "freeze": tables.show_freeze,
    "checkout": succession.show_checkout, "reset": succession.show_checkout,
}  # fmt: skip
#: What is more than a question and an answer.
_ASKED = {"export": files.export, "freeze": files.freeze}


def run(line: str) -> Any:
    """What ``%container LINE`` does; what a cell shows as its value, if anything."""
    try:
        request = words.parse(line)
        if request["do"] == "help":
            print(words.HELP)
            return None
        asked = {key: value for key, value in request.items() if key != "oneline"}  # how it is shown is our own
        value = _ASKED.get(request["do"], ask)(asked) if os.path.exists(SOCKET) else ask_shell(asked)
        return _SHOWN[request["do"]](value, request)
    except Refused as refused:
        print(f"%container: {refused}", file=sys.stderr)
        return None


def load(shell: Any) -> None:
    """Add ``%container`` to an IPython."""
    shell.register_magic_function(run, "line", "container")
    if os.path.exists(SOCKET):
        succession.greet(shell)
