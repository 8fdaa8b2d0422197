"""Commands about what an image holds: ``inventory``, and ``freeze``, which makes a recipe of it again."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workbench.cli import show
from workbench.cli.commands import Get, build_progress, show_in_launcher
from workbench.model import count, format_size

if TYPE_CHECKING:
    from workbench.history.freeze import Frozen
    from workbench.history.inventory import Inventory, Unowned
    from workbench.workbench import Workbench

_KINDS = {"deb": "Debian package", "python": "Python package", "r": "R package", "conda": "conda package"}
_SHOWN = 20  # folders that a person is shown before the rest is only counted


def inventory(bench: Workbench, options: Any, _: Get) -> int:
    """``inventory IMAGE``."""
    found = bench.inventory(options.image, unowned=options.unowned)
    if options.json:
        show.as_json(asdict(found))
    elif found.unowned is not None:
        _print_unowned(found.unowned)
    else:
        _print_packages(found)
    return 0


def _print_packages(found: Inventory) -> None:
    frame = found.frame()
    if len(frame):
        rows = [
            {"package": one.name, "version": one.version, "kind": one.kind, "place": one.place, "from": one.told}
            for one in found.packages
        ]
        print(show.table(rows))
        print()
    for one in found.environments:
        show.say(f"{one.prefix}: {one.kind}, Python {one.python or '?'}, {count(one.packages, 'package')}")
    numbers = frame["kind"].value_counts()
    print(", ".join(count(int(number), _KINDS[str(kind)]) for kind, number in numbers.items()) or "no packages")


def _print_unowned(found: Unowned) -> None:
    """The folders that hold most of it, then how much it is."""
    import pandas

    from workbench.history.inventory import folder_of

    frame = pandas.DataFrame(found.files, columns=["path", "size"])
    frame["folder"] = [folder_of(path) for path in frame["path"]]
    sums = frame.groupby("folder")["size"].agg(["count", "sum"]).sort_values(["sum", "count"], ascending=False)
    if len(sums):
        rows = [
            {"files": str(row["count"]), "size": format_size(int(row["sum"])), "folder": str(folder)}
            for folder, row in sums.head(_SHOWN).iterrows()
        ]
        print(show.table(rows))
        print()
    rest = f" in {len(sums)} folders" if len(sums) > _SHOWN else ""
    print(f"{count(found.count, 'file')} that no package owns{rest}, {format_size(found.size)}")


def freeze(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``freeze IMAGE``."""
    progress, seconds = build_progress()
    done = bench.freeze(
        options.image, options.output or "", build=not options.no_build, with_files=options.with_files,
        most=options.most, progress=progress,
    )  # fmt: skip
    show_in_launcher(kernelspecs, done.name, done.image)
    if options.json:
        row = asdict(done) | {"image": done.image.id if done.image else None, "seconds": round(seconds(), 3)}
        show.as_json(row)
    else:
        _print_frozen(done, seconds())
    return 0


def _print_frozen(done: Frozen, seconds: float) -> None:
    from workbench.history.freeze import summary

    named = f"{count(len(done.debian), 'Debian package')}, {count(len(done.python), 'Python package')}"
    files = f", {count(done.taken, 'file')}" if done.taken else ""
    show.say(f"recipe {os.path.join(done.folder, 'recipe.toml')}  on {done.base}: {named}{files}")
    if done.image is not None:
        print(f"image  {done.name}  {done.image.id}  in {seconds:.1f} s")
        (packages, all_packages), (same, all_files) = done.packages, done.files
        more = f", and {done.more} more" if done.more else ""
        print(f"equal  {packages} of {all_packages} packages, {same} of {all_files} files{more}")
    for line in summary(done.lost):
        show.say(f"not    {line}")
