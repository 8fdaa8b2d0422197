"""Commands of the history: ``snapshot``, ``log``, ``show``, ``diff``, ``tag``. Words and flags are Git's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workbench.cli import show
from workbench.cli.commands import Get, show_in_launcher
from workbench.model import InvalidInput, count, format_size

if TYPE_CHECKING:
    from workbench.history.diff import Diff
    from workbench.history.log import Entry
    from workbench.workbench import Workbench

_SHOWN = 20  # files that a person is shown before it is only counted


def snapshot(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``snapshot CONTAINER -m MESSAGE``: exit code 1 when nothing has changed."""
    container = options.container or _the_only(bench)
    with show.progress() as meter:
        taken = bench.snapshot(
            container, message=options.message or "", author=options.author or "", name=options.tag or "",
            look_only=options.dry_run, meter=meter,
        )  # fmt: skip
    if options.json:
        row = asdict(taken) | {"image": taken.image.id if taken.image else None}
        show.as_json(row)
    elif options.dry_run:
        for path in taken.paths:
            show.say(f"/{path}")
        for path in taken.skipped:
            show.say(f"left out: /{path}")
        print(f"{count(taken.changes, 'change')}, {format_size(taken.size)}")
    elif taken.image is None:
        show.error(f"nothing has changed since {taken.parent[7:19]}")
    else:
        show.say(f"[{taken.ref} {taken.image.id[7:19]}] {options.message.strip().splitlines()[0]}")
        print(f" {count(taken.changes, 'change')}, {format_size(taken.size)}; paused for {taken.paused * 1e3:.0f} ms")
    sys.stdout.flush()
    # After the word that it was taken; and again where the last one was cut off before that.
    if taken.image is not None:
        show_in_launcher(kernelspecs, taken.ref, taken.image)
    elif not options.dry_run and bench.refs.find(taken.ref) == taken.parent:
        show_in_launcher(kernelspecs, taken.ref, bench.image(taken.parent))
    return int(taken.image is None and not options.dry_run)


def _the_only(bench: Workbench) -> str:
    rows = bench.ps(True)
    if len(rows) == 1:
        return str(rows[0]["id"])
    if not rows:
        raise InvalidInput("take a snapshot", "there is no container", "open a notebook on a kernel of an image first")
    raise InvalidInput("take a snapshot", f"there are {len(rows)} containers", "name one, see `jupyter workbench ps`")


def log(bench: Workbench, options: Any, _: Get) -> int:
    """``log IMAGE``, ``log --all``."""
    if bool(options.image) == options.all:
        raise InvalidInput("show a history", "it wants an image, or --all, and not both", "see `log --help`")
    if options.graph and options.stat and not options.json:
        raise InvalidInput("show a history", "--graph has one line for each image", "leave out --graph or --stat")
    entries: list[Entry] = []
    lines: list[str] = []
    drawn = options.graph or options.all
    for lead, entry in bench.graph(options.image) if drawn else (("", entry) for entry in bench.history(options.image)):
        if options.number is not None and len(entries) >= options.number:
            break
        entries += [entry] if entry else []
        lines.append(f"{lead} {entry.id[7:19]}{_names(entry)} {entry.summary}" if entry else lead)
    if options.graph and not options.json:
        show.say(*lines)
    elif options.json:
        rows = [asdict(entry) for entry in entries]
        if options.stat:
            for row, entry in zip(rows, entries, strict=True):
                found = bench.brought(entry)
                row["changed"] = found and found.counts
        show.as_json(rows)
    elif options.oneline:
        for entry in entries:
            show.say(f"{entry.id[7:19]}{_names(entry)} {entry.summary}")
            if options.stat and (found := bench.brought(entry)):
                _print(found, stat=True)
    else:
        for number, entry in enumerate(entries):
            show.say(*([""] if number else []), *_told(entry))
            if options.stat and (found := bench.brought(entry)):
                print()
                _print(found, stat=True)
    return 0


def _told(entry: Entry) -> Iterable[str]:
    yield f"image {entry.id[7:]}{_names(entry)}"
    if entry.author:
        yield f"Author: {entry.author}"
    yield f"Date:   {entry.when} ({show.age(entry.when)})"
    yield f"Size:   {format_size(entry.size)}"
    if entry.parent:
        yield f"Parent: {entry.parent[7:19]}"
    yield ""
    for line in entry.message.rstrip().replace("\r\n", "\n").split("\n"):
        yield f"    {line}".rstrip(" ")


def _names(entry: Entry) -> str:
    return f" ({', '.join(entry.names)})" if entry.names else ""


def show_image(bench: Workbench, options: Any, _: Get) -> int:
    """``show IMAGE``: what it says of itself, and what it changed."""
    entry, found = bench.show(options.image)
    if options.json:
        show.as_json(asdict(entry) | {"diff": asdict(found) if found else None})
        return 0
    show.say(*_told(entry))
    if entry.machine:
        show.say("", *(f"{key}: {value}" for key, value in entry.machine.items()))
    if found:
        print()
        _print(found, stat=options.stat, name_status=options.name_status)
    return 0


def diff(bench: Workbench, options: Any, _: Get) -> int:
    """``diff ONE OTHER``."""
    found = bench.diff(options.one, options.other)
    if options.json:
        show.as_json(asdict(found))
    else:
        _print(found, stat=options.stat, name_status=options.name_status)
    return 0


def _print(found: Diff, *, stat: bool, name_status: bool = False) -> None:
    if found.packages and not name_status:
        rows = [
            {"package": row.name, "kind": row.kind, "before": row.before or "-", "after": row.after or "-",
             "place": row.place}
            | ({"from": row.origin} if any(row.origin for row in found.packages) else {})
            for row in found.packages
        ]  # fmt: skip
        print(show.table(rows))
        print()
    shown = found.files if name_status else found.files[:_SHOWN] if stat else ()
    for row in shown:
        size = f"  {format_size(row.before)} -> {format_size(row.after)}" if stat else ""
        show.say(f"{row.kind}\t/{row.path}{size}")
    if len(shown) < len(found.files) and not name_status:
        print(found.summary)
    if not found.files and not found.packages:
        print("no difference", file=sys.stderr)


def tag(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``tag NAME IMAGE``."""
    image = bench.tag(options.name, options.image, force=options.force)
    show_in_launcher(kernelspecs, options.name, image)
    print(f"{options.name} {image.id[7:19]}")
    return 0


def export(bench: Workbench, options: Any, _: Get) -> int:
    """``export IMAGE -o FILE``."""
    with show.progress() as meter:
        size = bench.export(options.image, options.output, form=options.compress, along=options.along, meter=meter)
    print(f"{options.output}  {format_size(size)}")
    return 0


def load(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``import FILE [NAME]``: the image, its kernel, and beside it the files that came along, if none are there."""
    with show.progress() as meter:
        name, image, notebooks = bench.load(options.file, options.name or "", force=options.force, meter=meter)
    show_in_launcher(kernelspecs, name, image)
    show.say(f"{name} {image.id}")
    for file, data in notebooks.items():
        try:
            _put_down(file, data)
            print(file)
        except FileExistsError:
            show.error(f"{file} came along and is here already: it stays as it is")
    return 0


def _put_down(name: str, data: bytes) -> None:
    """A new file in the working folder, whole or not at all: half of one would stay as it is, too (open(2))."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
        except OSError:  # not every file system has files without a name
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            link = False
        else:
            link = True
        with open(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(fd)
            if link:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
