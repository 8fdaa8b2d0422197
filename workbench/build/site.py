"""Where the steps of a build run: containers like a kernel's over the layers so far, in a staging folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workbench.build import bytecode
from workbench.build.fetch import Fetcher
from workbench.build.news import Log, Progress
from workbench.build.steps import Run, Step, StepFailed, step_environment
from workbench.containers import spec
from workbench.containers.container import Containers, new_id
from workbench.images.store import Store
from workbench.model import Limits, Mount, Settings


class Workplace:
    """The ``Site`` of a build's steps. layers: diff_ids, the lowest first; staging: a folder for the present step."""

    def __init__(
        self, suite: str, settings: Settings, fetcher: Fetcher, uv_cache: Path, bytecode: Path | None, *,
        store: Store, containers: Containers, progress: Progress,
    ) -> None:  # fmt: skip
        self.suite, self.settings, self.fetcher, self.uv_cache = suite, settings, fetcher, uv_cache
        self._bytecode = bytecode
        self.epoch = 0
        self.trusted = True
        self.layers: list[str] = []
        self.staging = Path()
        self._store, self._containers, self._progress = store, containers, progress

    def scratch(self) -> Path:
        """A new folder of the host, gone when the step is over."""
        number = len(os.listdir(self.staging))
        folder = self.staging / f"scratch{number}"
        folder.mkdir()
        folder.chmod(0o755)
        return folder

    @property
    def bytecode(self) -> Path | None:
        """Only Debian's own Python is trusted to compile for others."""
        return bytecode.place(self._bytecode, self.layers) if self._bytecode and self.trusted else None

    def newest(self, pattern: str) -> Path | None:
        """A path in the highest of the layers that has it."""
        for layer in reversed(self.layers):
            for path in Path(self._store.layer(layer)).glob(pattern):
                return path
        return None

    def try_out(self, step: Step, runs: Sequence[Run]) -> None:
        """Run containers over the layers and keep nothing of what they write. Raises StepFailed."""
        self.run_all(step, runs, f"try{len(os.listdir(self.staging))}")

    def lowers(self) -> list[str]:
        """The trees of the layers, highest first."""
        return self._store.trees(self.layers)

    def run_all(self, step: Step, runs: Sequence[Run], where: str) -> Path:
        """Run a step's containers one after the other over one writable layer; the tree that becomes the layer.

        where: a name in the staging folder. Raises StepFailed.
        """
        folder = self.staging / where
        path = self.staging / f"{where}.log"
        with Log(str(path), step.name, self._progress) as log:
            null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for run in runs:
                    end = self._containers.run(self._spec(run), str(folder), (null, log.writing, log.writing))
                    if end.code:
                        break
                    if run.then:
                        run.then()
            finally:
                os.close(null)
        if end.code:
            tree = None if run.bootstrap else folder / "writable" / "upper"
            raise StepFailed(end, list(log.text), path, tree)
        return Path(runs[0].tree) if runs and runs[0].tree else folder / "writable" / "upper"

    def _spec(self, run: Run) -> spec.ContainerSpec:
        # Only what reaches out is told how: nothing of the host can stay in what does not know it.
        settings = self.settings if run.network != "none" else Settings()
        offered = [Mount(source, target, read_only=True) for source, target in settings.files]
        explicit = step_environment(self.epoch) | run.env
        return spec.ContainerSpec(
            id=new_id(),
            argv=run.argv,
            env=spec.environment((), settings, explicit),
            cwd="/",
            layers=() if run.bootstrap else tuple(self.lowers()),
            hostname="build",  # the same everywhere: some packages write it down
            mounts=(*(replace(mount, source=os.path.realpath(mount.source)) for mount in run.mounts), *offered),
            texts=settings.texts,
            limits=Limits(processes=spec.DEFAULT_PROCESSES),
            network=run.network,
            profile="bootstrap" if run.bootstrap else "default",
        )
