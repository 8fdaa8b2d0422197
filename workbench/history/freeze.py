"""A snapshot turned back into a recipe: what can be said in one is, and what cannot is told by name.

The recipe stands on what the snapshot was built from, and adds what the snapshot has over that: packages with their
exact versions. The image that it gives is held against the snapshot, file by file.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from workbench.history import diff, inventory, log
from workbench.history.inventory import Package
from workbench.history.owners import Owners, by_itself, files, is_alternative, is_note
from workbench.images.store import Store
from workbench.images.tree import kept_xattrs
from workbench.images.view import Shown, View
from workbench.linux import userns
from workbench.model import BuildFailed, Conflict, Image

#: Where a recipe's Python packages go.
VENV = "/opt/venv"
#: So many files go along with a recipe at the most.
MOST_FILES = 2000
#: Bytes of a recipe that is handed on as texts.
MOST_TEXT = 8 << 20
_USERS = re.compile(r"etc/(?:passwd|group|shadow|gshadow|subuid|subgid)")
#: Of a Debian package what a recipe can name (Debian policy 5.6.12).
_VERSION = re.compile(r"[A-Za-z0-9.+:~-]+")
#: Of a Python package: its METADATA may say anything, and what is no plain name could be read as an address (PEP 508).
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_RELEASE = re.compile(r"[A-Za-z0-9.+!_-]+")
_IPYKERNEL = re.compile(r"ipykernel\b")


class Tools(Protocol):
    """What the room of builds does for a freeze."""

    def text(self, values: dict[str, Any], remarks: Iterable[str]) -> str:
        """The text of a ``recipe.toml``."""

    def shipped_as(self, image: Image) -> str:
        """The name of the recipe that an image is of, where it is one that everybody has; else empty."""

    def suite(self, image: Image) -> str:
        """The Debian suite of an image; empty for none that is known."""

    def reaches(self, address: str) -> bool:
        """Whether a file can be fetched from an address."""

    def keys(self, folder: str) -> list[str]:
        """Paths of files with private keys, which no recipe may ship."""

    def lock(self, folder: str) -> Image:
        """Choose, build, and write the lock beside the recipe."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Something of a snapshot that the recipe does not say.

    kind: ``editable``, ``url``, ``vcs``, ``folder`` (Python packages by where they came from), ``gone`` (of a version
    that the index has no more), ``environment`` (of another place than the recipe's), ``deb``, ``r``, ``conda``,
    ``unowned``, ``changed``, ``removed``, ``users``.
    name: a package with its version, or a path; why: what stands in the way; size: bytes of a file.
    """

    kind: str
    name: str
    why: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    """What became of a snapshot.

    base: what the recipe stands on; debian, python: the packages that it names; taken: how many files go along;
    image: what it gives, None where nothing was built. packages, files: how many are equal in it, of how many in the
    snapshot; of files their bytes, modes and owners count, and not bytecode, caches and installers' notes. more: files
    that only the image has; different: paths that are not equal, the first thousand.
    """

    folder: str
    name: str
    base: str
    debian: tuple[str, ...]
    python: tuple[str, ...]
    taken: int
    lost: tuple[Lost, ...]
    image: Image | None = None
    packages: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)
    more: int = 0
    different: tuple[str, ...] = field(default=())


def freeze(
    store: Store, image: Image, text: str, out: str = "", *, tools: Tools, build: bool = True, with_files: bool = False,
    most: int = 64 << 20,
) -> Frozen:  # fmt: skip
    """Write the recipe of a snapshot into a new or empty folder ``out``, which is there whole or not at all.

    text: how the caller named it, after which ``out`` is called by default; build: also build and lock it, and compare;
    with_files: take files along that no package owns or that were changed, ``most`` bytes of them. Raises
    Conflict for a folder that holds something, and as ``build`` does.
    """
    out = out or frozen_name(text, image.id).rpartition("/")[2]
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise Conflict(f"freeze {text}", f"{out} is there, and not empty", "name another folder with -o")
    with store.staging() as staging, store.lease(image.id):
        folder = staging / "recipe"
        folder.mkdir()
        done = _Freeze(store, image, text, folder, tools).all(build, with_files, most)
        _publish(folder, out)
    return replace(done, folder=out)


def _publish(folder: Path, out: str) -> None:
    """A folder that was made aside, under its own name: whole or not at all."""
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    beside = os.path.join(parent, f".{os.path.basename(os.path.abspath(out))}.{os.getpid()}")
    try:
        shutil.copytree(folder, beside, symlinks=True)
        os.rename(beside, out)  # over an empty one, too (rename(2))
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@dataclass(frozen=True, slots=True)
class _Row:
    """A file that is not as it was when the image was built. kind: as of ``Lost``, or ``package`` for a new package's.

    link: where a symbolic one leads; why: what keeps it from going along; owner: as of ``Owners``, or empty.
    """

    kind: str
    path: str
    size: int
    link: str
    why: str
    owner: tuple[str, ...]

    @property
    def lost(self) -> Lost:
        return Lost(self.kind, "/" + self.path, self.why, self.size)


class _Freeze:
    """One run. values: the recipe, as its file says it."""

    def __init__(self, store: Store, image: Image, text: str, folder: Path, tools: Tools) -> None:
        self.store, self.image, self.text, self.folder, self.tools = store, image, text, folder, tools
        self.built = list(log.chain(store, image))[-1]
        self.packages: list[Lost] = []
        self.rows: list[_Row] = []
        self.debian: list[str] = []
        self.python: list[str] = []
        #: What the recipe asks for by a name and a version, and the files that come with it.
        self.wishes: dict[str, Package] = {}
        self.brought: dict[tuple[str, ...], list[_Row]] = {}
        self.scripts: list[str] = []
        self.files: dict[str, str] = {}
        self.taken = 0
        shipped = tools.shipped_as(self.built)
        self.base = {"recipe": shipped} if shipped else {"image": self.built.id}
        self.suite = tools.suite(self.built)
        self.name = frozen_name(text, image.id)

    def all(self, build: bool, with_files: bool, most: int) -> Frozen:
        trees = [self.store.trees(image.diff_ids) for image in (self.built, self.image)]
        shared = diff.common(self.built, self.image)
        found = userns.call("workbench.history.freeze:look", *trees, shared)
        new, gone = ([Package(*row) for row in found[which]] for which in ("new", "gone"))
        done = {package.key for package in new if self._express(package)} | {("venv", VENV, "")}
        self._remove(gone)
        for row in (_Row(**row | {"owner": tuple(row["owner"])}) for row in found["files"]):
            (self.brought.setdefault(row.owner, []) if row.owner in done else self.rows).append(row)
        result = self._made(build)
        if with_files and self._take(most):
            result = self._made(build)
        self._write()  # what is not in it is known now
        return replace(result, different=result.different[:1000])

    @property
    def lost(self) -> list[Lost]:
        return [*self.packages, *(row.lost for row in self.rows if row.kind != "package")]

    # Packages

    def _express(self, package: Package) -> bool:
        """Name a package in the recipe, or say why not; whether it is there."""
        if package.origin == "deb":  # with Debian's package, which is named
            return True
        kind, why = package.kind, ""
        if kind == "deb":
            if self.suite and _VERSION.fullmatch(package.version):
                self._wish(self.debian, f"{package.name}={package.version}", package)
            else:
                why = "what the recipe stands on is of no Debian suite known here"
        elif kind == "python" and package.environment == VENV:
            kind, why = self._require(package)
        elif kind == "python":
            kind, why = "environment", f"it is in {package.environment}, a recipe's Python packages are in {VENV}"
        else:
            why = "a recipe names those of Debian only" if kind == "r" else "no conda is here"
        if why:
            self.packages.append(Lost(kind, _label(package.name, package.version), why))
        return not why

    def _require(self, package: Package) -> tuple[str, str]:
        """Name a Python package; else what kind it is and why not."""
        if not _NAME.fullmatch(package.name) or not _RELEASE.fullmatch(package.version):
            return "folder", "its name or version is none that an index has"
        wish = f"{package.name}=={package.version}"
        if package.origin == "url" and package.source.startswith(("https://", "http://")):
            if not self.tools.reaches(package.source.partition("#")[0]):
                return "url", f"{package.source} cannot be fetched"
            wish = f"{package.name} @ {package.source}"
        elif package.origin != "index":
            kind = package.origin if package.origin in ("editable", "vcs") else "folder"
            return kind, f"from {package.source}" if package.source else "nothing tells where it came from"
        self._wish(self.python, wish, package)
        return "python", ""

    def _wish(self, wishes: list[str], wish: str, package: Package) -> None:
        wishes.append(wish)
        self.wishes[wish] = package

    def _give_up(self, failed: BuildFailed) -> bool:
        """Take out of the recipe what nobody has any more, and say so by name; whether there is any such."""
        wanted = {_plain(each) for each in failed.missing}
        gone = [wish for wish in self.wishes if {_plain(wish), _plain(re.split("=| @ ", wish)[0])} & wanted]
        for wish in gone:
            package = self.wishes.pop(wish)
            where = "archive" if package.kind == "deb" else "index"
            kind = "deb" if package.kind == "deb" else "gone"
            self.packages.append(Lost(kind, _label(package.name, package.version), f"no {where} has it any more"))
            (self.debian if package.kind == "deb" else self.python).remove(wish)
            self.rows += self.brought.pop(package.key, [])
        return bool(gone)

    def _remove(self, gone: Iterable[Package]) -> None:
        """What was there when it was built and is no more: by a script, after everything else."""
        debian = sorted(one.name for one in gone if one.kind == "deb")
        python = sorted(one.name for one in gone if one.kind == "python" and one.environment == VENV)
        if debian:
            self.scripts.append(f"dpkg --purge {shlex.join(debian)}")
        if python:
            self.scripts.append(f"{VENV}/bin/python -m pip uninstall -q -y {shlex.join(python)}")

    # Files

    def _take(self, most: int) -> bool:
        """Let files go along, beside the recipe, and links and what is gone by a script; whether there are any."""
        wanted: list[_Row] = []
        left: list[_Row] = []
        lines: list[str] = []
        size = 0
        for row in self.rows:
            if row.why:
                left.append(row)
            elif row.kind == "removed":
                lines.append(f"rm -f -- {shlex.quote('/' + row.path)}")
            elif row.link:
                folder, at = (shlex.quote("/" + path) for path in (os.path.dirname(row.path), row.path))
                lines += [f"mkdir -p -- {folder}", f"ln -sfn -- {shlex.quote(row.link)} {at}"]
            elif size + row.size > most or len(wanted) == MOST_FILES:
                left.append(replace(row, why="it is more than goes along"))
            else:
                wanted.append(row)
                size += row.size
        place = self.folder / "files"
        paths = [row.path for row in wanted]
        userns.call("workbench.history.freeze:copy", self.store.trees(self.image.diff_ids), paths, str(place))
        secret = set(self.tools.keys(str(place)))
        for path in secret:
            os.unlink(place / path)
        left += [replace(row, why="it holds a private key") for row in wanted if row.path in secret]
        self.files = {f"/{path}": f"files/{path}" for path in paths if path not in secret}
        self.scripts += dict.fromkeys(lines)
        self.taken, self.rows = len(self.rows) - len(left), left
        return self.taken > 0

    # The recipe and what it gives

    def _write(self) -> None:
        values: dict[str, Any] = {
            "name": self.name, "description": f"Frozen from {self.text} ({self.image.id[7:19]})", "base": self.base,
        }  # fmt: skip
        if self.debian:
            values["apt"] = {"packages": self.debian}
        if self.python:
            values["python"] = {"packages": self.python}
        if self.files:
            values["files"] = self.files
        if self.scripts:
            values["run"] = [{"script": "\n".join(self.scripts) + "\n"}]
        kernel = self.image.kernel
        if kernel and "ipykernel_launcher" not in kernel.argv and any(map(_IPYKERNEL.match, self.python)):
            values["kernel"] = {  # or that package would be it
                "argv": list(kernel.argv), "language": kernel.language, "display_name": kernel.display_name,
                "interrupt_mode": kernel.interrupt_mode, "transport": kernel.transport,
            }  # fmt: skip
        (self.folder / "recipe.toml").write_text(self.tools.text(values, self._remarks()), "utf-8")

    def _remarks(self) -> Iterator[str]:
        yield f"Written by `jupyter workbench freeze` from {self.text}, image {self.image.id}."
        if "image" in self.base:
            yield "It stands on an image, which others get by `jupyter workbench export`. That was made of:"
            for entry in self.store.history(self.built.id)[:20]:
                yield f"  {str(entry.get('created_by', '')).removeprefix('workbench: ')}"
        lines = list(summary(self.lost))
        yield from ["Not in here:", *(f"  {line}" for line in lines)] if lines else []

    def _locked(self) -> Image:
        """Build the recipe, without what is nowhere to be had any more. Raises BuildFailed."""
        while True:
            try:
                return self.tools.lock(str(self.folder))
            except BuildFailed as error:
                if self._give_up(error):
                    self._write()
                    continue
                remedy = "; ".join(filter(None, [error.remedy, "`freeze --no-build` writes the recipe alone"]))
                raise BuildFailed(error.tried, error.obstacle, remedy) from None

    def _made(self, build: bool) -> Frozen:
        """Write the recipe, build it if that is wanted, and forget of what is lost all that is there nevertheless."""
        self._write()
        image = self._locked() if build else None
        (kind, name), *_ = self.base.items()
        result = Frozen(
            "", self.name, f"{kind} {name}", tuple(self.debian), tuple(self.python), self.taken, tuple(self.lost)
        )
        if image is None:
            return result
        between = diff.between(self.store, self.image, image, times=False)
        whole = userns.call("workbench.history.freeze:measure", self.store.trees(self.image.diff_ids))
        unlike = {_label(row.name, row.before) for row in between.packages if row.before}
        self.packages = [one for one in self.packages if one.name in unlike]
        files = [row for row in between.files if counts(row.path)]
        paths = {row.path for row in between.files}
        self.rows = [row for row in self.rows if row.path in paths]  # packages have made the others
        more = sum(row.kind == "A" for row in files)
        gone = sum(bool(row.before) for row in between.packages)
        return replace(
            result, lost=tuple(self.lost), image=image, packages=(whole["packages"] - gone, whole["packages"]),
            files=(whole["files"] - len(files) + more, whole["files"]), more=more,
            different=tuple(row.path for row in files),
        )  # fmt: skip


def _plain(wish: str) -> str:
    """A package's name as both kinds of tools write it, with the version."""
    name, equals, version = wish.partition("=")
    return re.sub(r"[-_.]+", "-", name).lower() + equals + version


def texts(folder: Path, text: str) -> dict[str, str]:
    """The files of a frozen recipe, by name, for who hands them on. Raises Conflict for more than `MOST_TEXT` bytes."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if sum(path.stat().st_size for path in files) > MOST_TEXT:
        raise Conflict(f"freeze {text}", "its recipe is too long", f"jupyter workbench freeze {text}")
    return {path.name: path.read_text("utf-8") for path in files}


def frozen_name(text: str, image_id: str) -> str:
    """The name of the recipe: that of the image with ``-frozen``, so that no name of the snapshot's moves."""
    name = re.sub(r"[:~^@{].*", "", text)
    return f"frozen-{image_id[7:19]}" if re.fullmatch(r"(?:sha256)?|[0-9a-f]{4,64}", name) else f"{name}-frozen"


def counts(path: str) -> bool:
    """Whether a path of a diff is a file that counts: no folder, and nothing that comes about by itself."""
    return not path.endswith("/") and not by_itself(path) and not is_note(path)


def _label(name: str, version: str) -> str:
    return f"{name} {version}"


_WORDS = {
    "editable": ("editable install", "editable installs"),
    "url": ("package of an address that cannot be fetched", "packages of addresses that cannot be fetched"),
    "vcs": ("package from a repository of sources", "packages from repositories of sources"),
    "folder": ("package from a folder or file", "packages from folders or files"),
    "environment": ("package of another environment", "packages of other environments"),
    "deb": ("Debian package", "Debian packages"), "gone": ("Python package", "Python packages"),
    "r": ("R package", "R packages"), "conda": ("conda package", "conda packages"),
    "unowned": ("file that no package owns", "files that no package owns"),
    "changed": ("changed file of a package", "changed files of packages"),
    "removed": ("removed file", "removed files"), "users": ("file of users and groups", "files of users and groups"),
}  # fmt: skip


def summary(lost: Iterable[Lost], most: int = 5) -> Iterator[str]:
    """A line for each kind of what is lost: how many, and the first ``most`` by name."""
    kinds: dict[str, list[Lost]] = {}
    for one in lost:
        kinds.setdefault(one.kind, []).append(one)
    for kind, ones in kinds.items():
        whys = {one.why for one in ones}
        names = [f"{one.name} ({one.why})" if one.why and len(whys) > 1 else one.name for one in ones[:most]]
        more = f" and {len(ones) - most} more" if len(ones) > most else ""
        why = f" ({whys.pop()})" if len(whys) == 1 and "" not in whys else ""
        yield f"{len(ones)} {_WORDS[kind][len(ones) > 1]}: {', '.join(names)}{more}{why}"


# Where files of layers can be read; through ``userns.call``


def look(below: list[str], trees: list[str], shared: int) -> dict[str, Any]:
    """What an image has over what was built: ``new`` and ``gone`` packages, ``files`` that are not as they were.

    below, trees: of what was built and of the image, highest first; shared: the lowest so many are the same.
    """
    views = View(below), View(trees)
    old, new = ({package.key: package for package in inventory.packages(view)} for view in views)
    changed = {key for key, package in new.items() if diff.says(package) != diff.says(old.get(key))}
    gone = old.keys() - new.keys()
    owners = [Owners(view, found.values()) for view, found in zip(views, (old, new), strict=True)]
    rows = []
    for kind, path, before, after in diff.compare(below, trees, shared, times=False)["files"]:
        side = int(kind != "D")
        shown = views[side].find(path)
        owner = owners[side].of(path) or ()
        if kind == "D" and owner in changed | gone:
            continue
        if not counts(path) and not (is_note(path) and owner in changed):  # with a package that goes along its notes do
            continue
        if is_alternative(shown):
            continue
        if _USERS.fullmatch(path):
            word = "users"
        elif kind == "D":
            word = "removed"
        else:
            word = "unowned" if not owner else "package" if owner in changed or owner[0] == "venv" else "changed"
        link = os.readlink(shown.path) if shown.found and stat.S_ISLNK(shown.found.st_mode) else ""
        why = "" if word == "removed" and path.isprintable() else _hindrance(path, word, shown)
        rows.append(asdict(_Row(word, path, after if side else before, link, why, owner)))
    return {
        "new": [list(asdict(new[key]).values()) for key in sorted(changed)],
        "gone": [list(asdict(old[key]).values()) for key in sorted(gone)], "files": rows,
    }  # fmt: skip


def _hindrance(path: str, word: str, shown: Shown) -> str:
    """What keeps a file from going along with a recipe, whose files are root's, and readable by all."""
    if word == "users":
        return "accounts come with packages, or by a script"
    if not path.isprintable():
        return "its name is no plain text"
    assert shown.found is not None
    mode, owner = stat.S_IMODE(shown.found.st_mode), (shown.found.st_uid, shown.found.st_gid)
    if owner != (0, 0):
        return f"it belongs to {owner[0]}:{owner[1]}"
    if stat.S_ISLNK(shown.found.st_mode):
        return "" if os.readlink(shown.path).isprintable() else "its target is no plain text"
    if not stat.S_ISREG(shown.found.st_mode):
        return "it is neither a file nor a link"
    if mode not in (0o644, 0o755):
        return f"its mode is {mode:o}"
    return "it has attributes" if any(map(kept_xattrs, os.listxattr(shown.path))) else ""


def measure(trees: list[str]) -> dict[str, int]:
    """How many ``packages`` and ``files`` that count are in an image."""
    view = View(trees)
    return {"packages": len(inventory.packages(view)), "files": sum(counts(path) for path, _ in files(view))}


def copy(trees: list[str], paths: list[str], out: str) -> None:
    """Files of an image into a new folder, with their paths; modes as a checkout has them."""
    view = View(trees)
    os.makedirs(out)
    for path in paths:
        shown, target = view.find(path), os.path.join(out, path)
        assert shown.found is not None
        os.makedirs(os.path.dirname(target), exist_ok=True)
        fd = os.open(shown.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file)
        os.chmod(target, 0o755 if shown.found.st_mode & 0o100 else 0o644)
