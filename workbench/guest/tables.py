"""How answers are shown: as Git tells of them, with a table where pandas is there.

What they hold may have come with an image that a stranger made: nothing of it acts on the terminal or the page.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from .api import Request


def plain(text: str) -> str:
    """For one line: control characters and what turns a line around become visible, as in the command line."""
    return text if text.isprintable() else "".join(map(_plain, text))


def _plain(char: str) -> str:
    if char.isprintable() or char in "\t\u200c\u200d" or unicodedata.category(char) == "Zs":
        return char
    byte = ord(char) - 0xDC00  # of a file's name that is no UTF-8 (PEP 383)
    return "\\x%02x" % byte if 0x80 <= byte <= 0xFF else ascii(char)[1:-1]


def say(*lines: str) -> None:
    """Print lines, each as one."""
    for line in lines:
        print(plain(line))


def size(number: float) -> str:
    """``536870912`` as ``512.0 MiB``."""
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return "%d %s%s" % (number, noun, "" if number == 1 else "s")


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    """Rows as a DataFrame where pandas is there, else as aligned text."""
    rows = [{key: plain(each) if isinstance(each, str) else each for key, each in row.items()} for row in rows]
    try:
        import pandas
    except ImportError:
        cells = [list(columns)] + [[str(row.get(name, "")) for name in columns] for row in rows]
        widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
        print("\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells))
        return None
    return pandas.DataFrame([{name: row.get(name, "") for name in columns} for row in rows], columns=list(columns))


def status_lines(value: dict[str, Any]) -> list[str]:
    """What ``status`` answers, as lines."""
    lines = [
        ("image", "{} {}".format(value["image"], value["image_id"][7:19])),
        ("snapshot", "{} {}".format(value["ref"], value["head"][7:19]) if value["ref"] else "none yet"),
        ("changed since", _changed(value)),
        ("disk", "-" if value["disk"] is None else "{} written in this container".format(size(value["disk"]))),
        ("network", value["network"]),
    ]
    usage = value.get("usage")
    if usage:
        lines += [
            ("memory", size(usage["memory"])),
            ("processes", usage["processes"]),
            ("processor", "{:.1f} s".format(usage["cpu"])),
        ]
    for name, limit in sorted(value["limits"].items()):
        if limit is not None:
            lines.append(("limit of " + name, size(limit) if name == "memory" else limit))
    return [plain("%-20s %s" % line) for line in lines]


def show_status(value: Any, _request: Request) -> Any:
    """Live where ipywidgets is there, else lines."""
    try:
        from . import dashboard
    except ImportError:  # as with one older than 8
        print("\n".join(status_lines(value)))
        return None
    return dashboard.show(value)


def _changed(value: Any) -> str:
    if value["changes"] is None:
        return "not known yet: a snapshot is being taken"
    return "%d files and folders, %s" % (value["changes"], size(value["size"]))


def show_snapshot(value: Any, request: Request) -> None:
    """As Git tells of a commit."""
    if request.get("dry_run"):
        for path in value["paths"]:
            say("/" + path)
        for path in value["skipped"]:
            say("left out: /" + path)
    if not value["image"]:
        said = "would be taken" if value["changes"] else "nothing has changed"
        print("%s, %s: %s" % (count(value["changes"], "change"), size(value["size"]), said))
        return
    say("[{} {}] {}".format(value["ref"], value["image"][7:19], request.get("message", "").strip().split("\n")[0]))
    taken = count(value["changes"], "change"), size(value["size"]), value["paused"] * 1e3
    print(" %s, %s; paused for %.0f ms" % taken)


def show_log(value: Any, request: Request) -> Any:
    """A table, or a line for each."""
    if request.get("oneline"):
        for entry in value:
            say("{}{} {}".format(entry["id"][7:19], _names(entry), entry["message"].split("\n")[0]))
            if (changed := entry.get("changed")) is not None:
                packages = count(changed["packages"], "package")
                say("    {}, {added} added, {modified} modified, {deleted} deleted".format(packages, **changed))
        return None
    rows = [
        {"image": entry["id"][7:19], "names": ", ".join(entry["names"]), "message": entry["message"].split("\n")[0],
         "author": entry["author"], "date": entry["when"], "size": size(entry["size"]), "parent": entry["parent"][7:19],
         **(entry.get("changed") or {})}
        for entry in value
    ]  # fmt: skip
    more = ("packages", "added", "modified", "deleted") if request.get("stat") else ()
    return table(rows, ("image", "names", "message", "author", "date", "size", "parent", *more))


def _names(entry: dict[str, Any]) -> str:
    return " ({})".format(", ".join(entry["names"])) if entry["names"] else ""


def show_diff(value: Any, request: Request) -> Any:
    """Counts, then packages or files."""
    files = value["files"]
    kinds = ["%d %s" % (sum(row["kind"] == kind for row in files), word)
             for kind, word in (("A", "added"), ("M", "modified"), ("D", "deleted"))]  # fmt: skip
    grown = sum(row["after"] - row["before"] for row in files)
    sign = "+" if grown >= 0 else "-"
    counted = "{}; {}".format(count(len(value["packages"]), "package"), count(len(files), "file"))
    print(f"{counted}: {', '.join(kinds)}; {sign}{size(abs(grown))}")
    if request.get("files"):
        rows = [dict(row, path="/" + row["path"]) for row in files]
        return table(rows, ("kind", "path", "before", "after"))
    return table(value["packages"], ("name", "kind", "before", "after", "place")) if value["packages"] else None


def show_show(value: Any, request: Request) -> Any:
    """One image, and what it changed."""
    say("image {}{}".format(value["id"][7:], _names(value)))
    if value["author"]:
        say("Author: " + value["author"])
    message = value["message"].rstrip().replace("\r\n", "\n").split("\n")
    say("Date:   " + value["when"], "", *("    " + line for line in message), "")
    return show_diff(value["diff"], request) if value["diff"] else None


def show_tag(value: Any, _request: Request) -> None:
    """The name and the ID."""
    say(value)


def show_branch(value: Any, _request: Request) -> None:
    """As git-branch(1): a star before the one that snapshots move."""
    for row in value:
        say("{} {} {}".format("*" if row["current"] else " ", row["name"], row["image"][7:19]))


def show_export(value: Any, _request: Request) -> None:
    """The file and its size."""
    say("{}  {}".format(value["file"], size(value["size"])))


def show_freeze(value: Any, _request: Request) -> None:
    """What the recipe names, how close it comes, and what is not in it."""
    say("recipe {}/recipe.toml  on {}: {} Debian packages, {} Python packages".format(
        value["folder"], value["base"], len(value["debian"]), len(value["python"])))  # fmt: skip
    if value["image"]:
        more = f", and {value['more']} more" if value["more"] else ""
        say("equal  {} of {} packages, {} of {} files{}".format(*value["packages"], *value["files"], more))
    for line in value["left"]:
        say("not    " + line)
