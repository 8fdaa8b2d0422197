"""One kernel after the other: the next answers the cell in which the one before it ended."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from .api import PATIENCE, Refused, Request, ask


def show_checkout(value: Any, _request: Request) -> None:
    """What the container is over now; the kernel ends here where that takes another one."""
    name = " ({})".format(value["ref"]) if value.get("ref") else ""
    if not value["again"]:
        print(
            "snapshots move {} from now on".format(value["ref"]) if name else "detached: the next snapshot gets a name"
        )
        return
    print("the kernel starts anew; its variables are gone")
    sys.stdout.flush()
    ask({"do": "again", "reply": _unanswered()})
    time.sleep(PATIENCE)  # in which this process ends, and its successor answers for it
    raise Refused("the kernel was not started again; the log of its launcher says why")


def _kernel() -> Any:
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None)


def _unanswered() -> dict[str, Any]:
    """The request that this cell came with, for the kernel that follows to answer: a client waits for that."""
    kernel = _kernel()
    try:
        parent = kernel.get_parent("shell")
        find = getattr(kernel, "_get_shell_context_var", None)  # ipykernel 7
        idents = find(kernel._shell_parent_ident) if find else kernel._parent_ident["shell"]
        header = json.loads(json.dumps(parent["header"], default=str))
        return {
            "header": header, "idents": [bytes(ident).hex() for ident in idents], "count": kernel.shell.execution_count,
        }  # fmt: skip
    except (AttributeError, KeyError, TypeError, LookupError):  # a kernel of another make: its client has to look
        return {}


def _answer(kernel: Any, reply: dict[str, Any], notice: str) -> None:
    """Answer the request that the kernel before this one could not."""
    parent, idents = {"header": reply["header"]}, [bytes.fromhex(ident) for ident in reply["idents"]]
    thread = getattr(kernel, "shell_channel_thread", None)
    channel = thread.manager.get_subshell_to_shell_channel_socket(None) if thread else kernel.shell_stream
    content = {"status": "ok", "execution_count": reply.get("count", 0), "payload": [], "user_expressions": {}}
    said = [("stream", {"name": "stdout", "text": notice + "\n"}), ("status", {"execution_state": "idle"})]
    if not notice:
        del said[0]
    kernel.session.send(channel, "execute_reply", content, parent=parent, ident=idents)
    for kind, value in said:
        kernel.session.send(kernel.iopub_socket, kind, value, parent=parent, ident=kernel._topic(kind))


def _answer_for_subshells(kernel: Any) -> None:
    """The main subshell takes what widgets send to others, of whose end JupyterLab has not heard."""
    manager: Any = getattr(getattr(kernel, "shell_channel_thread", None), "manager", None)
    if not hasattr(manager, "list_subshell"):
        return
    find = manager.get_shell_channel_to_subshell_socket

    def found(subshell: str | None) -> Any:
        return find(subshell if subshell in manager.list_subshell() else None)

    manager.get_shell_channel_to_subshell_socket = found


def _revive(model: str) -> None:
    try:
        from . import dashboard

        dashboard.revive(model)
    except Exception:  # other packages than before: a kernel without it is still a kernel
        pass


def greet(shell: Any) -> None:
    """Say what the launcher of this kernel has to tell, and answer for the kernel before."""
    try:
        hello = ask({"do": "hello"})
    except Refused:
        return
    if hello["dashboard"]:
        _revive(hello["dashboard"])
    kernel = getattr(shell, "kernel", None)
    if hello["reply"] and kernel is not None:
        _answer_for_subshells(kernel)
        from tornado.ioloop import IOLoop

        # Clients look for their kernel some ten times a second; what is sent before they have found it is lost.
        for seconds, notice in ((0.4, hello["notice"]), (1.5, "")):
            IOLoop.current().call_later(seconds, _answer, kernel, hello["reply"], notice)
    elif hello["notice"]:

        def say(*_: Any) -> None:
            shell.events.unregister("pre_run_cell", say)
            print("%container: " + hello["notice"], file=sys.stderr)

        shell.events.register("pre_run_cell", say)
