"""Builds that a server runs: each in a process of its own, so that it can be cancelled and costs the server nothing.

What they say is kept while the server lives, and emitted as events (jupyter_events).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from workbench.jupyter.events import BUILD, Tell
from workbench.model import Conflict, InvalidInput, NotFound

#: Lines of one build, and finished builds, that are remembered.
LINES, KEPT = 2000, 50
#: Bytes of a line.
LONGEST = 4096


class Build:
    """One build and how it stands. status: ``running``, ``finished``, ``failed`` or ``cancelled``."""

    def __init__(self, recipe: str, tell: Tell) -> None:
        self.id = secrets.token_hex(6)
        self.recipe, self._emit = recipe, tell
        self.status = "running"
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.lines: deque[str] = deque(maxlen=LINES)
        self.result: dict[str, Any] | None = None
        self.error = ""
        self._process: asyncio.subprocess.Process | None = None
        self._cancelled = False
        self.task: asyncio.Task[None] | None = None

    def row(self, lines: bool = False) -> dict[str, Any]:
        """As plain values; lines: with what it said."""
        row = {
            "id": self.id, "recipe": self.recipe, "status": self.status, "started": self.started,
            "result": self.result, "error": self.error,
        }  # fmt: skip
        return row | {"lines": list(self.lines)} if lines else row

    async def run(self, command: list[str], environ: dict[str, str]) -> None:
        """Run it to its end, whatever that is."""
        try:
            await self._run(command, environ)
        except Exception as error:  # it must not be said to run for ever
            self.status, self.error = "failed", f"{type(error).__name__}: {error}"
            self._tell(self.status, self.error)

    async def _run(self, command: list[str], environ: dict[str, str]) -> None:
        self._tell("started")
        self._process = process = await asyncio.create_subprocess_exec(
            # Not with modules of the working folder, into which containers write.
            sys.executable, "-P", "-m", "workbench.jupyter.builds", str(os.getpid()), *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environ,
        )  # fmt: skip
        if self._cancelled:  # while it was being started
            self.cancel()
        assert process.stdout and process.stderr
        answer = asyncio.ensure_future(process.stdout.read())
        rest = b""
        while data := await process.stderr.read(1 << 16):
            *whole, rest = (rest + data).split(b"\n")
            rest = rest[-LONGEST:]
            for raw in whole:
                line = raw[:LONGEST].decode(errors="replace").rstrip()
                self.lines.append(line)
                self._tell("progress", line)
        code = await process.wait()
        with suppress(ValueError):
            self.result = json.loads(await answer)
        if self.result is not None:
            self.status = "finished"
        elif self._cancelled:
            self.status = "cancelled"
        else:
            self.status, self.error = "failed", (self.lines[-1] if self.lines else f"it ended with exit code {code}")
        self._tell(self.status, self.error)

    def cancel(self) -> None:
        """End it as Ctrl-C does. Raises Conflict when it has ended."""
        if self.status != "running":
            raise Conflict(f"cancel build {self.id}", f"it has {self.status}")
        self._cancelled = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    def _tell(self, action: str, line: str = "") -> None:
        self._emit(BUILD, build=self.id, recipe=self.recipe, action=action, line=line)


class Builds:
    """The builds of one server."""

    def __init__(self, tell: Tell) -> None:
        self._emit = tell
        self._known: dict[str, Build] = {}

    def start(self, recipe: str, options: list[str], environ: dict[str, str]) -> Build:
        """Begin one. recipe: a folder, or the name of a shipped recipe; options: of ``jupyter workbench build``."""
        build = Build(recipe, self._emit)
        self._known[build.id] = build
        for old in [known for known in self._known.values() if known.status != "running"][:-KEPT]:
            del self._known[old.id]
        command = ["build", "--json", *options, "--", recipe]
        build.task = asyncio.ensure_future(build.run(command, environ))
        return build

    def get(self, name: str) -> Build:
        """By its id. Raises NotFound."""
        if name not in self._known:
            raise NotFound("find a build", f"there is none {name!r}", "see GET /workbench/api/builds")
        return self._known[name]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each, the newest last."""
        return [build.row() for build in self._known.values()]


def recipe_in(root: str, text: str) -> str:
    """The recipe that a request may name: a shipped one, or a folder below the server's root. Raises InvalidInput."""
    from workbench.build import recipe

    if text in recipe.shipped():
        return text
    top = os.path.realpath(root)
    path = os.path.realpath(os.path.join(top, text.lstrip("/")))
    if path != top and not path.startswith(top.rstrip("/") + "/"):
        raise InvalidInput("build a recipe", f"{text} lies outside of the server's folder", "name one below it")
    if not os.path.isdir(path):
        raise NotFound("build a recipe", f"there is no folder {text}", f"shipped are {', '.join(recipe.shipped())}")
    return path


def main(server: str, *command: str) -> None:
    """In the build's process: become the command line, and end as by Ctrl-C when the server does."""
    from workbench.linux import syscalls as sc

    # A server that was started in the background ignores it, and what it starts would, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != int(server):
        sys.exit(130)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "workbench", *command])


if __name__ == "__main__":
    main(*sys.argv[1:])
