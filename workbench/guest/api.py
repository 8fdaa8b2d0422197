"""The other side of this container's socket: one line of JSON asks the launcher of the kernel, and one answers.

Before the answer there may be lines of progress, which are shown, and a line about what follows. Who interrupts the
cell ends the connection, and the launcher what it was at. In a kernel that is in no container the command line answers
instead.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any, BinaryIO, Callable, Dict

from .progress import Progress

Request = Dict[str, Any]
#: Gets what a line says about what follows, and the stream that it may follow on.
Heard = Callable[[Dict[str, Any], BinaryIO], None]

SOCKET = "/run/workbench/api"
PATIENCE = 600.0  # seconds
_BUSY = 10.0  # seconds in which a launcher that is busy is asked again
_LINE = 16 << 20  # bytes of an answer


class Refused(Exception):
    """What the other side said instead of an answer, in one line."""


def ask(request: Request, path: str = SOCKET, body: bytes = b"", heard: Heard | None = None) -> Any:
    """Send one request to this container's socket; its answer. body: bytes after its line. Raises Refused."""
    until = time.monotonic() + _BUSY
    while True:
        answer = _asked(json.dumps(request).encode() + b"\n" + body, path, heard)
        if not answer.get("busy") or time.monotonic() > until:
            break
        time.sleep(0.3)
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["value"]


def _asked(data: bytes, path: str, heard: Heard | None) -> dict[str, Any]:
    progress = Progress()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(PATIENCE)
        try:
            channel.connect(path)
            with suppress(BrokenPipeError, ConnectionResetError):  # then an answer is there already
                channel.sendall(data)
            with channel.makefile("rb") as stream:
                while True:
                    line = stream.readline(_LINE)
                    if not line.endswith(b"\n"):
                        raise Refused("the launcher of this kernel has gone away; nothing was changed by this cell")
                    answer: dict[str, Any] = json.loads(line)
                    if "progress" in answer:
                        progress.show(answer["progress"])
                    elif "about" not in answer:
                        progress.end()
                        return answer
                    elif heard is not None:
                        heard(answer["about"], stream)
        except BlockingIOError:  # too many wait to be let in (connect(2))
            return {"busy": True, "error": "ask the launcher of this kernel: it is busy; try again"}
        except OSError as error:
            raise Refused(
                "ask the launcher of this kernel: %s; restart the kernel" % (error.strerror or error)
            ) from None
        finally:
            progress.end(stopped=True)
            with suppress(OSError):  # also where a child that was forked meanwhile holds the other copy
                channel.shutdown(socket.SHUT_RDWR)


def ask_shell(request: Request) -> Any:
    """The same of the command line, for a kernel that is in no container. Raises Refused."""
    verb = request.pop("do")
    if verb in ("snapshot", "status", "checkout", "reset", "branch"):
        raise Refused("this kernel runs in no container: choose one of the images in the launcher")
    if verb in ("export", "freeze"):
        raise Refused(f"this kernel runs in no container: in a terminal, jupyter workbench {verb} IMAGE")
    image = request.get("image") or ""
    if verb == "diff":
        words = [str(request.get("one") or ""), str(request.get("other") or "")]
    elif verb == "tag":
        words = [str(request.get("name") or ""), image]
    else:
        words = [image]
    if not all(words):
        raise Refused("name an image; `jupyter workbench images` lists them")
    options = [] if verb == "tag" else ["--json"]
    options += ["--stat"] if request.get("stat") else []
    options += ["-n", str(request["number"])] if "number" in request else []
    done = subprocess.run(
        [sys.executable, "-m", "workbench", verb, *options, *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Refused(done.stderr.strip().rpartition("\n")[2].replace("jupyter workbench: ", "", 1))
    return json.loads(done.stdout) if verb != "tag" else done.stdout.strip()
