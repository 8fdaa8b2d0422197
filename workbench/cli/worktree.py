"""Commands of a container's working tree: ``checkout``, ``reset``, ``branch``. Words and flags are Git's."""

from __future__ import annotations

from typing import Any

from workbench.cli import show
from workbench.cli.commands import Get, show_in_launcher
from workbench.history_face import Checkout
from workbench.model import InvalidInput
from workbench.workbench import Workbench


def checkout(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``checkout CONTAINER [IMAGE]``."""
    if not options.image and not options.create:
        raise InvalidInput("check out", "no image is named", "name one, or a new name with -b NAME")
    done = bench.checkout(options.container, options.image or "", create=options.create or "", force=options.force)
    if options.create:
        show_in_launcher(kernelspecs, options.create, bench.image(done.image))
    return _told(options, done)


def reset(bench: Workbench, options: Any, _: Get) -> int:
    """``reset CONTAINER [IMAGE]``."""
    return _told(options, bench.reset(options.container, options.image or "", hard=options.hard))


def _told(options: Any, done: Checkout) -> int:
    if options.json:
        show.as_json({"image": done.image, "ref": done.ref, "moved": done.moved})
    else:
        where = f"now over {done.image[7:19]}" if done.moved else f"still over {done.image[7:19]}"
        print(f"{where}; snapshots move {done.ref or 'no name, but make one'}")
    return 0


def branch(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``branch``, or ``branch NAME [IMAGE]``."""
    if options.name and options.image:
        show_in_launcher(kernelspecs, options.name, bench.branch(options.name, options.image, force=options.force))
        return 0
    rows = bench.branches(options.name or "")
    if options.json:
        show.as_json(rows)
    else:
        print(show.table([
            {"name": row["name"], "image": row["image"][7:19], "moved by": " ".join(row["containers"])} for row in rows
        ]))  # fmt: skip
    return 0
