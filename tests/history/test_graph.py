"""The drawing of histories, by hand and held against Git's own."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from workbench.history import graph
from workbench.history.log import Entry


def entries(*texts: str) -> list[Entry]:
    """Each ``name``, ``name>parent``; the later the newer."""
    found = []
    for number, text in enumerate(texts):
        name, _, parent = text.partition(">")
        found.append(Entry(name, parent, (), "", f"2026-01-01T00:00:{number:02}Z", name, 0, {}))
    return found


def drawn(ones: Iterable[Entry]) -> list[str]:
    return [f"{lead} {entry.id}" if entry else lead for lead, entry in graph.draw(ones)]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ("", ""),
        ("a", "* a"),
        ("a b>a c>b", "* c\n* b\n* a"),
        ("base a>base b>base", "* b\n| * a\n|/\n* base"),
        ("base a>base b>base c>base", "* c\n| * b\n|/\n| * a\n|/\n* base"),
        # a fork on a fork, to the left and to the right
        ("base a>base b>base c>b d>b", "* d\n| * c\n|/\n* b\n| * a\n|/\n* base"),
        ("base b>base c>b d>b a>base", "* a\n| * d\n| | * c\n| |/\n| * b\n|/\n* base"),
        # a name further down is no fork; two that have nothing in common stand one below the other
        ("x y>x p q>p", "* q\n* p\n* y\n* x"),
        # whose parent is not here
        ("a>gone b>a", "* b\n* a"),
    ],
)
def test_by_hand(texts: str, wanted: str) -> None:
    assert "\n".join(drawn(entries(*texts.split()))) == wanted


def test_a_history_of_any_length() -> None:
    ones = entries("0", *(f"{number}>{number - 1}" for number in range(1, 5000)))
    assert drawn(ones)[0] == "* 4999" and len(drawn(ones)) == 5000


def test_a_parent_is_below_all_that_stands_on_it_whatever_the_dates() -> None:
    ones = entries("base", "a>base", "b>a")
    turned = [Entry(e.id, e.parent, (), "", f"2026-01-01T00:00:{9 - n:02}Z", e.id, 0, {}) for n, e in enumerate(ones)]
    assert drawn(turned) == ["* b", "* a", "* base"]


@pytest.mark.parametrize("seed", range(12))
def test_as_git_draws_it(seed: int, tmp_path: Path) -> None:
    """Random forests; Git is given dates by which it, too, takes the lines in our order."""
    rnd = random.Random(seed)
    texts = []
    for number in range(rnd.randrange(2, 16)):
        parent = rnd.randrange(number) if number and rnd.random() < 0.92 else None
        texts.append(f"c{number}" if parent is None else f"c{number}>c{parent}")
    ones = entries(*texts)
    rows = list(graph.draw(ones))
    order = [entry.id for _, entry in rows if entry]
    env = os.environ | {
        "GIT_DIR": str(tmp_path / "git"), "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.org",
    }  # fmt: skip

    def git(*words: str, **more: str) -> str:
        done = subprocess.run(["git", *words], env=env | more, capture_output=True, text=True, check=True, input="")
        return done.stdout

    git("init", "-q", "--bare")
    tree = git("mktree").strip()
    made: dict[str, str] = {}
    for entry in ones:
        date = f"@{2_000_000_000 - order.index(entry.id)} +0000"
        above = ["-p", made[entry.parent]] if entry.parent else []
        made[entry.id] = git(
            "commit-tree", tree, *above, "-m", entry.id, GIT_COMMITTER_DATE=date, GIT_AUTHOR_DATE=date
        ).strip()
        git("update-ref", f"refs/heads/{entry.id}", made[entry.id])
    theirs = [line.rstrip() for line in git("log", "--graph", "--all", "--format=%s").splitlines()]
    assert drawn(ones) == theirs
