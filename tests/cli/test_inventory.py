"""Inventory, origins and drawn histories from a shell."""

from __future__ import annotations

import json
import re
import time

import pytest

MAKE = r"""
folder=$(echo /opt/venv/lib/python3*/site-packages)/Mine-0.3.dist-info
mkdir -p $folder /opt/data
printf 'Name: Mine\nVersion: 0.3\n' > $folder/METADATA
printf '{"url": "file:///root/mine", "dir_info": {"editable": true}}' > $folder/direct_url.json
printf pip > $folder/INSTALLER
echo 12345 > /opt/data/a.csv
"""


@pytest.fixture
def forked(cli, image):
    """Two snapshots of two containers over the same image."""
    for name, script in (("fork-one", MAKE), ("fork-two", "echo two > /opt/two")):
        done = cli("run", "--no-folder", "--network", "none", "python", "sh", "-c", script)
        container = re.findall(r"container (\w+) stays", done.err)[0]
        time.sleep(1 - time.time() % 1)  # the date of an image is in seconds, and the later one is drawn first
        assert cli("snapshot", container, "-m", f"Make {name}", "-t", name).code == 0
        cli("rm", "-f", container)
    yield
    cli("rmi", "fork-one")
    cli("rmi", "fork-two")
    cli("gc")


def test_where_packages_came_from(cli, forked):
    shown = cli("inventory", "fork-one")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert any(re.fullmatch(r"mine +0\.3 +python +/opt/venv/\S+ +editable file:///root/mine", line) for line in lines)
    assert any(re.fullmatch(r"/opt/venv: venv, Python 3\S+, \d+ packages", line) for line in lines)
    assert re.fullmatch(r"\d+ Debian packages, \d+ Python packages", lines[-1])
    found = json.loads(cli("inventory", "fork-one", "--json").out)
    assert found["unowned"] is None and {row["kind"] for row in found["packages"]} == {"deb", "python"}
    shown = cli("inventory", "fork-one", "--unowned").out
    assert re.search(r"^1 +6 B +/opt/data$", shown, re.M) and "1 file that no package owns, 6 B" in shown
    (row,) = json.loads(cli("diff", "python", "fork-one", "--json").out)["packages"]
    assert row["origin"] == "editable file:///root/mine"
    assert "editable file:///root/mine" in cli("diff", "python", "fork-one").out


def test_histories_as_a_drawing(cli, forked):
    drawn = cli("log", "--graph", "--all").out.splitlines()
    at = next(number for number, line in enumerate(drawn) if "(fork-two) Make fork-two" in line)
    assert drawn[at].startswith("* ") and drawn[at + 2] == "|/", drawn
    assert re.fullmatch(r"\| \* [0-9a-f]{12} \(fork-one\) Make fork-one", drawn[at + 1])
    below = next(line for line in drawn[at:] if "python" in line)
    assert re.fullmatch(r"\* [0-9a-f]{12} \(.*python.*\) built from a recipe", below), drawn
    assert [line[:2] for line in cli("log", "--graph", "fork-one").out.splitlines()] == ["* ", "* "]
    assert len(cli("log", "--graph", "-n", "1", "fork-one").out.splitlines()) == 1
    known = [row["message"] for row in json.loads(cli("log", "--all", "--json").out)]
    assert {"Make fork-one", "Make fork-two", "built from a recipe"} <= set(known)
    assert "(fork-one) Make fork-one" in cli("log", "--all", "--oneline").out


@pytest.mark.parametrize("line", [["log"], ["log", "--all", "python"]])
def test_an_image_or_all(cli, image, line):
    done = cli(*line)
    assert done.code == 1 and "an image, or --all" in done.err and done.err.count("\n") == 1
