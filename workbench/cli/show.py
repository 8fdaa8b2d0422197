"""Printing: JSON for programs, lines and tables for people (pandas, imported only when there is one to print).

Messages, names and paths may be those of an image that a stranger made: whatever a person reads goes through ``say`` or
``table``, where nothing of it can act on the terminal.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from workbench.model import Meter, how_far, printable

#: A column is cut no narrower than this to fit a terminal.
NARROWEST = 12
#: Seconds of work without a word, and from one word of progress to the next.
QUIET, BETWEEN = 0.5, 0.1


def as_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))  # of a name that is no UTF-8


def say(*lines: str) -> None:
    """Lines on stdout; what in one would end it, or act on a terminal, is made visible."""
    for line in lines:
        print(printable(line))


@contextmanager
def progress() -> Iterator[Meter | None]:
    """For what may take long: a line on the terminal that is written over, and gone afterwards; without one nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    following, shown = time.monotonic() + QUIET, False

    def meter(what: str, done: int, total: int) -> None:
        nonlocal following, shown
        if (now := time.monotonic()) >= following:
            following, shown = now + BETWEEN, True
            print(f"\r\033[K{how_far(what, done, total)}", end="", file=sys.stderr, flush=True)

    try:
        yield meter
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def age(moment: str | float, now: datetime | None = None) -> str:
    """``3 minutes ago`` from an ISO 8601 text or seconds since 1970; empty for an empty text."""
    if moment == "":
        return ""
    if isinstance(moment, str):
        try:
            then = datetime.fromisoformat(moment.replace("Z", "+00:00"))
        except ValueError:
            return moment
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
    else:
        then = datetime.fromtimestamp(moment, UTC)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    if seconds < 5:
        return "now"
    for unit, size in (("year", 31557600), ("month", 2629800), ("week", 604800), ("day", 86400),
                       ("hour", 3600), ("minute", 60), ("second", 1)):  # fmt: skip
        count = int(seconds // size)
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "now"


def table(rows: Sequence[Mapping[str, str]], *, width: int | None = None) -> str:
    """Rows of equal keys as an aligned table: the keys are the header, the last column is cut to fit.

    width: columns of text; default: the terminal's where stdout is one, else no limit.
    """
    import pandas

    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    frame = pandas.DataFrame([{name: printable(text) for name, text in row.items()} for row in rows], dtype=str)
    frame.columns = [str(name).upper() for name in frame.columns]
    if width is not None and len(frame.columns):
        last = frame.columns[-1]
        others = sum(max(len(name), *frame[name].str.len()) + 2 for name in frame.columns[:-1])
        room = max(width - others, NARROWEST)
        frame[last] = [text if len(text) <= room else text[: room - 1] + "…" for text in frame[last]]
    for name in frame.columns:
        frame[name] = frame[name].str.ljust(max(len(name), *frame[name].str.len()) + 1)
    with pandas.option_context("display.max_colwidth", None):
        text = str(frame.to_string(index=False, justify="left", col_space=0))
    # to_string keeps a blank before the first column and pads the last one.
    return "\n".join(line.removeprefix(" ").rstrip() for line in text.splitlines())


def error(text: str) -> None:
    """One line on stderr, as every message of the command line begins."""
    print(f"jupyter workbench: {printable(text)}", file=sys.stderr, flush=True)
