"""What each command does, except ``run``: ask the Workbench, print the answer, choose the exit code."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli import show
from workbench.model import WorkbenchError, format_size

if TYPE_CHECKING:
    from workbench.build.builder import Built
    from workbench.cli import Kernelspecs
    from workbench.cli.options import Parsed
    from workbench.containers.client import HelperClient
    from workbench.model import Image
    from workbench.workbench import Workbench

Get = Callable[[], "Kernelspecs"]


def execute(parsed: Parsed, kernelspecs: Get, *, helper: HelperClient | None = None, parent: Any = None) -> int:
    """Run a command with a Workbench of its own, which ends with it; the exit code.

    helper: one that was started ahead. parent: the application whose configuration counts.
    """
    from traitlets import TraitError

    from workbench.cli.options import COMMANDS
    from workbench.workbench import Workbench

    module, function = COMMANDS[parsed.name].target.split(":")
    command = getattr(importlib.import_module(module), function)
    try:
        bench = Workbench(parent=parent) if parent is not None else Workbench()
    except TraitError as error:
        show.error(f"read the configuration: {error}")
        return 2
    if helper is not None:
        bench.containers.helper = helper
    try:
        return int(command(bench, parsed.values, kernelspecs))
    finally:
        bench.close()


def show_in_launcher(kernelspecs: Get, name: str, image: Image | None) -> None:
    """A card for an image, if it has a kernel."""
    if image is not None and image.kernel is not None:
        kernelspecs().write(name, image)


def build_progress() -> tuple[Callable[[str], None], Callable[[], float]]:
    """Where lines of a build go, and the seconds since now."""
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", file=sys.stderr, flush=True)

    return progress, lambda: time.monotonic() - started


def build(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``build FOLDER``."""
    progress, seconds = build_progress()
    built = bench.build(
        options.recipe, name=options.name, refresh=options.refresh, check=options.check, offline=options.offline,
        vendored=options.vendor, progress=progress,
    )  # fmt: skip
    image, name = built.image, built.name
    kernel = (
        str(kernelspecs().write(name, image, logo=built.logo, mounts=built.mounts))
        if image.kernel is not None
        else None
    )
    row = {
        "name": name, "id": image.id, "kernelspec": kernel, "seconds": round(seconds(), 3), "locked": built.locked,
        "identical": built.locked and not built.differences and not built.renewed, "differences": built.differences,
        "renewed": built.renewed,
    }  # fmt: skip
    if options.json:
        show.as_json(row)
    else:
        print(f"image  {name}  {image.id}  in {row['seconds']:.1f} s")
        if kernel and image.kernel is not None:
            show.say(f'kernel {os.path.basename(kernel)}  "{image.kernel.display_name}"')
        for line in _verdict(built, options.check):
            show.say(line)
    return 1 if built.differences else 0


def _verdict(built: Built, checked: bool) -> Iterator[str]:
    for line in built.renewed:
        yield f"lock   renewed: {line}"
    if built.renewed:
        yield "lock   `jupyter workbench lock --refresh` writes that into the recipe"
    for line in built.differences:
        yield f"lock   {line}"
    if not built.differences:
        if checked:
            yield "check  the same layers twice"
        if built.locked and not built.renewed:
            yield "lock   identical to the lock"


