"""REST under ``/workbench/api``: thin handlers over `Workbench`. The only place that knows HTTP's status codes.

Every route is authenticated and authorised (resource ``workbench``); work that blocks leaves the loop.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from functools import wraps
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import ensure_async
from tornado import web

from workbench.jupyter import events, kernelspecs, shared
from workbench.jupyter.builds import Builds, recipe_in
from workbench.jupyter.provisioner import Asked
from workbench.model import (
    Conflict,
    HostLacks,
    InvalidInput,
    Limits,
    NotFound,
    Running,
    WorkbenchError,
    parse_network,
    parse_size,
)
from workbench.workbench import Workbench, as_row

if TYPE_CHECKING:
    from workbench.history.snapshot import Snapshot
    from workbench.model import Image
    from workbench.workbench import Checkout

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
        labels = await self.work(lambda bench: bench.container(text).state["labels"])
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

        def remove(bench: Workbench) -> tuple[str, list[str]]:
            image = bench.refs.resolve(text)
            names = bench.remove_image(text)
            for name in names:
                kernelspecs.remove(name)
            return image, names

        image, names = await self.work(remove)
        for name in names:
            self.settings["workbench_tell"](
                events.IMAGE, name=name.removesuffix(":latest"), image=image, action="removed"
            )
        self.answer({"names": names})


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


class KernelsHandler(_Handler):
    """Kernels with limits and a network of their own; Jupyter's route starts them without."""

    @web.authenticated
    @authorized
    @_told
    async def post(self) -> None:
        """Start one: Jupyter's ``name`` and ``path``; ``memory``, ``processes``, ``cpus``, ``network``, ``alias``."""
        tried = "start a kernel"
        wanted = self.wanted(tried, "name", {
            "name": str, "path": str, "memory": (str, int), "processes": int, "cpus": (int, float), "network": str,
            "alias": str,
        })  # fmt: skip
        memory = parse_size(wanted["memory"]) if "memory" in wanted else None
        asked = Asked(
            limits=Limits(memory, wanted.get("processes"), wanted.get("cpus")),
            network=parse_network(wanted["network"]) if "network" in wanted else "",
            alias=wanted.get("alias", ""),
        )
        manager: Any = self.kernel_manager
        try:
            spec = manager.kernel_spec_manager.get_kernel_spec(wanted["name"])
        except NoSuchKernel:
            raise NotFound(tried, f"there is no kernel {wanted['name']!r}", "build its image") from None
        if (spec.metadata.get("kernel_provisioner") or {}).get("provisioner_name") != "workbench":
            raise InvalidInput(tried, f"{wanted['name']!r} runs in no container", "name a kernel of an image")
        path = wanted.get("path", "")
        folder = os.path.join(os.path.expanduser(self.settings["server_root_dir"]), path.strip("/"))
        if ".." in path.split("/") or not os.path.isdir(folder):
            raise NotFound(tried, f"the server has no folder {path!r}", "name one below its own")
        kernel_id = await ensure_async(manager.start_kernel(kernel_name=wanted["name"], path=path, workbench=asked))
        self.set_header("Location", f"{self.base_url}api/kernels/{kernel_id}")
        model = await ensure_async(manager.kernel_model(kernel_id))
        self.answer(json.loads(json.dumps(model, default=json_default)), HTTPStatus.CREATED)


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
        known = {"recipe": str, "name": str, "refresh": bool, "offline": bool, "check": bool}
        wanted = self.wanted("begin a build", "recipe", known)
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


