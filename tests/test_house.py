"""The house's rules: style, types, the import contract, and sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SOURCES = [name for name in ("workbench", "scripts", "tests", "benchmarks") if (TOP / name).is_dir()]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([str(BIN / "ruff"), "check", "--output-format", "concise", *SOURCES], id="ruff"),
        pytest.param([str(BIN / "ruff"), "format", "--check", *SOURCES], id="ruff-format"),
        pytest.param([sys.executable, "-m", "mypy"], id="mypy"),
        pytest.param([str(BIN / "lint-imports")], id="lint-imports"),
    ],
)
def test_tool_is_content(command: list[str]) -> None:
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_small() -> None:
    long = {
        str(path.relative_to(TOP)): lines
        for path in (TOP / "workbench").rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"over 500 lines: {long}"


def test_light_where_it_must_be() -> None:
    """The helper and every client that looks at a kernelspec import these."""
    heavy = "{'pandas', 'pyroute2', 'zmq', 'msgspec', 'traitlets', 'asyncio', 'tornado'}"
    for module in ("workbench", "workbench.containers.helper", "workbench.cli"):
        code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", f"{module} imports {done.stdout}"
