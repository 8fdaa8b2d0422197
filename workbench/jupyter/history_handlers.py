"""REST of the history: snapshots of containers, what they are over, and what lies between images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from workbench.jupyter import events, kernelspecs
from workbench.jupyter.base import Handler, told
from workbench.model import InvalidInput
from workbench.workbench import Workbench

if TYPE_CHECKING:
    from workbench.history.snapshot import Snapshot
    from workbench.history_face import Checkout
    from workbench.model import Image


class HistoryHandler(Handler):
    """What led to an image."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """An entry for each image of the history of ``?image=`` (a revision), the newest first; ``number``: at most."""
        text, number = self.get_query_argument("image", ""), self.get_query_argument("number", "1000")
        if not text or not number.isdecimal() or not number.isascii() or len(number) > 6:
            raise InvalidInput("read a history", "no image, or no number, is named", "ask for ?image=NAME&number=5")
        found = await self.work(lambda bench: [asdict(entry) for entry in islice(bench.history(text), int(number))])
        self.answer({"entries": found})


class DiffHandler(Handler):
    """What lies between two images."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """Packages and files from ``?one=`` to ``other=``."""
        one, other = self.get_query_argument("one", ""), self.get_query_argument("other", "")
        if not one or not other:
            raise InvalidInput("compare images", "two are not named", "ask for ?one=NAME~1&other=NAME")
        self.answer(asdict(await self.work(lambda bench: bench.diff(one, other))))


class BranchesHandler(Handler):
    """Names of images, as branches."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """A row for each name: its image, and the containers whose snapshots move it."""
        self.answer({"branches": await self.work(lambda bench: bench.branches())})

    @web.authenticated
    @authorized
    @told
    async def post(self) -> None:
        """Make one: ``{"name": …, "image": …, "force": …}``."""
        wanted = self.wanted("make a name", "name", {"name": str, "image": str, "force": bool})
        if not wanted.get("image"):
            raise InvalidInput("make a name", "no image is named", 'give {"image": "…"}')

        def make(bench: Workbench) -> Image:
            image = bench.branch(wanted["name"], wanted["image"], force=wanted.get("force", False))
            kernelspecs.offer(wanted["name"], image)
            return image

        image = await self.work(make)
        self.settings["workbench_tell"](events.IMAGE, name=wanted["name"], image=image.id, action="tagged")
        self.answer({"name": wanted["name"], "image": image.id}, HTTPStatus.CREATED)


class SnapshotHandler(Handler):
    """A snapshot of a container."""

    @web.authenticated
    @authorized
    @told
    async def post(self, text: str) -> None:
        """Take one: ``{"message": …, "tag": …, "author": …, "dry_run": …}``; with no image when nothing has changed."""
        wanted = self.wanted("take a snapshot", "", {"message": str, "tag": str, "author": str, "dry_run": bool})
        dry = wanted.get("dry_run", False)

        def take(bench: Workbench) -> Snapshot:
            taken = bench.snapshot(
                text, message=wanted.get("message", ""), author=wanted.get("author", ""), name=wanted.get("tag", ""),
                look_only=dry,
            )  # fmt: skip
            kernelspecs.offer(taken.ref, taken.image)
            return taken

        taken = await self.work(take)
        image = taken.image.id if taken.image else None
        if image:
            self.settings["workbench_tell"](events.IMAGE, name=taken.ref, image=image, action="snapshot")
        self.answer(asdict(taken) | {"image": image}, HTTPStatus.CREATED if image else HTTPStatus.OK)


class _TreeHandler(Handler):
    async def put_over(self, text: str, act: Callable[[Workbench, str], Checkout]) -> None:
        """Change what a container is over; a kernel of this server is started anew for that."""
        container = await self.work(lambda bench: bench.container(text))
        name, kernel = container.id, str(container.labels.get("kernel", ""))
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
    @told
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
    @told
    async def post(self, text: str) -> None:
        """``{"image": …, "hard": …}``; 409 for what no snapshot has, unless hard."""
        wanted = self.wanted("reset a container", "", {"image": str, "hard": bool})
        image, hard = wanted.get("image", ""), wanted.get("hard", False)
        await self.put_over(text, lambda bench, name: bench.reset(name, image, hard=hard))
