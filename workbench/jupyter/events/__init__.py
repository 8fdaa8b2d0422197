"""Events of a server (jupyter_events): what the schemas beside this file describe, for who listens.

A kernel manager without a server has no event logger, and nothing is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

BUILD, CONTAINER, IMAGE = (
    f"https://events.jupyter.org/workbench/{name}/v1" for name in ("build", "container", "image")
)
SCHEMAS = tuple(Path(__file__).parent / f"{name}.yaml" for name in ("build", "container", "image"))

Tell = Callable[..., None]


def nobody(schema: str, **data: Any) -> None:
    """Where nobody listens."""


def register(logger: Any) -> None:
    """Make the schemas known to a server's event logger."""
    for schema in SCHEMAS:
        logger.register_event_schema(schema)


def teller(owner: Any) -> Tell:
    """A function (schema, **data) that emits by the event logger of ``owner``.

    owner: a server or a kernel manager; without a logger that knows our schemas nothing is told. What was made on
    the event loop can be called in any thread.
    """
    logger = getattr(owner, "event_logger", None)
    if logger is None or BUILD not in logger.schemas:
        return nobody
    home = _running()

    def tell(schema: str, **data: Any) -> None:
        if home is None or _running() is home:
            logger.emit(schema_id=schema, data=data)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                home.call_soon_threadsafe(partial(logger.emit, schema_id=schema, data=data))

    return tell


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
