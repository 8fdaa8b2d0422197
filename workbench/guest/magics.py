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

    def container(line: str) -> Any:
        value = run(line)
        if value is not None and _is_dropped(shell.user_global_ns):
            from IPython.display import display

            display(value)  # type: ignore[no-untyped-call, unused-ignore]
        return value  # also then: a function of another module may have called this

    container.__doc__ = words.HELP
    shell.register_magic_function(container, "line", "container")
    if os.path.exists(SOCKET):
        succession.greet(shell)


def _is_dropped(names: Any) -> bool:
    """Whether the statement of a user's that is being run does nothing with its value.

    IPython shows the value of a cell's last line only; a verb that one cannot see has not done what it is for. The last
    one is compiled to print it, and one that is assigned to store it. names: what users' code has for globals.
    """
    import dis

    frame = sys._getframe()
    while frame.f_globals is not names:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return next((step.opname == "POP_TOP" for step in dis.get_instructions(frame.f_code)
                 if step.offset > frame.f_lasti), False)  # fmt: skip
