"""A workbench of one's own, and a folder to work in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workbench.workbench import Workbench


@pytest.fixture
def workbench() -> Iterator[Workbench]:
    workbench = Workbench()
    yield workbench
    workbench.close()
