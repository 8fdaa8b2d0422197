"""What the launcher hands out becomes files of this container, by this process with its rights: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Iterator

from .api import Refused, Request, ask

_CHUNK = 1 << 20
_ALONG = 16 << 20  # bytes of notebooks


def export(request: Request) -> Any:
    """Ask for an archive, and write it; the answer with ``file`` and ``size``. Raises Refused."""
    wanted, notebooks = str(request.pop("output", "")), request.pop("along", [])
    if wanted:
        _fits(wanted)
    named = {os.path.basename(path): _notebook(path) for path in notebooks}
    if len(named) < len(notebooks) or sum(map(len, named.values())) > _ALONG:
        raise Refused("notebooks that go along have different names, and 16 MiB together")
    if named:
        request["along"] = {name: len(data) for name, data in named.items()}
    received = _Received(wanted)
    try:
        answer = ask(request, body=b"".join(named.values()), heard=received.take)
        with _told("write " + received.path):
            received.publish(answer["sha256"])
    finally:
        received.drop()
    return dict(answer, file=received.path, size=received.size)


class _Received:
    """A file that arrives beside its name, and gets it when it is whole."""

    def __init__(self, path: str) -> None:
        self.path, self.size, self._digest, self._begun = path, 0, "", False

    def take(self, about: dict[str, Any], stream: BinaryIO) -> None:
        """What follows on the stream."""
        self.path = self.path or _plain(about["name"]) + ".oci.tar"
        self.size, whole = int(about["size"]), hashlib.sha256()
        with _told("write " + self.path), open(self._part, "wb") as file:
            self._begun, left = True, self.size
            while left:
                data = stream.read(min(left, _CHUNK))
                if not data:
                    raise Refused("the launcher of this kernel has gone away; nothing was written")
                whole.update(data)
                file.write(data)
                left -= len(data)
            file.flush()
            os.fsync(file.fileno())
        self._digest = "sha256:" + whole.hexdigest()

    @property
    def _part(self) -> str:
        return self.path + ".part"

    def publish(self, digest: str) -> None:
        """Give it its name. Raises Refused, OSError."""
        if digest != self._digest:
            raise Refused(f"write {self.path}: it did not arrive as it was sent; try again")
        os.replace(self._part, self.path)
        _sync(os.path.dirname(self.path) or ".")

    def drop(self) -> None:
        """Nothing stays of one that is not whole; what another one has called so does where none was begun."""
        if self._begun:
            with suppress(OSError):
                os.unlink(self._part)


def freeze(request: Request) -> Any:
    """Ask for a recipe, and write it into a new folder; the answer with ``folder``. Raises Refused."""
    wanted = [str(request.pop("output", ""))]
    if wanted[0]:
        _free(wanted[0])

    def heard(about: dict[str, Any], _stream: BinaryIO) -> None:
        wanted[0] = wanted[0] or _plain(about["name"])
        _free(wanted[0])  # before the work, not after it

    answer = ask(request, heard=heard)
    folder = os.path.abspath(wanted[0])
    beside = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.{os.getpid()}")
    with _told("write " + wanted[0]):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        try:
            os.mkdir(beside)
            for name, text in answer["recipe"].items():
                with open(os.path.join(beside, os.path.basename(name)), "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(beside, folder)  # over an empty one, too
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        _sync(os.path.dirname(folder))
    return dict(answer, folder=wanted[0])


def _plain(name: str) -> str:
    """A name of an image as one of a file."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name).lstrip(".") or "image"


def _free(folder: str) -> None:
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise Refused(f"{folder} is there, and not empty; name another folder with -o")


def _fits(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise Refused(f"no file {path} can be written; name another one with -o")


def _notebook(path: str) -> bytes:
    with _told("read " + path), open(path, "rb") as file:
        return file.read(_ALONG + 1)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _told(tried: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"{tried}: {error.strerror or error}") from None
