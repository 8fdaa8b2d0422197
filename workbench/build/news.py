"""What a step prints: kept in a log, told in short as progress, and read when the step has failed."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

Progress = Callable[[str], None]

#: Seconds between two lines of passing news.
INTERVAL = 1.0
TAIL = 15

_TERMINAL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r(?!\n)")


class Log:
    """The output of one step: a pipe's reading end, copied to a file by a thread of its own.

    progress gets a line now and then that begins with two spaces: passing news, to be overwritten.
    """

    def __init__(self, path: str, name: str, progress: Progress) -> None:
        self.path, self._name, self._progress = path, name, progress
        self._file = open(path, "ab", buffering=0)
        self._counts = Counts()
        self._last_said = 0.0
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.text: deque[str] = deque(maxlen=400)

    def __enter__(self) -> Log:
        reading, self.writing = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._copy, args=(reading,), name="workbench-log", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The containers are gone by now and with them the other copies of this end.
        os.close(self.writing)
        self._thread.join()
        self._file.close()

    def _copy(self, reading: int) -> None:
        rest = b""
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while data := pipe.read(1 << 16):
                with suppress(OSError):  # a full disk: the step itself will say so
                    self._file.write(data)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._line(line)
        if rest:
            self._line(rest)

    def _line(self, raw: bytes) -> None:
        line = _TERMINAL.sub(b"", raw).decode(errors="replace").strip()
        if not line:
            return
        self.tail.append(line)
        self.text.append(line)
        said = self._counts.say(line)
        now = time.monotonic()
        if said and now - self._last_said >= INTERVAL:
            self._last_said = now
            self._progress(f"  {self._name}: {said}")


# Of apt's downloads only packages have a version before their size; its indexes have none.
_COUNTED = (
    (r"Get:\d+ \S+ \S+ \S+ (\S+) \S+ \S+ \[", "fetching"),
    (r"Unpacking (\S+)", "unpacking"),
    (r"Setting up (\S+)", "setting up"),
)
_MMDEBSTRAP = {
    "running apt-get update": "reading the package lists",
    "downloading packages with apt": "downloading packages",
    "extracting archives": "unpacking packages",
    "installing essential packages": "installing essential packages",
    "installing remaining packages inside the chroot": "installing the other packages",
    "cleaning package lists and apt cache": "cleaning up",
}


class Counts:
    """Turns the lines of apt, dpkg, mmdebstrap and uv into "unpacking 12 of 40"."""

    def __init__(self) -> None:
        self._total = 0
        self._done = {"fetching": 0, "unpacking": 0, "setting up": 0}

    def say(self, line: str) -> str:
        """The news in a line, or nothing."""
        if found := re.search(r"\b(\d+) newly installed", line):
            self._total = int(found[1])
        for pattern, what in _COUNTED:
            if found := re.match(pattern, line):
                self._done[what] += 1
                of = f" of {self._total}" if self._total >= self._done[what] else ""
                return f"{what} {self._done[what]}{of} ({found[1]})"
        if found := re.match(r"I: (.*?)\.*$", line):
            return _MMDEBSTRAP.get(found[1], "")
        if re.match(r"(Get|Hit|Ign):1 ", line):
            return "reading the package lists"
        if line == "Building dependency tree...":
            return "choosing packages"
        if re.match(r"(Resolved|Prepared|Installed|Downloading|Building|Fetched) ", line):
            return line[:1].lower() + line[1:]
        return ""


def explain(lines: list[str], suite: str) -> tuple[str, str]:
    """What stood in a failed step's way and what to do, from the end of its output.

    Falls back on the last line that looks like an error.
    """
    text = "\n".join(lines)
    flat = " ".join(re.sub(r"[│╰─▶×├╴]", " ", text).split())
    for pattern, obstacle, remedy in _KNOWN:
        found = re.search(pattern, text, re.MULTILINE) or re.search(pattern, flat)
        if found:
            return found.expand(obstacle).replace("SUITE", suite), remedy
    errors = [line for line in lines if re.match(r"(E:|error|ERROR|fatal)", line)] or lines
    return (errors[-1] if errors else "it ended without a word"), ""


def missing(lines: list[str]) -> tuple[str, ...]:
    """The packages, of those that a failed step asked for, that no archive and no index has: ``name``,
    ``name=version`` (Debian's) or ``name==version`` (Python's)."""
    flat = " ".join(re.sub(r"[│╰─▶×├╴]", " ", " ".join(lines)).split())
    found = [f"{name}={version}" for version, name in re.findall(r"E: Version '([^']+)' for '([^']+)' was not", flat)]
    for pattern in _MISSING:
        found += re.findall(pattern, flat)
    return tuple(dict.fromkeys(found))


_MISSING = (
    r"E: Unable to locate package (\S+)",
    r"E: Package '([^']+)' has no installation candidate",
    r"[Bb]ecause (\S+) was not found in the (?:package registry|provided package locations)",
    r"[Bb]ecause there (?:is|are) no versions? of (\S+==\S+?),? and you require",
    r"[Bb]ecause only \S+ is available and you require (\S+==\S+?),",
)

_NAMES = "correct the name in the recipe"
_KNOWN = (
    (r"No space left on device", "no space is left on the disk", "free some and build again"),
    (r"^E: Unable to locate package (\S+)", r"Debian SUITE has no package '\1'", _NAMES),
    (r"^E: Package '([^']+)' has no installation candidate", r"Debian SUITE has no package '\1'", _NAMES),
    (
        r"^E: Version '([^']+)' for '([^']+)' was not found",
        r"Debian SUITE has no version \1 of package '\2'",
        "leave the version out or correct it",
    ),
    (
        r"^E: The following packages have unmet dependencies|^E: Unable to correct problems",
        "the Debian packages cannot be installed together",
        "see the log",
    ),
    (
        r"Because (\S+) was not found in the (?:package registry|provided package locations)",
        r"there is no Python package '\1'",
        _NAMES,
    ),
    (
        r"Because there (?:is|are) no versions? of (\S+?(?:[=<>!~]\S*)?) ",
        r"there is no version \1",
        "correct the version in the recipe",
    ),
    (
        r"Because only (\S+) is available and you require (\S+?),",
        r"there is no version \2 (only \1)",
        "correct the version in the recipe",
    ),
    (
        r"you require ([^.]+?(?:\.\d[^.]*?)*), we can conclude that your requirements are unsatisfiable",
        r"\1 do not go together",
        "loosen the versions in the recipe",
    ),
    (r"Failed to parse: `([^`]*)`", r"'\1' is no Python requirement", "see PEP 508"),
    (
        r"(?:Temporary failure resolving|Could not resolve|dns error)[^'`\"]*['`\"]?([\w.-]*)",
        r"the name \1 cannot be resolved",
        "check the network and the proxy settings",
    ),
    (
        r"(?:Could not connect to|Failed to fetch:?|Unable to connect to) [`'\"]?(\S+?)[`'\"]?[\s:]",
        r"\1 cannot be reached",
        "check the network and the proxy settings",
    ),
    (r"NO_PUBKEY|is not signed", "the host lacks Debian's keys", "install debian-archive-keyring"),
)
