"""A recipe becomes an image: its steps in order, each a layer, each cached by what went in.

What a step takes is chosen first (or read from the lock) and fetched by hash; then it runs without a network in
containers like a kernel's, over the layers before it, in a staging folder that is gone when the builder is,
however it goes. Its layer is normalised, so that the same step gives the same bytes, and enters the store before
the cache knows of it; the ref comes last.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from workbench.build import debian, plan
from workbench.build import lock as locks
from workbench.build import recipe as recipes
from workbench.build.cache import Cache
from workbench.build.fetch import Fetcher, Unavailable, Unreachable
from workbench.build.lock import StepLock
from workbench.build.news import Progress, explain, missing
from workbench.build.pins import beside
from workbench.build.plan import Built, Options, compare
from workbench.build.recipe import Recipe
from workbench.build.site import Workplace
from workbench.build.steps import Step, StepFailed, asks_key, image_environment, key
from workbench.containers.container import Containers
from workbench.images import config, sums
from workbench.images.refs import Refs
from workbench.images.store import Lease, Store
from workbench.linux import userns
from workbench.model import (
    SUITE_LABEL,
    BuildFailed,
    HostLacks,
    Image,
    InvalidInput,
    Kernel,
    Limits,
    Settings,
    WorkbenchError,
    format_size,
    narrower,
)

__all__ = ["Built", "Options", "build", "compare"]

#: What names an image of a failed step, before the recipe's own name.
AFTER_FAILURE = "after-failure/"
PRELOAD_LABEL = "org.jupyter.workbench.preload"
#: What a build needs at the least: a base and its archive side by side, in bytes.
ROOM = 1 << 30
#: Never part of a recipe's layer, whatever a step leaves there (folders themselves stay).
EXCLUDE = ["tmp/", "run/", "var/tmp/", "root/.cache", "etc/resolv.conf", "etc/hostname", "etc/hosts"]

_PLAIN = Options()


def build(
    folder: Path, *, store: Store, refs: Refs, containers: Containers, settings: Callable[[str], Settings],
    progress: Progress, name: str | None = None, options: Options = _PLAIN, above: tuple[str, ...] = (),
) -> Built:  # fmt: skip
    """Build the recipe of a folder and point ``name`` (default: the recipe's own; empty for none) at the image.

    settings: by Debian suite (empty for none known): what the host offers to the steps; none of it stays in a
    layer. progress: gets lines; those that begin with two spaces are passing news. Raises BuildFailed for a step
    that ends badly (what was built before it stays cached), HostLacks, LaunchFailed, InvalidInput for a lock of
    another recipe. Ctrl-C ends the running step and leaves nothing of it. above: folders of the recipes that stand
    on this one.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise InvalidInput("build a recipe", f"{folder} stands on itself", "correct base.recipe")
    recipe = recipes.load(folder)
    _room(store)

    def below(path: Path) -> Image:
        """The image of a recipe that this one stands on, by its own lock."""
        progress(f"base: the recipe {path}")
        own = replace(
            options, lock=locks.load(path), vendor=None, sums=False, epoch=options.epoch,
            vendored=path / "vendor" if (path / "vendor").is_dir() else options.vendored,
        )  # fmt: skip
        return build(
            path, store=store, refs=refs, containers=containers, settings=settings, progress=progress, name="",
            options=own, above=(*above, here),
        ).image  # fmt: skip

    with store.lease() as held, ExitStack() as stack:
        cache = Cache(store.home)
        cache.prune(store.has_layer)
        downloads = stack.enter_context(cache.downloads())
        base = plan.below(recipe, folder, options, store, refs, below)
        suite = recipe.base.suite or (dict(base[1].labels).get(SUITE_LABEL, "") if base else "")
        if suite not in recipes.SUITES:  # an image says it: no address of the host's may come of that
            suite = ""
        offered = settings(suite)
        fetcher = Fetcher(
            downloads / "sha256", stack.enter_context(store.staging()), offered, progress,
            vendored=options.vendored, offline=options.offline,
        )  # fmt: skip
        stack.callback(fetcher.close)
        work = _Build(
            recipe,
            folder,
            suite,
            options,
            store,
            refs,
            containers,
            offered,
            progress,
            held,
            cache,
            fetcher,
            downloads / "uv",
            None if options.fresh else downloads / "bytecode",
        )
        if base:
            held.add(base[1].id)
            work.stand_on(*base)
        built = work.all()
        with suppress(WorkbenchError):  # the last failure is over
            refs.delete(AFTER_FAILURE + recipe.name)
        if name != "":
            built = replace(built, name=name or recipe.name)
            refs.set(built.name, built.image.id)
    return built


def _room(store: Store) -> None:
    free = shutil.disk_usage(store.home).free
    if free < ROOM:
        obstacle = f"{store.home} has {format_size(free)} left, {format_size(ROOM)} are needed"
        raise HostLacks("build an image", obstacle, "free some or set WORKBENCH_HOME to another disk")


class _Build(Workplace):
    """One run through the steps of a recipe."""

    def __init__(
        self, recipe: Recipe, folder: Path, suite: str, options: Options, store: Store, refs: Refs,
        containers: Containers, settings: Settings, progress: Progress, held: Lease, cache: Cache, fetcher: Fetcher,
        uv_cache: Path, bytecode: Path | None,
    ) -> None:  # fmt: skip
        super().__init__(
            suite, settings, fetcher, uv_cache, bytecode, store=store, containers=containers, progress=progress
        )  # fmt: skip
        self.below: Image | None = None
        self.recipe, self.folder, self.options, self.store, self.refs = recipe, folder, options, store, refs
        self.progress, self.held, self.cache = progress, held, cache
        self.steps: list[Step] = []
        self.expected = {step.name: step for step in options.lock.steps} if options.lock else {}
        self.epoch = options.lock.epoch if options.lock else options.epoch or 0
        self.history: list[dict[str, Any]] = []
        self.locked: list[StepLock] = []
        self.renewed: list[str] = []

    def stand_on(self, locked: StepLock, image: Image) -> None:
        """Begin with another image's layers."""
        self.below = image
        self.layers += image.diff_ids
        self.history += self.store.history(image.id)
        self.locked.append(locked)
        self.trusted = False
        if not self.epoch:  # what stands on the same image with the same packages is the same, whenever it is built
            self.epoch = _seconds(image.created)

    def all(self) -> Built:
        has_python = self.newest("usr/bin/python3") is not None
        self.steps = plan.steps_of(self.recipe, self.folder, has_python)
        if not self.suite and any(step.name == "apt" for step in self.steps):
            raise InvalidInput(
                f"build {self.recipe.name}", "its base has no Python, or is of no Debian suite known here",
                "leave [apt] out, or take another base",
            )  # fmt: skip
        self._match()
        for step in self.steps:
            self.locked.append(self._step(step))
        image = self._finish()
        if self.options.vendor:
            self._vendor(self.options.vendor)
        made = locks.new(self.epoch, platform.machine(), tuple(self.locked))
        locked = self.options.lock is not None
        table = self.recipe.kernel
        logo = beside(self.folder, table.logo, f"{self.folder}: kernel.logo") if table and table.logo else None
        mounts = tuple(os.path.expanduser(text) for text in self.recipe.mounts)
        return Built("", image, made, locked, list(self._differences()), self.renewed, logo, mounts)

    def _differences(self) -> Iterator[str]:
        for locked in self.locked:
            known = self.expected.get(locked.name)
            if known is not None and known.image != locked.image:
                yield f"step {locked.name} stands on image {locked.image[7:19]}, the lock on {known.image[7:19]}"
                continue
            if known is None or known.diff_id in ("", locked.diff_id):
                continue
            tree = str(self.store.layer(locked.diff_id))
            if self.store.has_layer(known.diff_id):
                paths = userns.call("workbench.images.sums:differing", str(self.store.layer(known.diff_id)), tree)
            else:
                paths = known.names(userns.call("workbench.images.sums:summary", tree, list(known.sums)))
            other = f"; built by {locked.builder} here" if locked.builder != known.builder else ""
            yield f"step {locked.name} differs from the lock in {sums.told(paths)}{other}"

    def _vendor(self, folder: Path) -> None:
        """All files of the lock, under their own names."""
        folder.mkdir(parents=True, exist_ok=True)
        by_name = {locked.name: locked for locked in self.locked}
        for step in self.steps:
            locked = by_name[step.name]
            files = step.files(locked, self, every=True)
            taken = self.fetcher.take(files)
            for file in files:
                if os.path.basename(file.name) != file.name:
                    raise InvalidInput("vendor a lock's files", f"{file.name!r} is no file's name")
                shutil.copyfile(taken[file.sha256], folder / file.name)

    def _match(self) -> None:
        """Whether the lock is one of this recipe; with ``refresh`` the steps that it does not cover are forgotten."""
        lock = self.options.lock
        if lock is None:
            return
        other = [step.name for step in self.steps if not self._covers(step)]
        if self.locked and ((known := self.expected.get("base")) is None or known.asks != self.locked[0].asks):
            other.append("base")
        other += sorted(set(self.expected) - {step.name for step in self.steps} - {"base"})
        if lock.machine != platform.machine():
            other = [f"all of them, it is for {lock.machine}"]
        if other and not self.options.refresh:
            raise InvalidInput(
                f"build {self.recipe.name} from its lock", f"the recipe says something else in {', '.join(other)}",
                "write the lock anew with `jupyter workbench lock`, or add --refresh",
            )  # fmt: skip
        for name in other:
            self.expected.pop(name, None)
            self.renewed.append(f"step {name}, which the recipe has changed")
        if lock.machine != platform.machine():
            self.expected.clear()

    def _covers(self, step: Step) -> bool:
        known = self.expected.get(step.name)
        return known is not None and known.asks == step.asks

    # One step

    def _step(self, step: Step) -> StepLock:
        """A step's layer: from the cache, or made once, whoever else wants it meanwhile; what it took and gave."""
        with self.store.staging() as staging:
            self.staging = staging
            try:
                return self._layer(step)
            except StepFailed as failed:
                raise self._told(step, failed) from None
            except (Unavailable, Unreachable) as error:
                raise BuildFailed(f"build {self.recipe.name}, step {step.name}", f"not to be had: {error}") from None

    def _layer(self, step: Step) -> StepLock:
        parent = self.layers[-1] if self.layers else ""
        expected = self.expected.get(step.name)
        # What was made before of the same wish: of the recipe's, or of what became of a lock's that was too old.
        wish = asks_key(step, expected if self.options.refresh else None, parent, self.epoch)
        if expected is None and (known := None if self.options.anew else self._hit(wish)):
            return self._cached(step, known)
        locked = expected or self._resolve(step, None)
        by_files = key(step, locked, parent, self.epoch)
        known = self._hit(by_files)
        if known is None and expected and self.options.refresh and (known := self._hit(wish)):
            locked = msgspec.convert(known["lock"], StepLock)
            self.renewed += plan.changes(expected, locked)
            self.expected.pop(step.name)
        if known is None:
            waiting = f"{step.name}: waiting for another build of the same step"
            with self.cache.lock(by_files, lambda: self.progress(waiting)):
                known = self._hit(by_files)
                if known is None:
                    return self._make(step, locked, wish)
        known = known | {
            "lock": msgspec.to_builtins(msgspec.structs.replace(locked, diff_id=known["diff_id"], sums={}))
        }
        if expected is None:
            self._remember(wish, known)
        return self._cached(step, known)

    def _remember(self, key: str, known: dict[str, Any]) -> None:
        if not self.options.fresh:
            self.cache.put(key, known)

    def _hit(self, key: str) -> dict[str, Any] | None:
        known = None if self.options.fresh else self.cache.get(key)
        if known is None:
            return None
        # Held before it is looked for, so that no gc can take it in between.
        self.held.add(known["diff_id"])
        return known if self.store.has_layer(known["diff_id"]) else None

    def _cached(self, step: Step, known: dict[str, Any]) -> StepLock:
        self.progress(f"{step.name}: {step.title}, cached ({known['diff_id'][7:19]})")
        return self._took(step, known)

    def _took(self, step: Step, known: dict[str, Any]) -> StepLock:
        self.epoch = known["epoch"]
        self.layers.append(known["diff_id"])
        when = datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.history.append({"created": when, "created_by": f"workbench: {step.title}"})
        locked = msgspec.convert(known["lock"], StepLock)
        if not self.options.sums:
            return locked
        tree = str(self.store.layer(known["diff_id"]))
        return msgspec.structs.replace(locked, sums=userns.call("workbench.images.sums:summary", tree))

    def _resolve(self, step: Step, old: StepLock | None) -> StepLock:
        if self.options.offline:
            raise BuildFailed(
                f"build {self.recipe.name}, step {step.name}", "no lock says what to take, and nothing may be fetched",
                "write one with `jupyter workbench lock`, or build without --offline",
            )  # fmt: skip
        if not self.epoch:
            self.epoch = (
                debian.archive_time(self.suite, self.settings) if self.suite else int(time.time()) // 86400 * 86400
            )
        self.progress(f"  {step.name}: choosing versions")
        return locks.checked(step.resolve(self, old))

    def _make(self, step: Step, locked: StepLock, wish: str) -> StepLock:
        began = time.monotonic()
        self.progress(f"{step.name}: {step.title}")
        self._fetch_ahead(step, locked)
        locked, taken = self._take(step, locked)
        tree = self.run_all(step, step.runs(locked, taken, self), "container")
        self.progress(f"  {step.name}: keeping the layer")
        userns.call("workbench.images.layer:normalise", str(tree), self.lowers(), self.epoch, EXCLUDE)
        self._refuse_keys(step, str(tree))
        diff_id = self.store.add_tree(tree)
        locked = msgspec.structs.replace(locked, diff_id=diff_id, sums={})
        known = {"diff_id": diff_id, "epoch": self.epoch, "step": step.name, "lock": msgspec.to_builtins(locked)}
        self._remember(key(step, locked, self.layers[-1] if self.layers else "", self.epoch), known)
        if step.name not in self.expected:
            self._remember(wish, known)
        self.progress(f"{step.name}: done in {time.monotonic() - began:.1f} s ({diff_id[7:19]})")
        return self._took(step, known)

    def _refuse_keys(self, step: Step, tree: str) -> None:
        """Whoever gets the image would have them."""
        if not step.own:
            return
        if found := userns.call("workbench.build.keys:find", tree):
            raise BuildFailed(
                f"build {self.recipe.name}, step {step.name}", f"it leaves a private key in /{', /'.join(found)}",
                "make it when a container starts, or mount it",
            )  # fmt: skip

    def _fetch_ahead(self, step: Step, locked: StepLock) -> None:
        """Begin with the files of this step and, where the lock tells them, of those after it."""
        at = self.steps.index(step)
        self.fetcher.start(step.files(locked, self))
        for later in self.steps[at + 1 :]:
            if later.name in self.expected:
                self.fetcher.start(later.files(self.expected[later.name], self))

    def _take(self, step: Step, locked: StepLock) -> tuple[StepLock, dict[str, Path]]:
        """The step's files; where some cannot be had, those of another choice if that is wanted."""
        try:
            step.prepare(locked, self)
            return locked, self.fetcher.take(step.files(locked, self))
        except Unavailable as error:
            (first, reason), more = error.missing[0], len(error.missing) - 1
            if not self.options.refresh or self.options.offline:
                others = f" (and {more} more)" if more else ""
                raise BuildFailed(
                    f"build {self.recipe.name}, step {step.name}",
                    f"{first.what}, sha256 {first.sha256}{others}, cannot be had: {reason}",
                    "" if step.name not in self.expected else "choose another with `--refresh`",
                ) from None
            self.progress(f"{step.name}: {more + 1} of its files cannot be had any more, choosing others")
        again = self._resolve(step, locked)
        self.renewed += plan.changes(locked, again)
        self.expected.pop(step.name, None)
        return again, self.fetcher.take(step.files(again, self))

    def _told(self, step: Step, failed: StepFailed) -> BuildFailed:
        """Show the end of a failed step's log and keep all of it; the error in one line."""
        kept = self.cache.logs / f"{self.recipe.name.replace('/', '-')}-{step.name}.log"
        with suppress(OSError):
            shutil.move(failed.log, kept)
        for line in failed.lines[-15:]:
            self.progress(f"  | {line}")
        obstacle, remedy = explain(failed.lines, self.suite or "of this base")
        end = failed.end
        if end.limit or end.code > 128:
            obstacle = end.reason or f"it was killed by signal {end.code - 128}"
        where = f"its log is {kept}"
        if failed.tree is not None and self.options.keep_failed and self._keep_failed(failed.tree):
            where += f"; enter it with `jupyter workbench run --after-failure {self.recipe.name}`"
        told = BuildFailed(
            f"build {self.recipe.name}, step {step.name}", obstacle, f"{remedy}; {where}" if remedy else where
        )
        told.missing = missing(failed.lines)
        return told

    def _keep_failed(self, tree: Path) -> bool:
        """An image of what a failed step left, to look into; whether it could be kept."""
        with suppress(WorkbenchError, OSError):
            diff_id = self.store.add_tree(tree)
            env = (dict(self.below.env) if self.below else {}) | image_environment(self.recipe, bool(self.below))
            labels = {SUITE_LABEL: self.suite} if self.suite else {}
            data = config.encode(diff_ids=[*self.layers, diff_id], env=env, cmd=("/bin/bash",), labels=labels)
            self.refs.set(AFTER_FAILURE + self.recipe.name, self.store.add_image(data).id)
            return True
        return False

    # The image

    def _finish(self) -> Image:
        """Write the config: the image is there once this returns."""
        recipe, below = self.recipe, self.below
        env = (dict(below.env) if below else {}) | image_environment(recipe, bool(below))
        labels = {SUITE_LABEL: self.suite} if self.suite else {}
        if recipe.preload:
            labels[PRELOAD_LABEL] = " ".join(recipe.preload)
        data = config.encode(
            diff_ids=self.layers,
            env=env,
            cmd=below.cmd if below and below.cmd else ("/bin/bash",),
            working_dir=below.working_dir if below else "/",
            kernel=self._kernel(),
            limits=recipe.limit_values().stricter(below.limits if below else Limits()),
            network=narrower(recipe.network, below.network if below else None),
            created=datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            labels=labels,
            history=self.history,
        )
        return self.store.add_image(data)

    def _kernel(self) -> Kernel | None:
        kernel = self.recipe.kernel_spec(self.below.kernel if self.below else None)
        if kernel is None or (self.recipe.kernel and self.recipe.kernel.argv) or kernel.argv != recipes.IPYKERNEL_ARGV:
            return kernel
        # Spoken from 7.3 on; a client that asks for it otherwise is refused, not served in clear.
        found = self.newest("opt/venv/lib/python3*/site-packages/ipykernel-*.dist-info")
        version = [int(part) for part in re.findall(r"\d+", found.name)[:2]] if found else []
        return replace(kernel, supported_encryption=("curve",) if version >= [7, 3] else ())


def _seconds(created: str) -> int:
    """An image's own date in seconds since 1970, at least one: zero means that nobody has said it."""
    with suppress(ValueError, OverflowError):
        return max(1, int(datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()))
    return 1
