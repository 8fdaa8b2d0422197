"""Ages and tables for people."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from workbench.cli import show

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
