"""The library's own face, for tests that look inside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workbench.workbench import Workbench


@pytest.fixture
def workbench() -> Iterator[Workbench]:
    workbench = Workbench()
    yield workbench
    workbench.close()