class HistoryHandler(_Handler):
    """What led to an image."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """An entry for each image of the history of ``?image=`` (a revision), the newest first; ``number``: at most."""
        text, number = self.get_query_argument("image", ""), self.get_query_argument("number", "1000")
        if not text or not number.isdecimal() or not number.isascii() or len(number) > 6:
            raise InvalidInput("read a history", "no image, or no number, is named", "ask for ?image=NAME&number=5")
        found = await self.work(lambda bench: [asdict(entry) for entry in islice(bench.history(text), int(number))])
        self.answer({"entries": found})


class DiffHandler(_Handler):
    """What lies between two images."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """Packages and files from ``?one=`` to ``other=``."""
        one, other = self.get_query_argument("one", ""), self.get_query_argument("other", "")
        if not one or not other:
            raise InvalidInput("compare images", "two are not named", "ask for ?one=NAME~1&other=NAME")
        self.answer(asdict(await self.work(lambda bench: bench.diff(one, other))))


class BranchesHandler(_Handler):
    """Names of images, as branches."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """A row for each name: its image, and the containers whose snapshots move it."""
        self.answer({"branches": await self.work(lambda bench: bench.branches())})

    @web.authenticated
    @authorized
    @_told
    async def post(self) -> None:
        """Make one: ``{"name": …, "image": …, "force": …}``."""
        wanted = self.wanted("make a name", "name", {"name": str, "image": str, "force": bool})
        if not wanted.get("image"):
            raise InvalidInput("make a name", "no image is named", 'give {"image": "…"}')

        def make(bench: Workbench) -> Image:
            image = bench.branch(wanted["name"], wanted["image"], force=wanted.get("force", False))
            if image.kernel is not None:
                kernelspecs.write(wanted["name"], image)
            return image

        image = await self.work(make)
        self.settings["workbench_tell"](events.IMAGE, name=wanted["name"], image=image.id, action="tagged")
        self.answer({"name": wanted["name"], "image": image.id}, HTTPStatus.CREATED)


class SnapshotHandler(_Handler):
    """A snapshot of a container."""

    @web.authenticated
    @authorized
    @_told
    async def post(self, text: str) -> None:
        """Take one: ``{"message": …, "tag": …, "author": …, "dry_run": …}``; with no image when nothing has changed."""
        wanted = self.wanted("take a snapshot", "", {"message": str, "tag": str, "author": str, "dry_run": bool})
        dry = wanted.get("dry_run", False)

        def take(bench: Workbench) -> Snapshot:
            taken = bench.snapshot(
                text, message=wanted.get("message", ""), author=wanted.get("author", ""), name=wanted.get("tag", ""),
                look_only=dry,
            )  # fmt: skip
            if taken.image is not None and taken.image.kernel is not None:
                kernelspecs.write(taken.ref, taken.image)
            return taken

        taken = await self.work(take)
        image = taken.image.id if taken.image else None
        if image:
            self.settings["workbench_tell"](events.IMAGE, name=taken.ref, image=image, action="snapshot")
        self.answer(asdict(taken) | {"image": image}, HTTPStatus.CREATED if image else HTTPStatus.OK)


class _TreeHandler(_Handler):
    async def put_over(self, text: str, act: Callable[[Workbench, str], Checkout]) -> None:
        """Change what a container is over; a kernel of this server is started anew for that."""
        container = await self.work(lambda bench: bench.container(text))
        name, kernel = container.id, str(container.state["labels"].get("kernel", ""))
        if kernel and kernel in self.kernel_manager:
            manager: Any = self.kernel_manager
            done = await manager.get_kernel(kernel).provisioner.change(lambda bench: act(bench, name))
        else:
            done = await self.work(lambda bench: act(bench, name))
        self.answer(asdict(done))


class CheckoutHandler(_TreeHandler):
    """Another environment for a container."""

    @web.authenticated
    @authorized
    @_told
    async def post(self, text: str) -> None:
        """``{"image": …, "create": …, "force": …}``; 409 for what no snapshot has, unless forced."""
        wanted = self.wanted("check out", "", {"image": str, "create": str, "force": bool})
        if not wanted.get("image") and not wanted.get("create"):
            raise InvalidInput("check out", "neither image nor create is named", 'give {"image": "…"}')
        image, create, force = wanted.get("image", ""), wanted.get("create", ""), wanted.get("force", False)
        await self.put_over(text, lambda bench, name: bench.checkout(name, image, create=create, force=force))


class ResetHandler(_TreeHandler):
    """A container anew."""

    @web.authenticated
    @authorized
    @_told
    async def post(self, text: str) -> None:
        """``{"image": …, "hard": …}``; 409 for what no snapshot has, unless hard."""
        wanted = self.wanted("reset a container", "", {"image": str, "hard": bool})
        image, hard = wanted.get("image", ""), wanted.get("hard", False)
        await self.put_over(text, lambda bench, name: bench.reset(name, image, hard=hard))


class NoRoute(_Handler):
    """Whatever else is asked for below ``/workbench/api``."""

    @web.authenticated
    @authorized
    @_told
    async def get(self) -> None:
        """Say in the form of all answers that there is nothing."""
        raise NotFound("answer a request", f"there is no {self.request.path}", "see the description of the API")

    head = post = put = patch = delete = get


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
    (_CONTAINER + "/snapshot", SnapshotHandler),
    (_CONTAINER + "/checkout", CheckoutHandler),
    (_CONTAINER + "/reset", ResetHandler),
    (r"/history/?", HistoryHandler),
    (r"/diff/?", DiffHandler),
    (r"/branches/?", BranchesHandler),
    (r"/builds/?", BuildsHandler),
    (r"/builds/(?P<text>[0-9a-f]+)", BuildHandler),
    (r"/kernels/?", KernelsHandler),
    (r"/doctor/?", DoctorHandler),
]
