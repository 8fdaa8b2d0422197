"""Clients built on jupyter_client, each as its users start it, without any server extension."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.usefixtures("image")


def notebook(folder: Path, *cells: str) -> Path:
    """A notebook with these code cells and no kernelspec of its own."""
    path = folder / "n.ipynb"
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbformat.write(node, path)
    return path


def outputs(path: Path) -> list[str]:
    """The text of every output."""
    return [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in nbformat.read(path, 4).cells
        for output in cell.get("outputs", [])
    ]


def test_jupyter_execute(tmp_path: Path) -> None:
    path = notebook(tmp_path, "import os; print(os.getcwd())", "import platform; len(platform.node())")
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", "--kernel_name=wb-python", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert outputs(path) == [f"{tmp_path}\n", "12"]


def test_jupyter_execute_says_why_a_kernel_died(tmp_path: Path) -> None:
    path = notebook(tmp_path, "import os, time; time.sleep(0.3); os.kill(os.getpid(), 9)")
    command = [sys.executable, "-m", "jupyter", "execute", "--kernel_name=wb-python", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search(r"Kernel died: .*SIGKILL", done.stderr)


def test_papermill(tmp_path: Path) -> None:
    path = notebook(tmp_path, "x = 6", "print(x * 7)", "import os, time; time.sleep(0.3); os._exit(3)")
    command = [sys.executable, "-m", "papermill", "-k", "wb-python", str(path), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    found = outputs(tmp_path / "out.ipynb")
    assert found[0] == "42\n"
    assert "exit code 3" in found[1]  # the reason stands in the notebook


class Console:
    """``jupyter console`` on a terminal."""

    def __init__(self, folder: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "jupyter", "console", "--kernel", "wb-python"])
        self.seen = ""

    def expect(self, pattern: str, timeout: float = 60) -> None:
        """Wait until something is printed."""
        until = time.monotonic() + timeout
        while not re.search(pattern, self.seen):
            assert time.monotonic() < until, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    part = os.read(self.fd, 1 << 16).decode(errors="replace")
                except OSError:
                    part = ""
                assert part, f"ended: {self.seen}"
                self.seen += part
                if "\x1b[6n" in part:  # prompt_toolkit asks where the cursor is
                    os.write(self.fd, b"\x1b[1;1R")
        self.seen = ""

    def type(self, text: str) -> None:
        """Type it, and return."""
        os.write(self.fd, text.encode() + b"\r")

    def close(self) -> None:
        """Close the terminal's window."""
        os.close(self.fd)  # SIGHUP
        os.waitpid(self.pid, 0)


def test_jupyter_console(tmp_path: Path) -> None:
    console = Console(tmp_path)
    console.expect(r"In \[1\]")
    console.type("print(6 * 7, len(__import__('platform').node()))")
    console.expect(r"42 12")
    console.type("import time; time.sleep(60)")
    time.sleep(1)
    os.write(console.fd, b"\x03")  # Ctrl-C reaches the whole process group
    console.expect(r"KeyboardInterrupt", timeout=10)
    console.type("print('still', 'here')")
    console.expect(r"still here")
    console.type("import os; time.sleep(0.3); os.kill(os.getpid(), 11)")
    console.expect(r"Kernel died: .*SIGSEGV")
    console.close()
