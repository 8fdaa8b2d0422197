"""Ages and tables for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from workbench.cli import show
from workbench.guest import tables
from workbench.model import printable

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-03-01T11:59:58Z", "now"),
        ("2026-03-01T11:59:20+00:00", "40 seconds ago"),
        ("2026-03-01T11:58:59Z", "1 minute ago"),
        ("2026-03-01T09:00:00", "3 hours ago"),
        ("2026-02-28T12:00:00Z", "1 day ago"),
        ("2024-01-01T00:00:00Z", "2 years ago"),
        ("2026-03-01T12:00:30Z", "now"),  # a clock that runs ahead
        (NOW.timestamp() - 7200, "2 hours ago"),
        ("", ""),
        ("some day", "some day"),
    ],
)
def test_age(moment, expected):
    assert show.age(moment, NOW) == expected


def test_table_is_aligned_and_cut_to_fit():
    rows = [{"id": "a", "command": "x" * 50}, {"id": "long id", "command": ""}]
    lines = show.table(rows, width=40).splitlines()
    assert lines[0] == "ID       COMMAND"
    assert lines[1].startswith("a        xxx") and lines[1].endswith("…") and len(lines[1]) <= 40
    assert lines[2] == "long id"
    assert "x" * 50 in show.table(rows, width=None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 日本", "plain ünïcode 日本"), ("a\tb\u00a0c\u3000", "a\tb\u00a0c\u3000"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"), ("a\r\nb\x85", r"a\r\nb\x85"), ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\x9b2J\u2066\ufeff", r"\x9b2J\u2066\ufeff"), ("caf\udce9", r"caf\xe9"), ("\ud800", r"\ud800"),
        ("\N{WOMAN}\u200d\N{PERSONAL COMPUTER}", "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}"),
    ],
)  # fmt: skip
def test_what_acts_on_a_terminal_is_made_visible(text, shown, capsys):
    """In the command line and inside a container, which cannot import it."""
    assert printable(text) == shown == tables.plain(text)
    show.say(text)
    assert capsys.readouterr().out == f"{shown}\n"
    assert show.table([{"a": text, "b": ""}]).splitlines()[1:] == [shown.replace("\t", r"\t").rstrip()]


def test_json_tells_what_is(capsys):
    value = {"path": "a\x1b\udce9\u202e\n"}
    show.as_json(value)
    assert json.loads(capsys.readouterr().out) == value


def test_what_the_guest_shows(capsys):
    entry = {"id": "sha256:" + "a" * 64, "names": ["n"], "author": "A\x1b[2J", "when": "now\x07", "size": 1,
             "message": "One\r\nTwo\x9b", "diff": None, "parent": ""}  # fmt: skip
    tables.show_show(entry, {})
    assert capsys.readouterr().out.splitlines()[1:] == [
        r"Author: A\x1b[2J", r"Date:   now\x07", "", "    One", r"    Two\x9b", "",
    ]  # fmt: skip
    tables.show_log([entry], {"oneline": True})
    assert capsys.readouterr().out == "a" * 12 + " (n) One\\r\n"
    found = tables.show_log([entry], {})
    assert found["author"].tolist() == [r"A\x1b[2J"]
    rows = [{"kind": "A", "path": "x\x1b\n", "before": 0, "after": 5}]
    found = tables.show_diff({"packages": [], "files": rows}, {"files": True})
    assert found["path"].tolist() == [r"/x\x1b\n"] and found["after"].tolist() == [5]
