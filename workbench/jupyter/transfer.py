"""REST of what goes away and comes in: an image's archive, what an image holds, and a recipe made of it."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.utils import ensure_async
from tornado import web

from workbench.images.files import clear_errors
from workbench.jupyter import events, kernelspecs, shared
from workbench.jupyter.base import Handler, told
from workbench.model import InvalidInput, WorkbenchError
from workbench.workbench import Workbench

if TYPE_CHECKING:
    from workbench.model import Image

_CHUNK = 1 << 20
#: Bytes of an archive that comes in; the disk is full before.
_MOST = 1 << 50


class ShowHandler(Handler):
    """One image, and what it changed."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """The entry of its history, and what lies between its parent and it, for ``?image=`` (a revision)."""
        text = self.get_query_argument("image", "")
        if not text:
            raise InvalidInput("show an image", "none is named", "ask for ?image=NAME")

        entry, found = await self.work(lambda bench: bench.show(text))
        self.answer(asdict(entry) | {"diff": asdict(found) if found else None})


class InventoryHandler(Handler):
    """What an image holds."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """Its packages, for ``?image=`` (a revision); with ``unowned=1`` the files that none owns as well."""
        text, unowned = self.get_query_argument("image", ""), self.get_query_argument("unowned", "") == "1"
        if not text:
            raise InvalidInput("take an inventory", "no image is named", "ask for ?image=NAME")
        self.answer(asdict(await self.work(lambda bench: bench.inventory(text, unowned=unowned))))


class FreezeHandler(Handler):
    """A recipe made of an image."""

    @web.authenticated
    @authorized
    @told
    async def post(self) -> None:
        """``{"image": …, "build": …}``: the recipe's files as texts; built, locked and compared if asked for."""
        wanted = self.wanted("freeze an image", "image", {"image": str, "build": bool})

        def freeze(bench: Workbench) -> dict[str, Any]:
            from workbench.history.freeze import texts

            with bench.store.staging() as staging:
                folder = staging / "recipe"
                done = bench.freeze(wanted["image"], str(folder), build=wanted.get("build", False))
                files = texts(folder, wanted["image"])
            kernelspecs.offer(done.name, done.image)
            image = done.image.id if done.image else None
            return asdict(done) | {"image": image, "folder": "", "recipe": files}

        self.answer(await self.work(freeze))


class ExportHandler(Handler):
    """An image as a file that other tools read."""

    @web.authenticated
    @authorized
    @told
    async def get(self) -> None:
        """The archive of ``?image=`` (a revision); ``compress=gzip`` or ``zstd``."""
        text, form = self.get_query_argument("image", ""), self.get_query_argument("compress", "none")
        if not text:
            raise InvalidInput("export an image", "none is named", "ask for ?image=NAME")
        with ExitStack() as stack:
            path = await self.work(lambda bench: stack.enter_context(bench.packed(text, form=form)))
            name = "".join(char if char.isalnum() else "-" for char in text)
            self.set_header("Content-Disposition", f'attachment; filename="{name}.oci.tar"')
            self.set_header("Content-Length", path.stat().st_size)
            self.set_header("Content-Type", "application/x-tar")
            with path.open("rb") as file:
                while data := file.read(_CHUNK):
                    self.write(data)
                    await self.flush()
        await self.finish()


@web.stream_request_body
class ImportHandler(Handler):
    """An image from a file, which is the body of the request, of any size."""

    _stack: ExitStack
    _file: IO[bytes] | None = None
    _error: WorkbenchError | None = None
    _whole = False  # all has arrived: ``post`` has it

    async def prepare(self, **kwargs: Any) -> None:
        """Who may not is told so before anything is sent."""
        await super().prepare(**kwargs)
        user = self.current_user
        allowed = user is not None and self.authorizer.is_authorized(self, user, "write", self.auth_resource)
        if not await ensure_async(allowed):
            raise web.HTTPError(HTTPStatus.FORBIDDEN)
        assert self.request.connection is not None
        self.request.connection.set_max_body_size(_MOST)  # type: ignore[attr-defined]
        self._stack = ExitStack()
        self._bench = shared.workbench(self.config)

    def data_received(self, chunk: bytes) -> None:
        """Keep it; of what goes wrong ``post`` tells."""
        if self._error is not None:
            return
        try:
            with clear_errors("receive an image's archive", self._bench.home):
                if self._file is None:
                    staging = self._stack.enter_context(self._bench.store.staging())
                    self._file = self._stack.enter_context(open(Path(staging) / "received.oci.tar", "wb"))
                self._file.write(chunk)
        except WorkbenchError as error:
            self._error = error

    @web.authenticated
    @authorized
    @told
    async def post(self) -> None:
        """Take it; ``?name=``: instead of the archive's own, ``force=1``: even if that is another image's."""
        self._whole = True
        try:
            answer = await self._load()
        finally:
            await asyncio.to_thread(self._stack.close)
        self.answer(answer, HTTPStatus.CREATED)

    async def _load(self) -> dict[str, Any]:
        name, force = self.get_query_argument("name", ""), self.get_query_argument("force", "") == "1"
        if self._error is not None:
            raise self._error
        if self._file is None:
            raise InvalidInput("import an image", "the request has no body", "send an OCI archive")
        received = self._file
        received.flush()

        def load(bench: Workbench) -> tuple[str, Image, dict[str, bytes]]:
            taken = bench.load(received.name, name, force=force, place="")
            kernelspecs.offer(taken[0], taken[1])
            return taken

        named, image, notebooks = await self.work(load)
        self.settings["workbench_tell"](events.IMAGE, name=named, image=image.id, action="imported")
        texts = {file: data.decode(errors="replace") for file, data in notebooks.items()}
        return {"name": named, "image": image.id, "notebooks": texts}

    def on_connection_close(self) -> None:
        """Nothing stays of what does not come to its end."""
        super().on_connection_close()
        if self._file is not None and not self._whole:
            self._stack.close()
