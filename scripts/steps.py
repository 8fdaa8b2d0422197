"""Long commands with progress: what runs, its latest line, and how long it took.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds between two signs of life where the output is no terminal.
HEARTBEAT = 10.0


class StepError(Exception):
    """A command of the set-up ended badly; its last lines were shown."""


def say(text: str) -> None:
    """One line for people, at once."""
    print(text, flush=True)


def step(
    title: str,
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command quietly: its output goes to ``log``, a sign of life to the terminal.

    Raises StepError when it ends badly, after showing the last lines it wrote.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    lively = sys.stdout.isatty()
    if not lively:
        say(f"  {title} ...")
    last, shown = "", started
    with log.open("w") as file, selectors.DefaultSelector() as selector:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=env,
        )
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                if selector.select(timeout=0.5):
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    text = chunk.decode(errors="replace")
                    file.write(text)
                    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), last)
                now = time.monotonic()
                if lively:
                    width = shutil.get_terminal_size().columns - 1
                    print(
                        f"\r\033[K{f'  {title} ... {now - started:.0f} s  {last}'[:width]}",
                        end="",
                        flush=True,
                    )
                elif now - shown >= HEARTBEAT:
                    shown = now
                    say(f"    {now - started:.0f} s  {last[:90]}")
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            process.stdout.close()
            if lively:
                print("\r\033[K", end="", flush=True)
    seconds = time.monotonic() - started
    if code == 0:
        say(f"  {title}: {seconds:.1f} s")
        return
    for line in log.read_text().splitlines()[-20:]:
        say(f"    {line}")
    raise StepError(f"{title}: exit code {code} after {seconds:.1f} s; everything it wrote is in {log}")
