"""What can be wrong with a store, found in the order in which one thing stands on another.

Staging, blobs, layers, images, names: a repair may take away what later ones stand on, and they
are judged after it. What is damaged is taken away, since only then it can be built or pulled again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from workbench.images import config, files
from workbench.images.files import TAR
from workbench.images.refs import Refs
from workbench.linux import userns
from workbench.model import Image, LaunchFailed, Problem, WorkbenchError

if TYPE_CHECKING:
    from workbench.images.store import Store

_AGAIN = "build or pull it again"
_REPAIR = "run `jupyter workbench check --repair`"


def check(store: Store, *, repair: bool, deep: bool) -> list[Problem]:
    """The problems of a store; each is repaired when this returns if ``repair``.

    deep: hash every layer against its digest (some 500 MB/s), else only look whether it is there. Nothing
    can be added meanwhile when it repairs. Raises OSError, HostLacks.
    """
    with ExitStack() as stack:
        trash = ""
        if repair:
            trash = stack.enter_context(files.staging(str(store.home / "tmp")))
        stack.enter_context(files.locked(str(store.home / "blobs"), exclusive=repair))
        return _Check(store, trash, deep).run()


class _Check:
    def __init__(self, store: Store, trash: str, deep: bool) -> None:
        self.store, self.trash, self.deep = store, trash, deep
        self.home = str(store.home)
        self.refs = Refs(store.home)
        self.problems: list[Problem] = []
        self.images: dict[str, Image] = {}
        self.layers: set[str] = set()
        self.broken: set[str] = set()

    def run(self) -> list[Problem]:
        self.staging()
        self.blobs()
        self.trees()
        self.complete()
        self.names()
        return self.problems

    def found(self, what: str, obstacle: str, lost: str = "") -> bool:
        """Note a problem; whether to mend it. ``lost``: what a person has to do after the repair."""
        self.problems.append(Problem(what, obstacle, lost if self.trash else _REPAIR, repaired=bool(self.trash)))
        return bool(self.trash)

    def discard(self, path: str) -> None:
        """Out of the way at once, deleted when the lock is free again."""
        self.store.move(path, os.path.join(self.trash, f"{len(self.problems)}-{os.path.basename(path)}"))
        files.sync_folder(os.path.dirname(path))

    def staging(self) -> None:
        for path, fd in files.dead(os.path.join(self.home, "tmp")):
            if self.found(f"staging {os.path.basename(path)}", "its process died before it was done"):
                files.release(path, fd)
            else:
                os.close(fd)

    def blobs(self) -> None:
        folder = os.path.join(self.home, "blobs", "sha256")
        for name in sorted(os.listdir(folder)):
            path, digest = os.path.join(folder, name), f"sha256:{name}"
            if not config.DIGEST.fullmatch(digest):
                if self.found(f"blob {name}", "its name is no digest"):
                    self.discard(path)
                continue
            try:
                with open(path, "rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == name
                    file.seek(0)
                    data = file.read(config.MAX_SIZE)
            except OSError:
                whole = False
            if whole:
                with suppress(WorkbenchError):  # a blob of another kind
                    self.images[digest] = config.decode(data)
                continue
            self.broken.add(digest)
            if self.found(f"blob {digest[:19]}", "its bytes are not what its digest says", _AGAIN):
                self.discard(path)

    def trees(self) -> None:
        folder = os.path.join(self.home, "layers")
        wrong_files = self.hashed(folder) if self.deep else {}
        for name in sorted(os.listdir(folder)):
            path, digest = os.path.join(folder, name), f"sha256:{name}"
            stem = name.partition(".")[0]
            if config.DIGEST.fullmatch(f"sha256:{stem}") and stem != name:
                if name == stem + TAR:
                    self.kept_tar(path, f"sha256:{stem}")
                continue  # beside a tree that is there, or about to be; gc takes those of none
            if not config.DIGEST.fullmatch(digest) or not os.path.isdir(path) or os.path.islink(path):
                if self.found(f"layer {name[:12]}", "is no layer's folder"):
                    self.discard(path)
                continue
            wrong = wrong_files.get(digest, "")
            if not wrong:
                self.layers.add(digest)
            elif self.found(f"layer {digest[:19]}", wrong, _AGAIN):
                if os.path.isfile(path + TAR):  # it can be laid out again
                    self.discard(path)
                else:
                    self.store.drop_layer(digest, self.trash)
                files.sync_folder(folder)

    def kept_tar(self, path: str, digest: str) -> None:
        """A layer that a snapshot left as its tar."""
        if not self.deep or files.digest(path) == digest:
            self.layers.add(digest)
        elif self.found(f"layer {digest[:19]}", "its tar is not what its digest says", "take the snapshot again"):
            self.discard(path)

    def hashed(self, folder: str) -> dict[str, str]:
        """What is wrong with each layer's files, or nothing; all in one process, for a user has to start one."""
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        digests = [digest for name in names if config.DIGEST.fullmatch(digest := f"sha256:{name}")]
        layers = [(os.path.join(folder, digest[7:]), self.store.record(digest), digest) for digest in digests]
        try:
            return dict(zip(digests, userns.call("workbench.images.layer:wrong", layers), strict=True))
        except LaunchFailed:  # that process was killed: which layer is it that does so?
            return {layer[2]: self.tree(layer) for layer in layers}

    @staticmethod
    def tree(layer: tuple[str, str | None, str]) -> str:
        """What is wrong with a layer's files, or nothing."""
        try:
            return str(userns.call("workbench.images.layer:wrong", [layer])[0])
        except LaunchFailed as error:
            return error.obstacle

    def complete(self) -> None:
        for image_id, image in self.images.items():
            missing = [diff_id for diff_id in image.diff_ids if diff_id not in self.layers]
            if missing:
                lacks = f"lacks layer {missing[0][:19]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
                self.broken.add(image_id)
                if self.found(f"image {image_id[:19]}", lacks, _AGAIN):
                    self.discard(os.path.join(self.home, "blobs", "sha256", image_id[7:]))

    def names(self) -> None:
        for path, wrong in self.refs.broken():
            if self.found(f"name {os.path.relpath(path, os.path.join(self.home, 'refs'))}", wrong):
                self.discard(path)
        for name, image_id in self.refs.all().items():
            if self.gone(image_id) and self.found(f"name {name}", f"its image {image_id[:19]} is not here", _AGAIN):
                self.refs.delete(name)

    def gone(self, image_id: str) -> bool:
        """Whether an image is not usable; one that came while we looked is."""
        blob = os.path.join(self.home, "blobs", "sha256", image_id[7:])
        return image_id in self.broken or (image_id not in self.images and not os.path.exists(blob))
