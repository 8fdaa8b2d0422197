"""A smaller image for these tests, which look at every file of it: Debian and its own Python, without packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.images import config
from workbench.linux import userns
from workbench.model import Kernel
from workbench.workbench import Workbench

#: Its name.
LOWER = "lower"


@pytest.fixture(scope="session")
def image(image: str) -> str:
    """The ID of the lower two layers of recipes/python, with the name ``lower`` and a kernel of a kind."""
    bench = Workbench()
    whole = bench.image(image)
    lower = replace(whole, diff_ids=whole.diff_ids[:2])
    data = config.encode(
        diff_ids=lower.diff_ids, cmd=("/bin/sh",), kernel=Kernel(("/bin/sh",), display_name="Lower"),
        created=lower.created, labels=lower.labels, history=bench.store.history(image)[:2],
    )  # fmt: skip
    made = bench.store.add_image(data)
    bench.refs.set(LOWER, made.id)
    bench.close()
    return made.id


@pytest.fixture
def workbench() -> Iterator[Workbench]:
    workbench = Workbench(offer_host_settings=False)  # what is bound over a file hides it
    before = set(workbench.refs.all())
    yield workbench
    for name in set(workbench.refs.all()) - before:
        workbench.refs.delete(name)
    workbench.gc()
    workbench.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Workbench]:
    """Another, empty store."""
    other = Workbench(home=str(tmp_path / "elsewhere"), offer_host_settings=False)
    yield other
    other.close()
    userns.call("workbench.linux.trees:remove", other.home)
