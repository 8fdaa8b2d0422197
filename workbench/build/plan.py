"""What is to be built: how, over what, in which steps; and what came out, held against another build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from workbench.build import recipe as recipes
from workbench.build.custom import Files, Script
from workbench.build.debian import Apt, Base
from workbench.build.lock import Lock, StepLock
from workbench.build.recipe import Recipe
from workbench.build.steps import Step
from workbench.build.wheels import Python
from workbench.images import archive, sums
from workbench.images.refs import Refs
from workbench.images.store import Store
from workbench.linux import userns
from workbench.model import Image


@dataclass(frozen=True)
class Options:
    """How to build. lock: what the recipe's lock says; refresh: choose anew what of it cannot be had any more.

    anew: choose versions anew, even where they were chosen before; fresh: take nothing from the cache and leave
    nothing there; vendored: a folder with files of the lock; offline: fetch nothing; sums: sum the layers up for a
    lock; vendor: a folder to put all files into; epoch: seconds since 1970 that times are clamped to where no lock
    says it, by default the archive's own; keep_failed: give what a failed step leaves a name, to look into it.
    """

    lock: Lock | None = None
    refresh: bool = False
    anew: bool = False
    fresh: bool = False
    sums: bool = False
    vendor: Path | None = None
    vendored: Path | None = None
    offline: bool = False
    epoch: int | None = None
    keep_failed: bool = True


@dataclass(frozen=True)
class Built:
    """A finished build. lock: what it took and gave; renewed: what was chosen in place of what cannot be had.

    name: the image's, or empty; locked: whether the recipe had a lock; differences: one line for each step whose
    layer is not the one of its lock; logo, mounts: what the recipe has for kernels on this machine.
    """

    name: str
    image: Image
    lock: Lock
    locked: bool
    differences: list[str] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)
    logo: Path | None = None
    mounts: tuple[str, ...] = ()


def compare(store: Store, one: Built, other: Built) -> list[str]:
    """A line for each step that did not give the same layer twice, with the paths that differ."""
    lines = []
    for first, second in zip(one.lock.steps, other.lock.steps, strict=True):
        if first.diff_id != second.diff_id:
            trees = [str(store.layer(step.diff_id)) for step in (first, second)]
            paths = userns.call("workbench.images.sums:differing", *trees)
            lines.append(f"step {first.name} gives another layer each time, in {sums.told(paths)}")
    return lines


def below(
    recipe: Recipe, folder: Path, options: Options, store: Store, refs: Refs, build: Callable[[Path], Image]
) -> tuple[StepLock, Image] | None:
    """The image that a recipe stands on, and what a lock says of it; None for a Debian suite."""
    base = recipe.base
    asks = {name: value for name, value in msgspec.structs.asdict(base).items() if value is not None}
    if base.suite is not None:
        return None
    if base.recipe is not None:
        near = folder / base.recipe
        image = build(near if near.is_dir() else recipes.find(base.recipe))
    elif base.archive is not None:
        image = archive.load(store, folder / base.archive)
    else:
        expected = options.lock.step("base") if options.lock else None
        known = expected.image if expected and expected.asks == asks else ""
        image = store.image(known or refs.resolve(base.image or ""))
    return StepLock("base", asks, image=image.id, diff_id=image.diff_ids[-1] if image.diff_ids else ""), image


def steps_of(recipe: Recipe, folder: Path, has_python: bool = False) -> list[Step]:
    """The steps of a recipe, in order, from the one that changes least. has_python: the image below has one."""
    steps: list[Step] = [Base(recipe.base.suite)] if recipe.base.suite is not None else []
    packages = list(recipe.apt.packages)
    if recipe.python.packages and not has_python and "python3" not in packages:
        packages.append("python3")
    if packages:
        steps.append(Apt(packages))
    if recipe.python.packages:
        steps.append(Python(recipe.python.packages))
    if recipe.files:
        steps.append(Files(recipe.files, folder))
    steps += [Script(number, table) for number, table in enumerate(recipe.run, 1)]
    return steps


def changes(old: StepLock, new: StepLock) -> list[str]:
    """What another choice changed, as lines for people."""
    before = {entry.name: entry.version for entry in old.packages}
    after = {entry.name: entry.version for entry in new.packages}
    return [
        f"{name} {before.get(name, 'new')} -> {after.get(name, 'gone')}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]
