"""The image store: blobs, layer trees, leases, gc. One folder, any number of processes, no daemon.

Write order: staging, fsync, digest and size checked, rename, fsync of the folder; the ref last. Only then is
something acknowledged, and a reader never sees half of it. Locks (flock(2)): adders share that of ``blobs``,
gc and repair hold it alone; each entry of ``tmp`` is locked by its owner and swept when nobody holds it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench.images import config, files, layer
from workbench.images.files import TAR
from workbench.images.refs import Refs
from workbench.linux import syscalls as sc
from workbench.linux import userns
from workbench.model import (
    Conflict,
    Corrupt,
    HostLacks,
    Image,
    InvalidInput,
    NotFound,
    Problem,
    WorkbenchError,
)

_AGAIN = "build or pull it again"
_FOLDERS = ("blobs", "blobs/sha256", "layers", "refs", "containers", "cache", "tmp")
_LEASE = ".lease"
#: Bytes of a layer that takes a moment to remake.
_LONG = 16 << 20


class Lease:
    """Digests that gc keeps while this is held; it dies with its process."""

    def __init__(self, fd: int, lock: str) -> None:
        self._fd, self._lock = fd, lock

    def add(self, digest: str) -> None:
        """Keep a layer, or an image with its layers. Look whether it is there only after this."""
        with files.locked(self._lock, exclusive=False):
            self.note(digest)

    def note(self, digest: str) -> None:
        """``add`` for one who holds the store's lock."""
        os.write(self._fd, f"{digest}\n".encode())


