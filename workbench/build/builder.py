"""A recipe becomes an image: its steps in order, each a layer, each cached by what went in.

A step runs in containers like a kernel's, over the layers before it, in a staging folder that is gone when
the builder is, however it goes. Its layer is normalised, so that the same step gives the same bytes, and
enters the store before the cache knows of it; the ref comes last.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from workbench.build import steps
from workbench.build.cache import Cache
from workbench.build.news import Log, Progress, explain
from workbench.build.recipe import Recipe
from workbench.containers import spec
from workbench.containers.container import Containers, new_id
from workbench.containers.host_settings import apt_sources
from workbench.images import config
from workbench.images.refs import Refs
from workbench.images.store import Lease, Store
from workbench.linux import userns
from workbench.model import BuildFailed, Exit, HostLacks, Image, Kernel, Limits, Mount, Settings, format_size

SUITE_LABEL = "org.jupyter.workbench.suite"
#: What a build needs at the least: a base and its archive side by side, in bytes.
ROOM = 1 << 30
#: Never part of a recipe's layer, whatever a step leaves there (folders themselves stay).
EXCLUDE = ["tmp/", "run/", "var/tmp/", "root/.cache", "etc/resolv.conf", "etc/hostname", "etc/hosts"]

_NO_WHEEL = re.compile(r"no usable wheels|building from source is disabled|builds? (?:is|are) disabled", re.I)


def build(
    recipe: Recipe, *, store: Store, refs: Refs, containers: Containers, settings: Settings,
    progress: Progress, name: str | None = None, epoch: int | None = None,
) -> Image:  # fmt: skip
    """Build a recipe and point ``name`` (default: the recipe's own) at the image.

    settings: what the host offers to the steps; none of it stays in a layer. progress: gets lines; those
    that begin with two spaces are passing news. epoch: seconds since 1970 that times are clamped to, by
    default the archive's own. Raises BuildFailed for a step that ends badly (what was built before it stays
    cached), HostLacks, LaunchFailed. Ctrl-C ends the running step and leaves nothing of it.
    """
    _room(store)
    with store.lease() as held:
        work = _Build(recipe, store, containers, settings, progress, epoch, held)
        work.base()
        work.apt()
        work.python()
        image = work.finish()
        refs.set(name or recipe.name, image.id)
    return image


def _room(store: Store) -> None:
    free = shutil.disk_usage(store.home).free
    if free < ROOM:
        obstacle = f"{store.home} has {format_size(free)} left, {format_size(ROOM)} are needed"
        raise HostLacks("build an image", obstacle, "free some or set WORKBENCH_HOME to another disk")


class _Build:
    """One run through the steps of a recipe."""

    def __init__(
        self, recipe: Recipe, store: Store, containers: Containers, settings: Settings, progress: Progress,
        epoch: int | None, held: Lease,
    ) -> None:  # fmt: skip
        self.recipe, self.store, self.containers = recipe, store, containers
        self.settings, self.progress, self.held = settings, progress, held
        self.cache = Cache(store.home)
        self.cache.prune(store.has_layer)
        self.epoch = epoch or 0
        self.layers: list[str] = []
        self.history: list[dict[str, Any]] = []

    # The steps

    def base(self) -> None:
        step = steps.base(self.recipe)

        def make(staging: Path) -> Path:
            if not self.epoch:
                self.epoch = archive_time(self.recipe.base.suite, self.settings)
            tree = staging / "tree"
            tree.mkdir()
            tree.chmod(0o755)  # the mode of /
            run = steps.base_run(self.recipe, str(tree), self.settings)
            self._run_all(step, [run], staging / "container", "bootstrap")
            return tree

        known = self._layer(step, make)
        self.epoch = known["epoch"]

    def apt(self) -> None:
        step = steps.apt(self.recipe)
        if step:

            def make(staging: Path) -> Path:
                return self._run_all(step, [steps.apt_run(self.recipe, step)], staging / "container")

            self._layer(step, make)

    def python(self) -> None:
        step = steps.python(self.recipe)
        if not step:
            return

        def make(staging: Path) -> Path:
            with self.cache.downloads() as cache:
                try:
                    return self._run_all(step, steps.python_runs(step, str(cache)), staging / "container")
                except _NeedsSource:
                    self.progress(f"  {step.name}: not all packages have wheels, building them from source")
                    runs = steps.python_runs(step, str(cache), wheels_only=False)
                    return self._run_all(step, runs, staging / "again")

        self._layer(step, make)

    def finish(self) -> Image:
        """Write the config: the image is there once this returns."""
        recipe = self.recipe
        data = config.encode(
            diff_ids=self.layers,
            env=steps.image_environment(recipe),
            cmd=("/bin/bash",),
            kernel=self._kernel(),
            limits=recipe.limit_values(),
            created=datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            labels={SUITE_LABEL: recipe.base.suite},
            history=self.history,
        )
        return self.store.add_image(data)

    def _kernel(self) -> Kernel | None:
        kernel = self.recipe.kernel_spec()
        if kernel is None or (self.recipe.kernel and self.recipe.kernel.argv):
            return kernel
        version = self._installed("ipykernel")
        # Spoken from 7.3 on; a client that asks for it otherwise is refused, not served in clear.
        return replace(kernel, supported_encryption=("curve",) if version >= (7, 3) else ())

    def _installed(self, distribution: str) -> tuple[int, ...]:
        """Version of a Python distribution in the newest layer, () when it is not there."""
        pattern = f"opt/venv/lib/python3*/site-packages/{distribution}-*.dist-info"
        for layer in reversed(self.layers):
            for path in Path(self.store.layer(layer)).glob(pattern):
                version = path.name.removeprefix(f"{distribution}-").removesuffix(".dist-info")
                return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        return ()

    # One step

    def _layer(self, step: steps.Step, make: Callable[[Path], Path]) -> dict[str, Any]:
        """The layer of a step: from the cache, or made once, whoever else wants it meanwhile."""
        key = step.key(self.layers[-1] if self.layers else "", self.epoch)
        known = self._hit(key)
        if known is None:
            waiting = f"{step.name}: waiting for another build of the same step"
            with self.cache.lock(key, lambda: self.progress(waiting)):
                known = self._hit(key)
                if known is None:
                    return self._make(step, key, make)
        self.progress(f"{step.name}: {step.title}, cached ({known['diff_id'][7:19]})")
        return self._take(step, known)

    def _hit(self, key: str) -> dict[str, Any] | None:
        known = self.cache.get(key)
        if known is None:
            return None
        # Held before it is looked for, so that no gc can take it in between.
        self.held.add(known["diff_id"])
        return known if self.store.has_layer(known["diff_id"]) else None

    def _take(self, step: steps.Step, known: dict[str, Any]) -> dict[str, Any]:
        self.layers.append(known["diff_id"])
        when = datetime.fromtimestamp(known["epoch"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.history.append({"created": when, "created_by": f"workbench: {step.title}"})
        return known

    def _make(self, step: steps.Step, key: str, make: Callable[[Path], Path]) -> dict[str, Any]:
        began = time.monotonic()
        self.progress(f"{step.name}: {step.title}")
        with self.store.staging() as staging:
            tree = make(Path(staging))
            self.progress(f"  {step.name}: keeping the layer")
            lowers = self._lowers()
            userns.call("workbench.images.layer:normalise", str(tree), lowers, self.epoch, EXCLUDE)
            diff_id = self.store.add_tree(tree)
        known = {"diff_id": diff_id, "epoch": self.epoch, "step": step.name}
        self.cache.put(key, known)
        self.progress(f"{step.name}: done in {time.monotonic() - began:.1f} s ({diff_id[7:19]})")
        return self._take(step, known)

    def _lowers(self) -> list[str]:
        return [str(self.store.layer(diff_id)) for diff_id in reversed(self.layers)]

    # Its containers

    def _run_all(
        self, step: steps.Step, runs: Sequence[steps.Run], folder: Path, profile: spec.Profile = "default"
    ) -> Path:
        """Run a step's containers one after the other over one writable layer; that layer."""
        name = f"{self.recipe.name.replace('/', '-')}-{step.name}.log"
        path = folder.parent / name
        with Log(str(path), step.name, self.progress) as log:
            null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for run in runs:
                    end = self.containers.run(self._spec(run, profile), str(folder), (null, log.writing, log.writing))
                    if end.code:
                        break
            finally:
                os.close(null)
        if end.code:
            lines = list(log.text)
            if step.name == "python" and _NO_WHEEL.search(" ".join(lines)) and folder.name == "container":
                raise _NeedsSource
            self._failed(step, end, log, name)
        return folder / "writable" / "upper"

    def _spec(self, run: steps.Run, profile: spec.Profile) -> spec.ContainerSpec:
        offered = [Mount(source, target, read_only=True) for source, target in self.settings.files]
        explicit = steps.step_environment(self.epoch) | run.env
        return spec.ContainerSpec(
            id=new_id(),
            argv=run.argv,
            env=spec.environment((), self.settings, explicit),
            cwd="/",
            layers=tuple(self._lowers()),
            hostname="build",  # the same everywhere: some packages write it down
            mounts=(*(replace(mount, source=os.path.realpath(mount.source)) for mount in run.mounts), *offered),
            texts=self.settings.texts,
            limits=Limits(processes=spec.DEFAULT_PROCESSES),
            network="outbound",
            profile=profile,
        )

    def _failed(self, step: steps.Step, end: Exit, log: Log, name: str) -> None:
        kept = self.cache.logs / name
        with suppress(OSError):
            shutil.move(log.path, kept)
        for line in log.tail:
            self.progress(f"  | {line}")
        obstacle, remedy = explain(list(log.text), self.recipe.base.suite)
        if end.limit or end.code > 128:
            obstacle = end.reason or f"it was killed by signal {end.code - 128}"
        where = f"its log is {kept}"
        raise BuildFailed(
            f"build {self.recipe.name}, step {step.name}", obstacle, f"{remedy}; {where}" if remedy else where
        )


class _NeedsSource(Exception):
    """uv found packages that come without wheels."""


def archive_time(suite: str, settings: Settings) -> int:
    """When the suite's archives were last written, in seconds since 1970: the newest Date of their InRelease.

    Times in layers are clamped to it and the image gives it as its own. Today's midnight where none answers;
    what then hinders the build is told by apt.
    """
    dates = []
    for line in apt_sources(suite, dict(settings.mirrors)).splitlines():
        _, address, dist, *_ = line.split()
        with suppress(OSError, ValueError, TypeError):
            request = urllib.request.urlopen(f"{address}/dists/{dist}/InRelease", timeout=10)
            with request as answer:
                found = re.search(rb"^Date: (.+)$", answer.read(4096), re.MULTILINE)
            if found:
                dates.append(int(parsedate_to_datetime(found[1].decode()).timestamp()))
    return max(dates, default=int(time.time()) // 86400 * 86400)
