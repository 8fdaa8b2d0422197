"""A store of its own for each test, with each kind of ids that the test's user can have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.images import files
from workbench.images.store import Store
from workbench.linux import userns


@pytest.fixture(params=["own", "single"])
def ids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``root`` or ``range``, whichever this user has; then ``single``."""
    if request.param == "single":
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    return userns.host_ids().kind


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder that goes away whoever owns the files in it."""
    yield tmp_path
    for path in tmp_path.iterdir():
        files.discard(str(path))


@pytest.fixture
def store(place: Path) -> Store:
    return Store(place / "home").open()
