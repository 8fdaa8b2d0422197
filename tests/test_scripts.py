"""The set-up of a checkout: what it says and when it gives up. That it works is shown by running it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SCRIPTS = TOP / "scripts"


@pytest.fixture
def programs() -> Iterator[Path]:
    """All the programs that a user without sudo finds, in a folder that anybody may read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        for name in ("apt-get", "dpkg-query"):
            Path(folder, name).symlink_to(f"/usr/bin/{name}")
        yield Path(folder)


def as_nobody(code: str, programs: Path) -> subprocess.CompletedProcess[str]:
    """Run code beside the scripts as a user without rights."""
    lines = [
        "import os, sys, bootstrap, steps",
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)",
        f"os.environ['PATH'] = {str(programs)!r}",
        "try:",
        *(f"    {line}" for line in code.splitlines()),
        "except steps.StepError as error: print('gave up:', error)",
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True, text=True, check=True, cwd=SCRIPTS, env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_every_target_of_make_is_in_its_help():
    done = subprocess.run(["make", "-C", TOP, "--no-print-directory"], capture_output=True, text=True, check=True)
    for target in ("help", "setup", "demo", "lab", "test", "bench", "lint", "clean"):
        assert f"make {target} " in done.stdout


def test_where_it_may_not_install_it_says_what_to_run(programs):
    code = "bootstrap.install_tools((bootstrap.Tool('no-such-package', 'is for nothing'),))"
    out = as_nobody(code, programs).stdout
    assert "no-such-package  is for nothing" in out
    last = out.splitlines()[-1]
    assert last.startswith("gave up:") and "apt-get install -y --no-install-recommends no-such-package" in last


def test_where_it_may_not_grant_ids_it_says_what_to_run(programs):
    last = as_nobody("bootstrap.grant_ids('somebody-else')", programs).stdout.splitlines()[-1]
    assert last.startswith("gave up:") and "usermod --add-subuids" in last


def test_nothing_is_installed_twice():
    done = subprocess.run(
        [sys.executable, "-c", "import bootstrap; print(bootstrap.missing(bootstrap.TOOLS))"],
        capture_output=True, text=True, check=True, cwd=SCRIPTS,
    )  # fmt: skip
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("code", "expected"), [(0, "works: 0."), (3, "exit code 3")])
def test_a_step_tells_its_time_or_its_last_lines(tmp_path, code, expected):
    script = (
        "import steps; from pathlib import Path\n"
        f"steps.step('works', ['sh', '-c', 'echo a word; exit {code}'], log=Path({str(tmp_path / 'log')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=SCRIPTS, check=False)
    assert expected in done.stdout + done.stderr
    assert ("    a word" in done.stdout) == bool(code)
    assert (tmp_path / "log").read_text() == "a word\n"
