"""REST under ``/workbench/api``: thin handlers over `Workbench`.

Every route is authenticated and authorised (resource ``workbench``); work that blocks leaves the loop.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_server.auth.decorator import authorized
from jupyter_server.utils import ensure_async
from tornado import web

from workbench.jupyter import events, kernelspecs, shared, transfer
from workbench.jupyter import history_handlers as history
from workbench.jupyter.base import Handler, told
from workbench.jupyter.builds import Builds, recipe_in
from workbench.jupyter.environment import Asked
from workbench.model import (
    InvalidInput,
    Limits,
    NotFound,
    parse_network,
    parse_size,
)
from workbench.workbench import Workbench, as_row

if TYPE_CHECKING:
    pass


class ImagesHandler(Handler):
    """All images."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """A row for each."""
        self.answer({"images": await self.work(lambda bench: bench.images())})


class ImageHandler(Handler):
    """One image, by name or ID."""

    @web.authenticated
    @authorized
    @told
    async def get(self, text: str) -> None:
        """The image: layers, environment, kernel, limits."""
        self.answer(await self.work(lambda bench: as_row(bench.image(text))))

    @web.authenticated
    @authorized
    @told
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


class ContainersHandler(Handler):
    """All containers."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """A row for each that runs; with ``?all=1`` also for those that are stopped."""
        every = self.get_query_argument("all", "") in ("1", "true")
        self.answer({"containers": await self.work(lambda bench: bench.ps(every))})


class ContainerHandler(Handler):
    """One container, by ID or the beginning of one."""

    @web.authenticated
    @authorized
    @told
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
    @told
    async def delete(self, text: str) -> None:
        """Remove it with its changes; 409 while it runs, unless ``?force=1``."""
        force = self.get_query_argument("force", "") in ("1", "true")
        name = await self.work(lambda bench: bench.container(text).id)
        if not (force and await self.end_kernel(name)) or await self.work(lambda bench: _exists(bench, name)):
            await self.work(lambda bench: bench.remove(name, force))
        self.answer(None, HTTPStatus.NO_CONTENT)


class StopHandler(Handler):
    """The end of a container's processes."""

    @web.authenticated
    @authorized
    @told
    async def post(self, text: str) -> None:
        """Stop it; what it changed stays."""
        if not await self.end_kernel(text):
            await self.work(lambda bench: bench.stop(text))
        self.answer(None, HTTPStatus.NO_CONTENT)


class LogsHandler(Handler):
    """What a container printed."""

    @web.authenticated
    @authorized
    @told
    async def get(self, text: str) -> None:
        """What its main process wrote beside its messages."""
        self.answer({"logs": await self.work(lambda bench: bench.logs(text))})


class KernelsHandler(Handler):
    """Kernels with limits and a network of their own; Jupyter's route starts them without."""

    @web.authenticated
    @authorized
    @told
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


class DoctorHandler(Handler):
    """What this machine offers to containers."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """A row for each thing that a container needs."""
        from workbench import doctor

        checks = await self.work(lambda bench: [asdict(check) for check in doctor.examine(Path(bench.home))])
        self.answer({"checks": checks})


class _BuildsHandler(Handler):
    @property
    def builds(self) -> Builds:
        found: Builds = self.settings["workbench_builds"]
        return found


class BuildsHandler(_BuildsHandler):
    """Builds of this server."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """A row for each that runs or has ended lately."""
        self.answer({"builds": self.builds.rows()})

    @web.authenticated
    @authorized
    @told
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
    @told
    async def get(self, text: str) -> None:
        """How it stands, with what it said."""
        self.answer(self.builds.get(text).row(lines=True))

    @web.authenticated
    @authorized
    @told
    async def delete(self, text: str) -> None:
        """Cancel it; 409 when it has ended."""
        self.builds.get(text).cancel()
        self.answer(None, HTTPStatus.NO_CONTENT)


class NoRoute(Handler):
    """Whatever else is asked for below ``/workbench/api``."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """Say in the form of all answers that there is nothing."""
        raise NotFound("answer a request", f"there is no {self.request.path}", "see the description of the API")

    head = post = put = patch = delete = get


def _exists(bench: Workbench, name: str) -> bool:
    return any(container.id == name for container in bench.containers)


_IMAGE = r"/images/(?P<text>[\w.:/%-]+)"
_CONTAINER = r"/containers/(?P<text>[0-9a-f]+)"

#: Routes below ``/workbench/api``. Images are named with slashes as well, so their name is the rest of the path.
ROUTES: list[tuple[str, type[Handler]]] = [
    (r"/images/?", ImagesHandler),
    (_IMAGE, ImageHandler),
    (r"/containers/?", ContainersHandler),
    (_CONTAINER, ContainerHandler),
    (_CONTAINER + "/stop", StopHandler),
    (_CONTAINER + "/logs", LogsHandler),
    (_CONTAINER + "/snapshot", history.SnapshotHandler),
    (_CONTAINER + "/checkout", history.CheckoutHandler),
    (_CONTAINER + "/reset", history.ResetHandler),
    (r"/history/?", history.HistoryHandler),
    (r"/diff/?", history.DiffHandler),
    (r"/branches/?", history.BranchesHandler),
    (r"/show/?", transfer.ShowHandler),
    (r"/inventory/?", transfer.InventoryHandler),
    (r"/freeze/?", transfer.FreezeHandler),
    (r"/export/?", transfer.ExportHandler),
    (r"/import/?", transfer.ImportHandler),
    (r"/builds/?", BuildsHandler),
    (r"/builds/(?P<text>[0-9a-f]+)", BuildHandler),
    (r"/kernels/?", KernelsHandler),
    (r"/doctor/?", DoctorHandler),
]
