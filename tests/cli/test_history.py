"""Snapshots from a shell: what people type, and what they read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from jupyter_core.paths import jupyter_data_dir

CHANGE = "mkdir -p /opt/seed/lib/x; echo one > /opt/seed/f; rm -f /usr/bin/apt-key; echo ready; cat > /dev/null"


@pytest.fixture
def container(cli, image) -> Iterator[str]:
    """One that has changed something and runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", "run", "--no-folder", "--network", "none", "python", "sh", "-c", CHANGE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "ready\n"
    (row,) = json.loads(cli("ps", "--json").out)
    yield row["id"]
    process.stdin.close()
    process.wait(timeout=20)
    process.stdout.close()
    cli("rm", "-f", row["id"])
    for name in ("shell-made", "python-" + row["id"][:4], "again"):
        cli("rmi", name)
    cli("gc")


def test_from_change_to_launch(cli, container):
    dry = cli("snapshot", container, "--dry-run")
    assert dry.code == 0 and "/opt/seed/f\n" in dry.out and "/usr/bin/apt-key\n" in dry.out
    done = cli(
        "snapshot", container[:6], "-m", "Add a seed\n\nand take apt-key away", "-t", "shell-made", "-a", "Ann <a@b>"
    )
    assert done.code == 0, done.err
    assert done.out.startswith("[shell-made ") and "] Add a seed\n" in done.out and "paused for" in done.out
    again = cli("snapshot", "-m", "again")  # of the only one
    assert (again.code, again.out) == (1, "") and "nothing has changed" in again.err
    assert os.path.exists(os.path.join(jupyter_data_dir(), "kernels", "wb-shell-made", "kernel.json"))
    shown = cli("run", "--no-folder", "shell-made", "sh", "-c", "cat /opt/seed/f; ls /usr/bin/apt-key")
    assert shown.out == "one\n" and "No such file" in shown.err
    log = cli("log", "shell-made")
    assert "Author: Ann <a@b>" in log.out and "    Add a seed\n\n    and take" in log.out and "(shell-made)" in log.out
    assert cli("log", "--oneline", "-n", "1", "shell-made").out.endswith(" (shell-made) Add a seed\n")
    entries = json.loads(cli("log", "--json", "--stat", "shell-made").out)
    assert [row["changed"] for row in entries] == [{"packages": 0, "added": 4, "modified": 0, "deleted": 1}, None]
    assert f"Parent: {entries[1]['id'][7:19]}\n" in log.out and "\tA" not in log.out
    assert "A\t/opt/seed/f  0 B -> 4 B\n" in cli("log", "--stat", "shell-made").out
    lines = cli("log", "--oneline", "--stat", "-n", "1", "shell-made").out.splitlines()
    assert "shell-made" in lines[0] and "A\t/opt/seed/f  0 B -> 4 B" in lines[1:]
    assert "leave out --graph or --stat" in cli("log", "--graph", "--stat", "shell-made").err
    diff = cli("diff", "shell-made~1", "shell-made", "--name-status").out.splitlines()
    assert diff == [
        "A\t/opt/seed/",
        "A\t/opt/seed/f",
        "A\t/opt/seed/lib/",
        "A\t/opt/seed/lib/x/",
        "D\t/usr/bin/apt-key",
    ]
    assert "1 deleted" in cli("diff", "python", "shell-made").out
    assert "kernel: " in cli("show", "shell-made").out
    assert json.loads(cli("show", "--json", "shell-made").out)["diff"]["files"]
    assert cli("tag", "again", "shell-made").code == 0
    clash = cli("tag", "again", "python")
    assert clash.code == 1 and "--force" in clash.err
    assert cli("check").code == 0


def test_without_a_name_it_gets_one(cli, container):
    done = cli("snapshot", container, "-m", "x", "--json")
    assert json.loads(done.out)["ref"] == f"python-{container[:4]}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["snapshot", "ffff", "-m", "x"], "no container is called"), (["snapshot"], "there is no container"),
        (["log", "nothing"], "there is none named"), (["diff", "python", "python~1"], "has no parent"),
        (["show", "python@{3}"], "has not moved 3 times"), (["tag", "UPPER", "python"], "is not one"),
        (["export", "python", "-o", "/nowhere/x.tar"], "/nowhere/x.tar: No such file"),
        (["export", "python", "-o", "/dev/null/x.tar"], "Not a directory"),
        (["export", "python", "-o", "/"], "is a folder"),
    ],
)  # fmt: skip
def test_errors_are_one_line(cli, image, line, words):
    done = cli(*line)
    assert done.code == 1 and words in done.err and done.err.count("\n") == 1, done.err


def test_what_nobody_reads_to_the_end(cli, image):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m workbench log --json python | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def on_a_terminal(*command: str, stop: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a command, which is a terminal. stop: Ctrl-C at the first word."""
    master, inner = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=inner
    )
    os.close(inner)
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other end any more (pty(7))
        while data := os.read(master, 4096):
            if stop and not said:
                process.send_signal(signal.SIGINT)
            said += data
    os.close(master)
    return process.wait(timeout=30), said.decode()


def test_long_work_is_followed_on_a_terminal(cli, image, container, tmp_path, home):
    """And on a terminal only; Ctrl-C leaves nothing."""
    out = tmp_path / "x.oci.tar"
    code, said = on_a_terminal("export", "python", "-o", str(out), "--compress", "gzip", stop=True)
    assert code == 130 and re.search(r"writing: [\d.]+ \w+ of [\d.]+ MiB", said) and said.endswith("\r\x1b[K")
    assert os.listdir(tmp_path) == [] and os.listdir(home / "tmp") == []
    code, said = on_a_terminal("export", "python", "-o", str(out), "--compress", "zstd")  # over one second anywhere
    numbers = [float(text) for text in re.findall(r"writing: ([\d.]+) MiB of", said)]
    assert code == 0 and len(set(numbers)) > 1 and numbers == sorted(numbers) and said.endswith("\r\x1b[K")
    assert cli("export", "python", "-o", str(out)).err == ""
    assert on_a_terminal("snapshot", container, "-m", "Short", "-t", "again") == (0, "")
