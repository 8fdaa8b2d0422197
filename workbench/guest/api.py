"""The other side of this container's socket: one line of JSON asks the launcher of the kernel, and one answers.

In a kernel that is in no container the command line answers instead.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any, Dict

Request = Dict[str, Any]

SOCKET = "/run/workbench/api"
PATIENCE = 600.0  # seconds
_LINE = 16 << 20  # bytes of an answer


class Refused(Exception):
    """What the other side said instead of an answer, in one line."""


def ask(request: Request, path: str = SOCKET) -> Any:
    """Send one request to this container's socket; its answer. Raises Refused."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(PATIENCE)
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
