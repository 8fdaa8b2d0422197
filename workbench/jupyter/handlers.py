"""REST under ``/workbench/api``: thin handlers over `Workbench`. The only place that knows HTTP's status codes.

Every route is authenticated and authorised (resource ``workbench``); work that blocks leaves the loop.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import ensure_async
from tornado import web

from workbench.jupyter import kernelspecs, shared
from workbench.jupyter.builds import Builds, recipe_in
from workbench.model import Conflict, HostLacks, InvalidInput, NotFound, WorkbenchError
from workbench.workbench import Workbench, as_row

_STATUS: dict[type[WorkbenchError], HTTPStatus] = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    HostLacks: HTTPStatus.SERVICE_UNAVAILABLE,
}
T = TypeVar("T")


def status_of(error: WorkbenchError) -> HTTPStatus:
    """What a named error means in HTTP."""
    return _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def _told(method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Answer a named error as JSON."""

    @wraps(method)
    async def wrapper(self: _Handler, *args: Any, **kwargs: Any) -> None:
        try:
            await method(self, *args, **kwargs)
        except WorkbenchError as error:
            status = status_of(error)
            self.set_status(status.value)
            self.finish(json.dumps({"message": str(error), "reason": status.phrase, **error.as_dict()}))

    return wrapper


class _Handler(APIHandler):
    """What all routes share."""

    auth_resource = "workbench"

    async def work(self, act: Callable[[Workbench], T]) -> T:
        """Do something that blocks, in a thread."""
        bench = shared.workbench(self.config)
        return await asyncio.to_thread(act, bench)

    async def end_kernel(self, text: str) -> bool:
        """Shut the kernel down that a container belongs to, if it is one of this server's, which would only
        start it again; whether it was."""
        labels = await self.work(lambda bench: bench.container(text).state["labels"])
        kernel = labels.get("kernel", "")
        if not kernel or kernel not in self.kernel_manager:
            return False
        manager: Any = self.kernel_manager
        await ensure_async(manager.shutdown_kernel(kernel))
        return True

    def answer(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Finish with JSON, or with nothing at all."""
        self.set_status(status.value)
        self.finish(None if status is HTTPStatus.NO_CONTENT else json.dumps(value))


class ImagesHandler(_Handler):
    """All images."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """A row for each."""
        self.answer({"images": await self.work(lambda bench: bench.images())})


class ImageHandler(_Handler):
    """One image, by name or ID."""

    @web.authenticated
    @authorized
    @_told
    async def get(self, text: str) -> None:
        """The image: layers, environment, kernel, limits."""
        self.answer(await self.work(lambda bench: as_row(bench.image(text))))

    @web.authenticated
    @authorized
    @_told
    async def delete(self, text: str) -> None:
        """Take the name away (with an ID, all names of that image), and its kernelspec."""

        def remove(bench: Workbench) -> list[str]:
            names = bench.remove_image(text)
            for name in names:
                kernelspecs.remove(name)
            return names

        self.answer({"names": await self.work(remove)})


class ContainersHandler(_Handler):
    """All containers."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """A row for each that runs; with ``?all=1`` also for those that are stopped."""
        every = self.get_query_argument("all", "") in ("1", "true")
        self.answer({"containers": await self.work(lambda bench: bench.ps(every))})


class ContainerHandler(_Handler):
    """One container, by ID or the beginning of one."""

    @web.authenticated
    @authorized
    @_told
    async def get(self, text: str) -> None:
        """Its row."""

        def find(bench: Workbench) -> dict[str, Any]:
            name = bench.container(text).id
            for row in bench.ps(True):
                if row["id"] == name:
                    return row
            raise NotFound("find a container", f"{name} has just gone")

        self.answer(await self.work(find))

    @web.authenticated
    @authorized
    @_told
    async def delete(self, text: str) -> None:
        """Remove it with its changes; 409 while it runs, unless ``?force=1``."""
        force = self.get_query_argument("force", "") in ("1", "true")
        name = await self.work(lambda bench: bench.container(text).id)
        if not (force and await self.end_kernel(name)) or await self.work(lambda bench: _exists(bench, name)):
            await self.work(lambda bench: bench.remove(name, force))
        self.answer(None, HTTPStatus.NO_CONTENT)


class StopHandler(_Handler):
    """The end of a container's processes."""

    @web.authenticated
    @authorized
    @_told
    async def post(self, text: str) -> None:
        """Stop it; what it changed stays."""
        if not await self.end_kernel(text):
            await self.work(lambda bench: bench.stop(text))
        self.answer(None, HTTPStatus.NO_CONTENT)


class LogsHandler(_Handler):
    """What a container printed."""

    @web.authenticated
    @authorized
    @_told
    async def get(self, text: str) -> None:
        """What its main process wrote beside its messages."""
        self.answer({"logs": await self.work(lambda bench: bench.logs(text))})


class DoctorHandler(_Handler):
    """What this machine offers to containers."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """A row for each thing that a container needs."""
        from workbench import doctor

        checks = await self.work(lambda bench: [asdict(check) for check in doctor.examine(Path(bench.home))])
        self.answer({"checks": checks})


class _BuildsHandler(_Handler):
    @property
    def builds(self) -> Builds:
        found: Builds = self.settings["workbench_builds"]
        return found


class BuildsHandler(_BuildsHandler):
    """Builds of this server."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """A row for each that runs or has ended lately."""
        self.answer({"builds": self.builds.rows()})

    @web.authenticated
    @authorized
    @_told
    async def post(self) -> None:
        """Begin one: ``{"recipe": …, "name": …, "refresh": …, "offline": …, "check": …}``."""
        wanted = self.get_json_body() or {}
        if not isinstance(wanted, dict) or "\0" in json.dumps(wanted, ensure_ascii=False):
            raise InvalidInput("begin a build", "the request is no JSON object of plain texts")
        known = {"recipe": str, "name": str, "refresh": bool, "offline": bool, "check": bool}
        for key, value in wanted.items():
            if key not in known or not isinstance(value, known[key]):
                raise InvalidInput("begin a build", f"{key!r} is not understood", f"known are {', '.join(known)}")
        if not wanted.get("recipe"):
            raise InvalidInput("begin a build", "no recipe is named", 'give {"recipe": "…"}')
        recipe = recipe_in(os.path.expanduser(self.settings["server_root_dir"]), wanted["recipe"])
        options = [f"--{key}" for key in ("refresh", "offline", "check") if wanted.get(key)]
        options += [f"--name={wanted['name']}"] if wanted.get("name") else []
        bench = shared.workbench(self.config)
        options.append(f"--Workbench.offer_host_settings={bench.offer_host_settings}")
        environ = os.environ | {"WORKBENCH_HOME": bench.home}
        self.answer(self.builds.start(recipe, options, environ).row(), HTTPStatus.ACCEPTED)


class BuildHandler(_BuildsHandler):
    """One build."""

    @web.authenticated
    @authorized
    @_told
    async def get(self, text: str) -> None:
        """How it stands, with what it said."""
        self.answer(self.builds.get(text).row(lines=True))

    @web.authenticated
    @authorized
    @_told
    async def delete(self, text: str) -> None:
        """Cancel it; 409 when it has ended."""
        self.builds.get(text).cancel()
        self.answer(None, HTTPStatus.NO_CONTENT)


def _exists(bench: Workbench, name: str) -> bool:
    return any(container.id == name for container in bench.containers)


_IMAGE = r"/images/(?P<text>[\w.:/%-]+)"
_CONTAINER = r"/containers/(?P<text>[0-9a-f]+)"

#: Routes below ``/workbench/api``. Images are named with slashes as well, so their name is the rest of the path.
ROUTES: list[tuple[str, type[_Handler]]] = [
    (r"/images/?", ImagesHandler),
    (_IMAGE, ImageHandler),
    (r"/containers/?", ContainersHandler),
    (_CONTAINER, ContainerHandler),
    (_CONTAINER + "/stop", StopHandler),
    (_CONTAINER + "/logs", LogsHandler),
    (r"/builds/?", BuildsHandler),
    (r"/builds/(?P<text>[0-9a-f]+)", BuildHandler),
    (r"/doctor/?", DoctorHandler),
]