def lock(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``lock FOLDER``."""
    progress, seconds = build_progress()
    path, built = bench.lock(options.recipe, refresh=options.refresh, vendor=options.vendor, progress=progress)
    image = built.image
    if image.kernel is not None:
        kernelspecs().write(built.name, image, logo=built.logo, mounts=built.mounts)
    packages = sum(len(step.packages) for step in built.lock.steps)
    row = {"lock": path, "id": image.id, "packages": packages, "renewed": built.renewed, "seconds": round(seconds(), 3)}
    if options.json:
        show.as_json(row)
    else:
        for line in built.renewed:
            show.say(f"renewed {line}")
        print(f"lock   {path}  {packages} packages")
        print(f"image  {built.name}  {image.id}  in {row['seconds']:.1f} s")
    return 0


def images(bench: Workbench, options: Any, _: Get) -> int:
    """``images``."""
    rows = bench.images()
    if options.json:
        show.as_json(rows)
    elif not rows:
        print("No images. `jupyter workbench build FOLDER` makes one from a recipe.")
    else:
        print(show.table([_image_row(row) for row in rows]))
    return 0


def _image_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "name": ", ".join(row["names"]) or "-",
        "id": short(row["id"]),
        "created": show.age(row["created"]),
        "size": format_size(row["size"]),
        "layers": str(row["layers"]),
        "kernel": row["kernel"] or "-",
    }


def short(digest: str) -> str:
    """Twelve digits of an image ID: enough to name it on a command line."""
    return digest.removeprefix("sha256:")[:12]


def rmi(bench: Workbench, options: Any, kernelspecs: Get) -> int:
    """``rmi IMAGE...``."""

    def remove(text: str) -> dict[str, Any]:
        names = bench.remove_image(text)
        for name in names:
            kernelspecs().remove(name)
        return {"names": names}

    return _each(options, remove, lambda _, done: f"removed {', '.join(done['names'])}")


def _each(options: Any, act: Callable[[str], dict[str, Any]], tell: Callable[[str, dict[str, Any]], str]) -> int:
    """Do something to each thing named; go on after an error, and end with 1 if there was any."""
    results, failed = [], False
    for text in options.what:
        try:
            done = act(text)
        except WorkbenchError as error:
            if options.debug:
                raise
            failed = True
            show.error(str(error))
            results.append({"what": text, **error.as_dict()})
            continue
        results.append({"what": text, **done})
        if not options.json:
            show.say(tell(text, done))
    if options.json:
        show.as_json(results)
    return int(failed)


def ps(bench: Workbench, options: Any, _: Get) -> int:
    """``ps``."""
    rows = bench.ps(every=options.all)
    if options.json:
        show.as_json(rows)
    elif not rows:
        print("No containers." if options.all else "No running containers. `ps --all` lists stopped ones too.")
    else:
        print(show.table([_container_row(row) for row in rows]))
    return 0


def _container_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "id": row["id"],
        "image": row["image"] or short(row["image_id"]),
        "status": _status(row),
        "created": show.age(row["created"]),
        "memory": format_size(usage["memory"]) if (usage := row.get("usage")) else "-",
        "cpu": f"{usage['cpu']:.1f} s" if usage else "-",
        "folder": row["folder"],
        "command": _one_line(row["command"]),
    }


def _status(row: dict[str, Any]) -> str:
    ended = row.get("exit")
    code = ended.get("code") if isinstance(ended, dict) else ended
    return f"{row['status']} ({code})" if row["status"] != "running" and code is not None else str(row["status"])


def _one_line(command: str | Iterable[str]) -> str:
    return " ".join((command if isinstance(command, str) else " ".join(command)).split())


def logs(bench: Workbench, options: Any, _: Get) -> int:
    """``logs CONTAINER``."""
    text = bench.logs(options.what)
    if options.json:
        show.as_json({"id": bench.container(options.what).id, "log": text})
    else:
        sys.stdout.write(text)
    return 0


def stop(bench: Workbench, options: Any, _: Get) -> int:
    """``stop CONTAINER...``."""

    def halt(text: str) -> dict[str, Any]:
        container = bench.container(text)
        bench.stop(container.id, timeout=options.time)
        return {"id": container.id}

    return _each(options, halt, lambda _, done: f"stopped {done['id']}")


def rm(bench: Workbench, options: Any, _: Get) -> int:
    """``rm CONTAINER...``."""

    def remove(text: str) -> dict[str, Any]:
        container = bench.container(text)
        bench.remove(container.id, force=options.force)
        return {"id": container.id}

    return _each(options, remove, lambda _, done: f"removed {done['id']}")


def gc(bench: Workbench, options: Any, _: Get) -> int:
    """``gc``."""
    freed = bench.gc()
    if options.json:
        show.as_json(freed)
    elif not (freed["layers"] or freed["blobs"]):
        print("Nothing to free: everything is needed by a name or a container.")
    else:
        print(f"freed {format_size(freed['bytes'])}: {freed['layers']} layers, {freed['blobs']} other files")
    return 0


def check(bench: Workbench, options: Any, _: Get) -> int:
    """``check``."""
    found = bench.check(repair=options.repair)
    if options.json:
        show.as_json([asdict(problem) for problem in found])
    elif not found:
        print("Everything is as its digests say.")
    else:
        for problem in found:
            mended = "mended" if problem.repaired else problem.remedy
            show.say(f"{problem.what}: {problem.obstacle}" + (f"; {mended}" if mended else ""))
    return int(any(not problem.repaired for problem in found))


def doctor(bench: Workbench, options: Any, _: Get) -> int:
    """``doctor``."""
    from workbench import doctor as room

    checks = room.examine(Path(str(bench.home)))
    if options.json:
        show.as_json([asdict(check) for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}[check.state]
            print(f"{mark}  {check.name:<{width}}  {check.found}")
            if check.remedy:
                print(f"{'':9}{'':<{width}}  -> {check.remedy}")
        print(room.summary(checks))
    return int(any(check.state == "missing" for check in checks))
