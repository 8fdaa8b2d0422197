"""An image with its history as one file for a colleague, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workbench.history import notebooks
from workbench.images import archive, export
from workbench.images.refs import Refs
from workbench.images.source import opened
from workbench.images.store import Store
from workbench.model import Image, InvalidInput, Meter, NotFound

#: A configuration file or a hidden one, dropped beside a user's work, would do something.
_NOTEBOOK = re.compile(r"\w[\w .()+-]*\.ipynb")


def save(
    store: Store, refs: Refs, image: Image, text: str, out: str, *, form: str = "none", along: Sequence[str] = (),
    meter: Meter | None = None,
) -> int:  # fmt: skip
    """Write an image into one file that other tools read, with files that go along; its bytes.

    text: how the caller named it, which is its name in the file if it is one of its names; along: notebooks; meter: may
    end it. Raises NotFound, InvalidInput, HostLacks without space.
    """
    files = _notebooks(text, along)
    size = export.save(store, image, _name(refs, image, text), out, form=export.form(form), along=files, meter=meter)
    notebooks.note_place(str(store.home), image.id, out)
    return size


def _notebooks(text: str, along: Sequence[str]) -> dict[str, Path]:
    files = {os.path.basename(path): Path(path) for path in along}
    for file, path in files.items():
        check_notebook(text, file)
        if not path.is_file():
            raise NotFound(f"export {text}", f"there is no file {path}", "correct the name")
    return files


def check_notebook(text: str, file: str) -> None:
    """Whether a file of that name may go along with the image ``text``. Raises InvalidInput."""
    if not _NOTEBOOK.fullmatch(file):
        raise InvalidInput(f"export {text}", f"{file!r} is no notebook", "only FILE.ipynb goes along with an image")


def _name(refs: Refs, image: Image, text: str) -> str:
    names = [name for name, image_id in refs.all().items() if image_id == image.id]
    return next((name for name in names if name in (text, f"{text}:latest")), names[0] if names else image.id[7:19])


@contextmanager
def packed(
    store: Store, refs: Refs, image: Image, text: str, *, form: str = "none", along: Sequence[str] = (),
    meter: Meter | None = None,
) -> Iterator[Path]:  # fmt: skip
    """The same as a file that is gone afterwards, for who hands it on at once. Raises as ``save``."""
    files = _notebooks(text, along)
    with store.staging() as staging:
        out = staging / "image.oci.tar"
        export.save(store, image, _name(refs, image, text), out, form=export.form(form), along=files, meter=meter)
        yield out


def load(
    store: Store,
    refs: Refs,
    path: str,
    name: str = "",
    *,
    force: bool = False,
    place: str | None = None,
    meter: Meter | None = None,
) -> tuple[str, Image, dict[str, bytes]]:
    """Take an image from an archive: its name here, it, and the notebooks that came along, by name.

    name: instead of the archive's own; place: where it can be had again, by default ``path``, empty for nowhere. Raises
    Conflict for a name that is another image's, unless ``force``; InvalidInput, Corrupt, HostLacks.
    """
    with opened(path, store.staging) as source, store.lease():
        found = archive.names(source)
        wanted = name or (found[0] if found else "")
        if not wanted:
            raise InvalidInput(f"import {path}", "the archive gives its image no name", "give one: import FILE NAME")
        refs.find(wanted)  # a name that cannot be one is said before the work
        files = archive.along(source, export.ALONG, _NOTEBOOK)  # whatever else lies there is left there
        image = archive.take(store, source, found[0] if len(found) > 1 else "", meter)
        refs.move(wanted, image.id, f"import: {os.path.basename(path)}", force=force)
    if place != "":
        notebooks.note_place(str(store.home), image.id, place or path)
    return wanted, image, files
