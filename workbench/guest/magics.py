"""``%container`` in a notebook: snapshots, history and state of the container that the kernel runs in.

Inside a container this one file is seen as the module ``workbench_guest``. It asks the process that launched the
kernel, over a Unix socket that belongs to this container alone: one line of JSON asks, and one answers. Outside of a
container ``%load_ext workbench`` loads it, and it asks the command line instead.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from typing import Any, Dict

Request = Dict[str, Any]

SOCKET = "/run/workbench/api"
_LINE = 16 << 20  # bytes of an answer
_PATIENCE = 600.0  # seconds

_HELP = """\
%container status                    this container: image, changes, memory, processor
%container snapshot -m "what changed" [-t NAME] [-a AUTHOR] [--dry-run]
%container log [IMAGE] [-n N] [--oneline]
%container diff [ONE [OTHER]] [--files]
%container show [IMAGE]
%container checkout [-f] IMAGE       this kernel anew in that environment (variables go, files of the container too)
%container checkout -b NAME [IMAGE]  snapshots move NAME from now on
%container reset [--hard] [IMAGE]    this kernel anew in its last snapshot
%container branch [NAME [IMAGE]]     names of its snapshots; a new one
%container tag NAME [IMAGE]
%container help

IMAGE: a name, an ID or a revision such as plots~1; by default the last snapshot of this container.
Without a container (`%load_ext workbench` in any notebook) log, diff, show and tag want an IMAGE."""


#: What nothing inside can ask for.
_ON_THE_HOST = {
    "export": "export NAME -o NAME.oci.tar", "import": "import NAME.oci.tar", "freeze": "freeze NAME",
    "build": "build FOLDER",
}  # fmt: skip


class Refused(Exception):
    """What the other side said instead of an answer, in one line."""


def ask(request: Request, path: str = SOCKET) -> Any:
    """Send one request to this container's socket; its answer. Raises Refused."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(_PATIENCE)
        try:
            channel.connect(path)
            channel.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                piece = channel.recv(1 << 16)
                if not piece or len(data) > _LINE:
                    raise Refused("the launcher of this kernel has gone away; nothing was changed by this cell")
                data += piece
        except OSError as error:
            raise Refused(
                "ask the launcher of this kernel: %s; restart the kernel" % (error.strerror or error)
            ) from None
    answer = json.loads(data)
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["value"]


