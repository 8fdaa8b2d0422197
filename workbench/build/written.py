"""What a freeze asks of builds: a recipe's text from plain values, which recipe an image is of, a build with a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from workbench.build import keys, lock, recipe
from workbench.build.fetch import Unreachable, Web
from workbench.images.store import Store
from workbench.model import SUITE_LABEL, Image, Settings, WorkbenchError

#: The tables after the plain values, as people write them.
_ORDER = ("name", "description", "preload", "network", "base", "apt", "python", "files", "run", "env", "kernel")
_WIDTH = 100  # columns up to which a list stands on one line


def text(values: Mapping[str, Any], remarks: Iterable[str] = ()) -> str:
    """A ``recipe.toml`` of these values, checked; remarks: lines of comment at its head. Raises InvalidInput."""
    recipe.parse(dict(values))
    return "\n".join(_lines(values, remarks)) + "\n"


def _lines(values: Mapping[str, Any], remarks: Iterable[str]) -> Iterator[str]:
    for remark in remarks:
        yield f"# {''.join(c if c.isprintable() else '?' for c in remark)}".rstrip()
    keys = sorted(values, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
    for key in keys:
        if not _is_table(values[key]):
            yield from _pair(key, values[key])
    for key in keys:
        for table in values[key] if _is_tables(values[key]) else [values[key]] if _is_table(values[key]) else ():
            yield ""
            yield f"[[{key}]]" if _is_tables(values[key]) else f"[{key}]"
            for name, value in table.items():
                yield from _pair(name, value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_tables(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _pair(key: str, value: Any) -> Iterator[str]:
    line = f"{lock.toml_key(key)} = {lock.toml_value(value)}"
    if isinstance(value, list | tuple) and len(line) > _WIDTH:
        yield f"{lock.toml_key(key)} = ["
        yield from (f"  {lock.toml_value(each)}," for each in value)
        yield "]"
    elif isinstance(value, str) and "\n" in value and "'''" not in value and value.replace("\n", "").isprintable():
        yield f"{lock.toml_key(key)} = '''"
        yield from value.removesuffix("\n").split("\n")
        yield "'''"
    else:
        yield line


def shipped_as(store: Store, image: Image) -> str:
    """The name of the shipped recipe whose lock names just the layers of an image; empty for none."""
    for name, folder in recipe.shipped().items():
        locked = lock.load(folder)
        if locked is None or not locked.steps:
            continue
        layers: list[str] = []
        for step in locked.steps:
            if step.image:
                try:
                    layers += store.image(step.image).diff_ids
                except WorkbenchError:
                    break
            else:
                layers.append(step.diff_id)
        else:
            if layers == list(image.diff_ids):
                return name
    return ""


class Tools:
    """See ``history.freeze.Tools``. lock: builds the recipe of a folder and locks it; addresses: whether to try any."""

    def __init__(
        self, store: Store, settings: Callable[[str], Settings], lock: Callable[[str], Image], *, addresses: bool = True
    ) -> None:
        self._store, self._settings, self._lock, self._addresses = store, settings, lock, addresses

    def text(self, values: Mapping[str, Any], remarks: Iterable[str]) -> str:
        """See ``text``."""
        return text(values, remarks)

    def shipped_as(self, image: Image) -> str:
        """See ``shipped_as``."""
        return shipped_as(self._store, image)

    def suite(self, image: Image) -> str:
        """The Debian suite of an image; empty for none that is known."""
        suite = dict(image.labels).get(SUITE_LABEL, "")
        return suite if suite in recipe.SUITES else ""

    def reaches(self, address: str) -> bool:
        """Whether something answers at an address."""
        if not self._addresses:
            return False
        try:
            Web(self._settings("")).open(address).close()
        except Unreachable:
            return False
        return True

    def keys(self, folder: str) -> list[str]:
        """Files with private keys, as ``keys.find``."""
        return keys.find(folder)

    def lock(self, folder: str) -> Image:
        """Choose, build, and write the lock beside the recipe; the image."""
        return self._lock(folder)
