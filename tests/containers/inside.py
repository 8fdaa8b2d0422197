"""Running a probe inside a container and reading what it printed."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import dataclass
from typing import Any

from workbench.model import Exit
from workbench.workbench import Workbench

PYTHON = "/usr/bin/python3"


@dataclass
class Outcome:
    text: str
    end: Exit
    kept: bool
    id: str

    @property
    def json(self) -> Any:
        assert self.end.code == 0, (self.end, self.text)
        return json.loads(self.text)


def run(workbench: Workbench, image: str, argv: list[str], *, cwd: str | None = None, **options: Any) -> Outcome:
    """Run a command in a container of its own; its standard output and error, its end, and whether it stayed."""
    container = workbench.create(image, argv=argv, cwd=cwd, **options)
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        container.start((null, writing, writing)).result(timeout=30)
    except BaseException:
        container.settle()
        os.close(reading)
        raise
    finally:
        os.close(writing)
        os.close(null)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode(errors="replace")
    end = container.exited.result(timeout=60)
    return Outcome(text, end, container.settle(), container.id)


def probe(workbench: Workbench, image: str, code: str, **options: Any) -> Any:
    """Run Python inside that prints one JSON value; the value."""
    return run(workbench, image, [PYTHON, "-c", textwrap.dedent(code)], **options).json
