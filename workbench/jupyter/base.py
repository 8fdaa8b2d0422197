"""What all routes of the REST interface share. The only place that knows HTTP's status codes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from http import HTTPStatus
from typing import Any, TypeVar

from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import ensure_async

from workbench.jupyter import shared
from workbench.model import Conflict, HostLacks, InvalidInput, NotFound, Running, WorkbenchError
from workbench.workbench import Workbench

_STATUS: dict[type[WorkbenchError], HTTPStatus] = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    Running: HTTPStatus.CONFLICT,
    HostLacks: HTTPStatus.SERVICE_UNAVAILABLE,
}
T = TypeVar("T")


def status_of(error: WorkbenchError) -> HTTPStatus:
    """What a named error means in HTTP."""
    return _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def told(method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Answer a named error as JSON."""

    @wraps(method)
    async def wrapper(self: Handler, *args: Any, **kwargs: Any) -> None:
        try:
            await method(self, *args, **kwargs)
        except WorkbenchError as error:
            status = status_of(error)
            self.set_status(status.value)
            self.finish(json.dumps({"message": str(error), "reason": status.phrase, **error.as_dict()}))

    return wrapper


class Handler(APIHandler):
    """What all routes share."""

    auth_resource = "workbench"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """As JSON; what a route can is named to who asked it for something else (RFC 9110, 15.5.6)."""
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            methods = ("get", "head", "post", "put", "patch", "delete")
            self.set_header("Allow", ", ".join(name.upper() for name in methods if name in vars(type(self))))
        super().write_error(status_code, **kwargs)

    async def work(self, act: Callable[[Workbench], T]) -> T:
        """Do something that blocks, in a thread."""
        bench = shared.workbench(self.config)
        return await asyncio.to_thread(act, bench)

    async def end_kernel(self, text: str) -> bool:
        """Shut the kernel down that a container belongs to, if it is one of this server's, which would only
        start it again; whether it was."""
        labels = await self.work(lambda bench: bench.container(text).labels)
        kernel = labels.get("kernel", "")
        if not kernel or kernel not in self.kernel_manager:
            return False
        manager: Any = self.kernel_manager
        await ensure_async(manager.shutdown_kernel(kernel))
        return True

    def wanted(self, tried: str, needed: str, known: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
        """The request's JSON object. known: each key and what it may hold; needed: the one that must be there and say
        something, if any. Raises InvalidInput."""
        try:  # bytes that are no text, and halves of characters, which no file's name can have
            wanted = self.get_json_body() or {}
            plain = isinstance(wanted, dict) and b"\\u0000" not in json.dumps(wanted, ensure_ascii=False).encode()
        except UnicodeError:
            wanted, plain = {}, False
        if not plain:
            raise InvalidInput(tried, "the request is no JSON object of plain texts")
        for key, value in wanted.items():
            kinds = known.get(key, ())
            # To Python a truth value is a number as well.
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise InvalidInput(tried, f"{key!r} is not understood", f"known are {', '.join(known)}")
        if needed and not wanted.get(needed):
            raise InvalidInput(tried, f"no {needed} is named", f'give {{"{needed}": "…"}}')
        return wanted

    def answer(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Finish with JSON, or with nothing at all."""
        self.set_status(status.value)
        self.finish(None if status is HTTPStatus.NO_CONTENT else json.dumps(value))