class Store:
    """Images and layers below ``home``. Call ``open`` once before anything else."""

    def __init__(self, home: Path | str) -> None:
        self.home = Path(os.path.abspath(home))
        self._blobs, self._layers, self._tmp = (str(self.home / name) for name in ("blobs", "layers", "tmp"))
        self._leases: list[Lease] = []
        self._guard = threading.Lock()

    # -- the folder ----------------------------------------------------------------------------------------

    def open(self) -> Store:
        """Make the folders (0700) where they are missing, and sweep what dead processes left in staging.

        Raises Conflict when the home is somebody else's, HostLacks when it cannot be made or written.
        """
        tried = "open the image store"
        with files.clear_errors(tried, str(self.home)):
            try:
                self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = self.home.stat()
                if found.st_uid != os.geteuid():
                    raise Conflict(
                        tried,
                        f"{self.home} belongs to user {found.st_uid}",
                        "set WORKBENCH_HOME to a folder of yours",
                    )
                if found.st_mode & 0o7777 != 0o700:
                    self.home.chmod(0o700)
                for name in _FOLDERS:
                    (self.home / name).mkdir(mode=0o700, exist_ok=True)
            except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
                raise HostLacks(
                    tried, f"{self.home}: {error.strerror}", "set WORKBENCH_HOME to a folder of yours"
                ) from None
        for path, fd in files.dead(self._tmp):
            with suppress(OSError, WorkbenchError):  # `check` tells of what resists
                files.release(path, fd)
        return self

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's file system, gone at the end and swept if its process dies."""
        with files.staging(self._tmp) as path:
            yield Path(path)

    # -- layers --------------------------------------------------------------------------------------------

    def has_layer(self, diff_id: str) -> bool:
        """Whether a layer is here, as a tree or as a tar."""
        path = self._layer(diff_id)
        return os.path.isdir(path) or os.path.isfile(path + TAR)

    def trees(self, diff_ids: Sequence[str]) -> list[str]:
        """The trees of an image's layers, which are named lowest first: the highest first, as overlayfs has them.

        Raises as ``layer`` does.
        """
        found = [self._layer(diff_id) for diff_id in reversed(diff_ids)]
        return [path if os.path.isdir(path) else str(self.layer(diff_id))
                for path, diff_id in zip(found, reversed(diff_ids), strict=True)]  # fmt: skip

    def layer(self, diff_id: str) -> Path:
        """The tree of a layer, in overlayfs's form, never to be written; laid out now if there is only its tar.

        Raises NotFound, HostLacks without space, Corrupt when the tar is damaged.
        """
        path = self._layer(diff_id)
        if not os.path.isdir(path):
            if not os.path.isfile(path + TAR):
                raise NotFound("find a layer", f"{diff_id[:19]} is not in the store", _AGAIN)
            self.add_tar(path + TAR, diff_id)
        return Path(path)

    def tar(self, diff_id: str) -> str | None:
        """The tar of a layer, where it is kept as that; never to be written."""
        path = self._layer(diff_id) + TAR
        return path if os.path.isfile(path) else None

    def adopt_tar(self, path: Path | str, diff_id: str, size: int) -> None:
        """Take a tar out of staging into the store, as the layer that it is; durable when this returns.

        path: a whole and durable file, whose sha256 is ``diff_id``; size: its bytes.
        """
        target = self._layer(diff_id)
        with (
            files.clear_errors("add a layer", str(self.home)),
            files.locked(self._blobs, exclusive=False),
            files.staging(self._tmp) as staging,
        ):
            self._note(diff_id)
            if not self.has_layer(diff_id):
                meta = os.path.join(staging, "meta")
                files.write_file(meta, json.dumps({"size": size}).encode())
                os.rename(meta, target + ".json")
                files.sync_folder(self._layers)
                os.rename(path, target + TAR)
                files.sync_folder(self._layers)

    def add_tree(self, tree: Path | str) -> str:
        """Take a tree out of staging into the store; its diff_id. The same layer twice is one.

        Raises InvalidInput for what no layer may hold, HostLacks without space.
        """
        path = os.path.abspath(tree)
        with files.clear_errors("add a layer", str(self.home)):
            found = userns.call("workbench.images.layer:pack", path)
            self._keep(path, found, None)
        return str(found["diff_id"])

    def add_tar(
        self, source: Path | str | int, expected: str | None = None, size: int | None = None,
        meanwhile: Callable[[], None] | None = None, memory: int | None = None,
    ) -> str:  # fmt: skip
        """Lay out an uncompressed OCI tar as a layer; its diff_id.

        source: a path, or a descriptor of which it is the next ``size`` bytes; meanwhile: as of ``write_tar``; memory:
        bytes that it may take where it takes long, as of ``userns.call``. Raises Corrupt when that is not ``expected``,
        InvalidInput for a hostile or broken archive, HostLacks without space, MemoryError. In none of these cases
        anything stays.
        """
        with files.clear_errors("add a layer", str(self.home)), self.staging() as staging:
            tree, record = str(staging / "tree"), str(staging / "record")
            given, fds = (source, (source,)) if isinstance(source, int) else (os.path.abspath(source), ())
            length = os.stat(given).st_size if size is None else size
            found = userns.call(
                "workbench.images.layer:lay_out", given, tree, record, size, fds=fds,
                apart=meanwhile is not None and length > _LONG, meanwhile=meanwhile, memory=memory,
            )  # fmt: skip
            if expected is not None and found["diff_id"] != expected:
                raise Corrupt("add a layer", f"the archive is {found['diff_id'][:19]}, not {expected[:19]}", _AGAIN)
            self._keep(tree, found, record if os.path.exists(record) else None)
        return str(found["diff_id"])

    def write_tar(
        self, diff_id: str, out_path: Path | str, meanwhile: Callable[[], None] | None = None
    ) -> None:  # fmt: skip
        """Remake a layer's tar, byte for byte, durably. Raises NotFound, Corrupt for a changed tree.

        meanwhile: called some ten times a second at least, where that takes long; what it raises ends it.
        """
        path = os.path.abspath(out_path)
        with files.clear_errors("write a layer's archive", path), open(path, "wb") as file:
            try:
                self.append_tar(diff_id, file.fileno(), meanwhile)
                os.fsync(file.fileno())
            except BaseException:
                if os.path.isfile(path):
                    os.unlink(path)
                raise

    def append_tar(self, diff_id: str, fd: int, meanwhile: Callable[[], None] | None = None) -> None:
        """``write_tar`` to where a descriptor of a file stands, which the caller makes durable."""
        if (kept := self.tar(diff_id)) and files.copy_checked(kept, fd, diff_id, meanwhile):
            return
        tree = str(self.layer(diff_id))
        apart = meanwhile is not None and self.layer_size(diff_id) > _LONG  # where it can be ended
        found = userns.call(
            "workbench.images.layer:remake", tree, self.record(diff_id), fd, fds=(fd,), apart=apart, meanwhile=meanwhile
        )
        if found["diff_id"] != diff_id:
            raise Corrupt("remake a layer's archive", f"{tree} has changed", "run `jupyter workbench check --repair`")

    def record(self, diff_id: str) -> str | None:
        """The record of an archive that ``pack`` alone cannot remake."""
        path = self._layer(diff_id) + ".record"
        return path if os.path.exists(path) else None

    def _layer(self, diff_id: str) -> str:
        if not config.DIGEST.fullmatch(diff_id):
            raise InvalidInput("find a layer", f"{diff_id!r} is no layer digest", "give sha256:<64 hex>")
        return os.path.join(self._layers, diff_id[7:])

    def _keep(self, tree: str, found: dict[str, Any], record: str | None) -> None:
        """Make a staged tree durable and give it its name, after what stands beside it."""
        target = self._layer(found["diff_id"])
        if not os.path.isdir(target):
            self._sync()
        # What was there before the lock may be on its way out with gc: look again.
        with files.locked(self._blobs, exclusive=False), files.staging(self._tmp) as staging:
            self._note(found["diff_id"])
            if not os.path.isdir(target):
                self._sync()
                meta = os.path.join(staging, "meta")
                files.write_file(meta, json.dumps({"size": found["size"]}).encode())
                beside = {".json": meta, ".owners": layer.owners_file(tree), ".record": record}
                for suffix, source in beside.items():
                    if source is not None and os.path.exists(source):
                        os.rename(source, target + suffix)
                files.sync_folder(self._layers)
                try:
                    self.move(tree, target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                files.sync_folder(self._layers)
        files.discard(tree)
        files.discard(layer.owners_file(tree))

    def _sync(self) -> None:
        """syncfs(2): one pass for the thousands of files of a tree."""
        fd = os.open(self._tmp, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sc.syncfs(fd)
        finally:
            os.close(fd)

    @staticmethod
    def move(source: str, target: str) -> None:
        """rename(2) of a tree whose root may belong to an id that is not the user's outside."""
        try:
            os.rename(source, target)
        except PermissionError:
            userns.call("workbench.images.layer:move", source, target)

    # -- images --------------------------------------------------------------------------------------------

    def add_image(self, data: bytes) -> Image:
        """Keep an image's config, durable when this returns. Raises NotFound when it lacks a layer."""
        image = config.decode(data)
        if len(data) > config.MAX_SIZE:
            raise InvalidInput("add an image", f"its config takes {len(data)} bytes", "shorten its labels")
        path = self._blob(image.id)
        with (
            files.clear_errors("add an image", str(self.home)),
            files.locked(self._blobs, exclusive=False),
            files.staging(self._tmp) as staging,
        ):
            self._note(image.id)
            for diff_id in image.diff_ids:
                if not self.has_layer(diff_id):
                    raise NotFound("find a layer", f"{diff_id[:19]} is not in the store", _AGAIN)
            if _read(path) != data:
                fresh = os.path.join(staging, "config")
                files.write_file(fresh, data)
                files.publish(fresh, path)
        return image

    def image(self, image_id: str) -> Image:
        """The image of a full ID. Raises NotFound, Corrupt."""
        data = _read(self._blob(image_id))
        if data is None:
            raise NotFound("find an image", f"there is none {image_id[:19]} here", _AGAIN)
        if config.digest_of(data) != image_id:
            raise Corrupt(
                f"read image {image_id[:19]}",
                "its config is damaged",
                "run `jupyter workbench check --repair`",
            )
        return config.decode(data)

    def config(self, image_id: str) -> bytes:
        """The bytes of an image's config. Raises NotFound, Corrupt."""
        self.image(image_id)
        return _read(self._blob(image_id)) or b""

    def history(self, image_id: str) -> list[dict[str, Any]]:
        """The history entries of an image's config (OCI image spec, config.md). Raises NotFound, Corrupt."""
        self.image(image_id)
        found = json.loads(_read(self._blob(image_id)) or b"{}").get("history")
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def images(self) -> list[Image]:
        """Every image, named or not, newest first by the date that its config gives."""
        found = []
        for digest in self.blobs():
            with suppress(WorkbenchError):
                found.append(self.image(digest))
        return sorted(found, key=lambda image: (image.created, image.id), reverse=True)

    def size(self, image: Image) -> int:
        """Bytes of an image's layers, as tars."""
        return sum(self.layer_size(diff_id) for diff_id in set(image.diff_ids))

    def layer_size(self, diff_id: str) -> int:
        """Bytes of a layer as a tar; 0 where nothing says it."""
        try:
            return int(json.loads(_read(self._layer(diff_id) + ".json") or b"{}").get("size", 0))
        except ValueError:
            return 0

    def blobs(self) -> list[str]:
        """The digests that blobs are filed under, whatever is in them."""
        names = sorted(os.listdir(os.path.join(self._blobs, "sha256")))
        return [f"sha256:{name}" for name in names if config.DIGEST.fullmatch(f"sha256:{name}")]

    def layers(self) -> list[str]:
        """The diff_ids of the layers that are here."""
        with os.scandir(self._layers) as entries:
            names = {
                entry.name.removesuffix(TAR) for entry in entries
                if entry.is_dir(follow_symlinks=False) or entry.name.endswith(TAR)
            }  # fmt: skip
        return [f"sha256:{name}" for name in sorted(names) if config.DIGEST.fullmatch(f"sha256:{name}")]

    def _blob(self, digest: str) -> str:
        if not config.DIGEST.fullmatch(digest):
            raise InvalidInput("find an image", f"{digest!r} is no image ID", "give sha256:<64 hex>")
        return os.path.join(self._blobs, "sha256", digest[7:])

    # -- leases and gc -------------------------------------------------------------------------------------

    @contextmanager
    def lease(self, *digests: str) -> Iterator[Lease]:
        """Keep images and layers from gc: those given, and whatever this Store adds meanwhile.

        Take it, then look whether they are there: gc may have been quicker.
        """
        with files.locked(self._blobs, exclusive=False):
            path, fd = files.claim(self._tmp, f"{os.urandom(8).hex()}{_LEASE}", folder=False)
            held = Lease(fd, self._blobs)
            for digest in digests:
                held.note(digest)
            with self._guard:
                self._leases.append(held)
        try:
            yield held
        finally:
            with self._guard:
                self._leases.remove(held)
            files.let_go(path, fd)

    def _note(self, digest: str) -> None:
        with self._guard:
            for held in self._leases:
                held.note(digest)

    def leased(self) -> set[str]:
        """The digests under the leases of all living processes."""
        found: set[str] = set()
        for name in os.listdir(self._tmp):
            if name.endswith(_LEASE):
                path = os.path.join(self._tmp, name)
                if files.is_held(path):
                    found.update((_read(path) or b"").decode().split())
        return found

    def gc(self, in_use: Iterable[str] = ()) -> dict[str, int]:
        """Drop images that neither a name, a container nor a lease needs, then layers that no image needs.

        in_use: image IDs of containers; read while nobody can add anything, so an iterator that looks them
        up is never too early (it must not call this store). Returns numbers of ``layers`` and ``blobs``,
        and ``bytes``.
        """
        done = {"layers": 0, "blobs": 0, "bytes": 0}
        with ExitStack() as stack:
            trash = stack.enter_context(files.staging(self._tmp))  # emptied when the lock is free again
            stack.enter_context(files.locked(self._blobs, exclusive=True))
            # Leases first: who creates a container holds one until its state is written for in_use to find.
            wanted = self.leased()
            wanted.update(in_use)
            refs = Refs(self.home)
            wanted.update(refs.all().values(), refs.logged())
            wanted.update(self._ancestors(wanted))
            needed = wanted | {diff_id for image in self.images() if image.id in wanted for diff_id in image.diff_ids}
            for digest in self.blobs():
                if digest not in wanted:
                    path = self._blob(digest)
                    done["blobs"] += 1
                    done["bytes"] += os.path.getsize(path)
                    os.unlink(path)
            files.sync_folder(os.path.join(self._blobs, "sha256"))
            for diff_id in self.layers():
                if diff_id not in needed:
                    done["layers"] += 1
                    done["bytes"] += self.layer_size(diff_id)
                    self.drop_layer(diff_id, trash)
            for name in os.listdir(self._layers):
                stem, dot, _ = name.partition(".")
                kept = os.path.join(self._layers, stem)
                if dot and not os.path.isdir(kept) and not os.path.isfile(kept + TAR):
                    os.unlink(os.path.join(self._layers, name))
        return done

    def _ancestors(self, image_ids: Iterable[str]) -> set[str]:
        """The images that snapshots stand on, as far back as they are here."""
        found: set[str] = set()
        pending = list(image_ids)
        while pending:
            with suppress(WorkbenchError):
                parent = self.image(pending.pop()).parent
                if parent and parent not in found:
                    found.add(parent)
                    pending.append(parent)
        return found

    def drop_layer(self, diff_id: str, trash: str) -> None:
        """Move a layer and what stands beside it into a staging folder, whose end deletes them."""
        path = self._layer(diff_id)
        with suppress(FileNotFoundError):  # there may be its tar only
            self.move(path, os.path.join(trash, diff_id[7:]))
        for suffix in (TAR, ".json", ".owners", ".record"):
            with suppress(FileNotFoundError):
                os.unlink(path + suffix)

    # -- check ---------------------------------------------------------------------------------------------

    def check(self, repair: bool = False, deep: bool = True) -> list[Problem]:
        """What is not as it should be; ``repair`` mends it, ``deep`` hashes every layer. See ``check.py``."""
        from workbench.images.check import check

        return check(self, repair=repair, deep=deep)


def _read(path: str, size: int = config.MAX_SIZE + 1) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except (FileNotFoundError, IsADirectoryError):
        return None