def ask_shell(request: Request) -> Any:
    """The same of the command line, for a kernel that is in no container. Raises Refused."""
    verb = request.pop("do")
    if verb in ("snapshot", "status", "checkout", "reset", "branch"):
        raise Refused("this kernel runs in no container: choose one of the images in the launcher")
    image = request.get("image") or ""
    if verb == "diff":
        words = [str(request.get("one") or ""), str(request.get("other") or "")]
    elif verb == "tag":
        words = [str(request.get("name") or ""), image]
    else:
        words = [image]
    if not all(words):
        raise Refused("name an image; `jupyter workbench images` lists them")
    done = subprocess.run(
        [sys.executable, "-m", "workbench", verb, *([] if verb == "tag" else ["--json"]), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Refused(done.stderr.strip().rpartition("\n")[2].replace("jupyter workbench: ", "", 1))
    return json.loads(done.stdout) if verb != "tag" else done.stdout.strip()


# --- what is typed ---------------------------------------------------------------------------------------------


def parse(line: str) -> Request:
    """The request that a line means. Raises Refused."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise Refused(f"read the line: {error}") from None
    verb, rest = (words[0], words[1:]) if words else ("help", [])
    known: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
        "status": ({}, {}, 0), "help": ({}, {}, 0), "show": ({}, {}, 1),
        "snapshot": ({"-m": "message", "--message": "message", "-t": "tag", "--tag": "tag", "-a": "author",
                      "--author": "author"}, {"--dry-run": "dry_run"}, 0),
        "log": ({"-n": "number"}, {"--oneline": "oneline"}, 1), "diff": ({}, {"--files": "files"}, 2),
        "tag": ({}, {}, 2), "branch": ({}, {}, 2), "reset": ({}, {"--hard": "hard"}, 1),
        "checkout": ({"-b": "create"}, {"-f": "force", "--force": "force"}, 1),
    }  # fmt: skip
    if verb in _ON_THE_HOST:
        raise Refused("%s reads and writes files of the host: in a terminal, jupyter workbench %s" % (
            verb, _ON_THE_HOST[verb]))  # fmt: skip
    if verb not in known:
        raise Refused("{!r} is no verb of %container; it knows {}".format(verb, ", ".join(sorted(known))))
    values, flags, most = known[verb]
    request: Request = {"do": verb}
    plain = []
    while rest:
        word = rest.pop(0)
        if word in values:
            if not rest:
                raise Refused(f"{word} wants a value")
            request[values[word]] = rest.pop(0)
        elif word in flags:
            request[flags[word]] = True
        elif word.startswith("-"):
            raise Refused(f"%container {verb} has no option {word}")
        else:
            plain.append(word)
    if len(plain) > most:
        raise Refused(f"%container {verb} takes no {plain[most]!r}")
    names = {"diff": ["one", "other"], "tag": ["name", "image"], "branch": ["name", "image"]}.get(verb, ["image"])
    request.update(zip(names, plain))
    if verb == "tag" and not plain:
        raise Refused("%container tag wants a NAME")
    if verb == "checkout" and not {"image", "create"} & set(request):
        raise Refused("%container checkout wants an IMAGE, or -b NAME")
    if "number" in request:
        if not request["number"].isdigit():
            raise Refused("-n wants a number")
        request["number"] = int(request["number"])
    return request


# --- what is shown ---------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """``536870912`` as ``512.0 MiB``."""
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    """Rows as a DataFrame where pandas is there, else as aligned text."""
    try:
        import pandas
    except ImportError:
        cells = [list(columns)] + [[str(row.get(name, "")) for name in columns] for row in rows]
        widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
        print("\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells))
        return None
    return pandas.DataFrame([{name: row.get(name, "") for name in columns} for row in rows], columns=list(columns))


def show_status(value: Any, _request: Request) -> None:
    """What ``status`` answers, as lines."""
    lines = [
        ("image", "{} {}".format(value["image"], value["image_id"][7:19])),
        ("snapshot", "{} {}".format(value["ref"], value["head"][7:19]) if value["ref"] else "none yet"),
        ("changed since", "%d files and folders, %s" % (value["changes"], size(value["size"]))),
        ("network", value["network"]),
    ]
    usage = value.get("usage")
    if usage:
        lines += [
            ("memory", size(usage["memory"])),
            ("processes", usage["processes"]),
            ("processor", "{:.1f} s".format(usage["cpu"])),
        ]
    for name, limit in sorted(value["limits"].items()):
        if limit is not None:
            lines.append(("limit of " + name, size(limit) if name == "memory" else limit))
    print("\n".join("%-20s %s" % line for line in lines))


def show_snapshot(value: Any, request: Request) -> None:
    """As Git tells of a commit."""
    if request.get("dry_run"):
        for path in value["paths"]:
            print("/" + path)
        for path in value["skipped"]:
            print("left out: /" + path)
    if not value["image"]:
        said = "would be taken" if value["changes"] else "nothing has changed"
        print("%d changes, %s: %s" % (value["changes"], size(value["size"]), said))
        return
    print("[{} {}] {}".format(value["ref"], value["image"][7:19], request.get("message", "").strip().split("\n")[0]))
    print(" %d changes, %s; paused for %.0f ms" % (value["changes"], size(value["size"]), value["paused"] * 1e3))


def show_log(value: Any, request: Request) -> Any:
    """A table, or a line for each."""
    if request.get("oneline"):
        for entry in value:
            print("{}{} {}".format(entry["id"][7:19], _names(entry), entry["message"].split("\n")[0]))
        return None
    rows = [
        {"image": entry["id"][7:19], "names": ", ".join(entry["names"]), "message": entry["message"].split("\n")[0],
         "author": entry["author"], "date": entry["when"], "size": size(entry["size"])}
        for entry in value
    ]  # fmt: skip
    return table(rows, ("image", "names", "message", "author", "date", "size"))


def _names(entry: dict[str, Any]) -> str:
    return " ({})".format(", ".join(entry["names"])) if entry["names"] else ""


def show_diff(value: Any, request: Request) -> Any:
    """Counts, then packages or files."""
    files = value["files"]
    kinds = ["%d %s" % (sum(row["kind"] == kind for row in files), word)
             for kind, word in (("A", "added"), ("M", "modified"), ("D", "deleted"))]  # fmt: skip
    grown = sum(row["after"] - row["before"] for row in files)
    sign = "+" if grown >= 0 else "-"
    print(f"{len(value['packages'])} packages; {len(files)} files: {', '.join(kinds)}; {sign}{size(abs(grown))}")
    if request.get("files"):
        rows = [dict(row, path="/" + row["path"]) for row in files]
        return table(rows, ("kind", "path", "before", "after"))
    return table(value["packages"], ("name", "kind", "before", "after", "place")) if value["packages"] else None


def show_show(value: Any, request: Request) -> Any:
    """One image, and what it changed."""
    print("image {}{}".format(value["id"][7:], _names(value)))
    if value["author"]:
        print("Author: " + value["author"])
    print("Date:   {}\n\n    {}\n".format(value["when"], value["message"].replace("\n", "\n    ")))
    return show_diff(value["diff"], request) if value["diff"] else None


def show_tag(value: Any, _request: Request) -> None:
    """The name and the ID."""
    print(value)


def show_branch(value: Any, _request: Request) -> None:
    """As git-branch(1): a star before the one that snapshots move."""
    for row in value:
        print("{} {} {}".format("*" if row["current"] else " ", row["name"], row["image"][7:19]))


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
    time.sleep(_PATIENCE)  # in which this process ends, and its successor answers for it
    raise Refused("the kernel was not started again; the log of its launcher says why")


show_reset = show_checkout


# --- one kernel after the other --------------------------------------------------------------------------------


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
        return {"header": header, "idents": [bytes(ident).hex() for ident in idents]}
    except (AttributeError, KeyError, TypeError, LookupError):  # a kernel of another make: its client has to look
        return {}


def _answer(kernel: Any, reply: dict[str, Any], notice: str) -> None:
    """Answer the request that the kernel before this one could not."""
    parent, idents = {"header": reply["header"]}, [bytes.fromhex(ident) for ident in reply["idents"]]
    thread = getattr(kernel, "shell_channel_thread", None)
    channel = thread.manager.get_subshell_to_shell_channel_socket(None) if thread else kernel.shell_stream
    content = {"status": "ok", "execution_count": 0, "payload": [], "user_expressions": {}}
    said = [("stream", {"name": "stdout", "text": notice + "\n"}), ("status", {"execution_state": "idle"})]
    if not notice:
        del said[0]
    kernel.session.send(channel, "execute_reply", content, parent=parent, ident=idents)
    for kind, value in said:
        kernel.session.send(kernel.iopub_socket, kind, value, parent=parent, ident=kernel._topic(kind))


def _greet(shell: Any) -> None:
    """Say what the launcher of this kernel has to tell, and answer for the kernel before."""
    try:
        hello = ask({"do": "hello"})
    except Refused:
        return
    kernel = getattr(shell, "kernel", None)
    if hello["reply"] and kernel is not None:
        from tornado.ioloop import IOLoop

        # Clients look for their kernel some ten times a second; what is sent before they have found it is lost.
        for seconds, notice in ((0.4, hello["notice"]), (1.5, "")):
            IOLoop.current().call_later(seconds, _answer, kernel, hello["reply"], notice)
    elif hello["notice"]:

        def say(*_: Any) -> None:
            shell.events.unregister("pre_run_cell", say)
            print("%container: " + hello["notice"], file=sys.stderr)

        shell.events.register("pre_run_cell", say)


def run(line: str) -> Any:
    """What ``%container LINE`` does; what a cell shows as its value, if anything."""
    try:
        request = parse(line)
        if request["do"] == "help":
            print(_HELP)
            return None
        asked = {key: value for key, value in request.items() if key != "oneline"}  # how it is shown is our own
        value = ask(asked) if os.path.exists(SOCKET) else ask_shell(asked)
        return globals()["show_" + request["do"]](value, request)
    except Refused as refused:
        print(f"%container: {refused}", file=sys.stderr)
        return None


def load_ipython_extension(shell: Any) -> None:
    """Add ``%container`` to an IPython."""
    shell.register_magic_function(run, "line", "container")
    if os.path.exists(SOCKET):
        _greet(shell)
