"""Which environment a notebook's kernel takes up, and which it is in: between a notebook's record and a container."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.containers.state import HEAD
from workbench.history import notebooks
from workbench.jupyter import kernelspecs
from workbench.model import Limits, NotFound, WorkbenchError

if TYPE_CHECKING:
    from workbench.containers.container import Container
    from workbench.workbench import Workbench


@dataclass(frozen=True)
class Asked:
    """What whoever starts a kernel wants of this one (REST): no more than all others allow."""

    limits: Limits = field(default_factory=Limits)
    network: str = ""
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a kernel goes on with. image: "" for the kernelspec's; container: a stopped one; notice: for its user."""

    image: str = ""
    container: Container | None = None
    notice: str = ""


def take_up(bench: Workbench, path: str, kernel: str, name: str, resume: bool) -> Taken:
    """The image that a notebook names, and the container that it had.

    path: of the notebook, "" where there is none. kernel, name: the kernelspec that was chosen, and its image: another
    kernel than the notebook's own is that kernel, and where the image is not here that is said. resume: whether a
    stopped container goes on. Raises NotFound when the image that the notebook names is not here, for its own kernel.
    """
    if not path.endswith(".ipynb"):
        return Taken()
    image = notice = ""
    record = notebooks.recorded(path)
    if record is not None and record.kernel == kernel:
        try:
            image = bench.image(record.image).id
        except NotFound:
            raise record.missing(path) from None
        if bench.refs.find(name) not in (None, image):
            notice = f"in {image[7:19]}, as the notebook says; {name} has moved since"
    elif record is not None:  # whoever has not got the image is offered no kernel of it, and takes another
        try:
            bench.image(record.image)
        except NotFound:
            notice = f"this notebook was last run in another environment: {record.absence}"
    for container in bench.stopped_for(path) if resume else ():
        head = container.head["image"]
        if head == image or (not image and container.labels["image"] == name):
            notice = (
                f"this notebook goes on with what it changed before, over {head[7:19]}; `%container status` says what "
                "no snapshot has, `%container reset --hard` starts anew"
            )
            return Taken(container.image_id, container, notice)
    return Taken(image, None, notice)


def record(bench: Workbench, container: Container, name: str) -> notebooks.Record | None:
    """What a notebook is to say of a container; None while it stands on no snapshot. name: the kernelspec's image."""
    head = container.head
    with suppress(WorkbenchError):
        image = bench.image(head["image"])
        if image.parent:
            ref = str(head["ref"]) or (name if bench.refs.find(name) == image.id else "")
            kernel = kernelspecs.kernel_name(ref) if ref else ""
            return notebooks.Record(image.id, ref, image.parent, notebooks.places(bench.home, image.id), kernel)
    return None


class Now:
    """The image of a running container's last snapshot, which is asked for with each cell."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._file = os.path.join(os.path.dirname(container.upper), HEAD)
        self._known = (-1, "")

    @property
    def image(self) -> str:
        """Its ID; read again only when somebody has written it."""
        try:
            written = os.stat(self._file).st_mtime_ns
        except OSError:
            written = 0
        if self._known[0] != written:
            self._known = written, str(self._container.head["image"])
        return self._known[1]
