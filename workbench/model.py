"""Value types and named errors that every room shares. Nothing here touches the disk or the kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

#: ``none``, ``outbound``, ``host``, or ``lan:NAME`` for a named network (``parse_network``).
Network = str
#: From the one that reaches least. A named network is ``outbound`` with neighbours.
NETWORKS: tuple[Network, ...] = ("none", "outbound", "host")
LAN = "lan:"


#: What Unicode counts as a format character and words need: joiners of letters, and of the parts of an emoji.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """A text of somebody else's for one line of a terminal: what would act there, or turn the line around, is shown as
    Python writes it (``\\x1b``), a byte that is no UTF-8 as ``\\xff``. The tab stays."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    if char.isprintable() or char in _JOINERS or char == "\t":
        return char
    from unicodedata import category  # rarely needed

    if category(char) == "Zs":  # blanks of other widths
        return char
    byte = ord(char) - 0xDC00  # os.fsdecode's, PEP 383
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(char)[1:-1]


class WorkbenchError(Exception):
    """Something that a person can act on: what was tried, what stood in the way, what to do.

    ``str()`` is always one line. Edges decide what it means for them: an exit code in
    ``cli.py``, an HTTP status in ``jupyter/handlers.py``.
    """

    def __init__(self, tried: str, obstacle: str, remedy: str = "", exit_code: int = 1) -> None:
        self.tried, self.obstacle, self.remedy, self.exit_code = tried, obstacle, remedy, exit_code
        line = f"{tried}: {obstacle}" + (f"; {remedy}" if remedy else "")
        # What an archive or an image says may stand in it.
        super().__init__(printable(" ".join(line.split())))

    def as_dict(self) -> dict[str, Any]:
        """The error as it crosses a process boundary; ``from_dict`` is its inverse."""
        return {
            "error": type(self).__name__,
            "tried": self.tried,
            "obstacle": self.obstacle,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> WorkbenchError:
        """The error that ``as_dict`` wrote."""
        every: tuple[type[WorkbenchError], ...] = (*WorkbenchError.__subclasses__(), Running)
        kinds = {kind.__name__: kind for kind in every}
        kind = kinds.get(data.get("error", ""), WorkbenchError)
        return kind(data.get("tried", ""), data.get("obstacle", ""), data.get("remedy", ""), data.get("exit_code", 1))


class InvalidInput(WorkbenchError):
    """A recipe, a name or an option that cannot be meant."""


class NotFound(WorkbenchError):
    """An image, a container, a layer or a file that is not there."""


class Conflict(WorkbenchError):
    """Somebody else holds it, or it is still in use."""


class Interrupted(WorkbenchError):
    """Whoever asked for it wants it no more; nothing of it stays."""


class Running(Conflict):
    """A container that runs, where it has to stand still."""


class HostLacks(WorkbenchError):
    """The host cannot do what is needed; ``doctor`` names the same thing."""


class Corrupt(WorkbenchError):
    """What is on disk is not what its digest says."""


class BuildFailed(WorkbenchError):
    """A step of a recipe ended badly. missing: the packages, as the recipe names them, that are nowhere to be had."""

    missing: tuple[str, ...] = ()


class LaunchFailed(WorkbenchError):
    """A container could not be started."""


#: Told some ten times a second of long work what it does and how far it is: ``meter("writing", 3 << 20, 9 << 20)``, in
#: bytes, the last one 0 where it waits or nobody knows. What it raises ends the work, of which nothing stays then.
Meter = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use. ``None`` means no limit of that kind.

    memory: bytes; processes: how many processes and threads; cpus: processors, may be a fraction.
    """

    memory: int | None = None
    processes: int | None = None
    cpus: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidInput: a negative number would mean "no limit" to the kernel, and images bring limits."""
        for name, least in (("memory", 1), ("processes", 1), ("cpus", 0.001)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 1 << 62:  # nor is it "not a number"
                remedy = "leave it out" if value > 1 << 62 else "give a number greater than 0"
                raise InvalidInput(f"limit {name}", f"{value!r} is no limit", remedy)

    def stricter(self, other: Limits) -> Limits:
        """The smaller of each limit: an image can narrow what the configuration grants, never widen it."""

        def least(a: Any, b: Any) -> Any:
            return min((value for value in (a, b) if value is not None), default=None)

        return Limits(
            least(self.memory, other.memory),
            least(self.processes, other.processes),
            least(self.cpus, other.cpus),
        )


def parse_network(text: str) -> Network:
    """The text, if it names a network. Raises InvalidInput."""
    if text in NETWORKS or re.fullmatch(rf"{LAN}[a-z0-9][a-z0-9-]{{0,31}}", text):
        return text
    obstacle = f"{text!r} is no network: take {', '.join(NETWORKS)} or {LAN}NAME (small letters, digits, dashes)"
    raise InvalidInput("choose a network", obstacle)


@overload
def narrower(first: Network, second: Network | None) -> Network: ...
@overload
def narrower(first: Network | None, second: Network | None) -> Network | None: ...
def narrower(first: Network | None, second: Network | None) -> Network | None:
    """The one of two that reaches less, None for whoever says nothing; of two alike the second, which is closer to the
    container."""
    if first is None or second is None:
        return first or second

    def reach(network: Network) -> int:
        return NETWORKS.index("outbound" if network.startswith(LAN) else network)

    return second if reach(second) <= reach(first) else first


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from ``"512M"``, ``"2GiB"``, ``"1.5g"`` or a plain number. Raises InvalidInput."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not found:
        raise InvalidInput("read a size", f"{text!r} is no number of bytes", 'write it like "512M" or "2G"')
    return int(float(found[1]) * _UNITS[found[2].upper()])


def format_size(size: int) -> str:
    """``536870912`` as ``512.0 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def how_far(what: str, done: int, total: int) -> str:
    """What a ``Meter`` is told, for people: ``writing: 3.0 MiB of 9.0 MiB``."""
    return f"{what}: {format_size(done)} of {format_size(total)}" if total else what


def count(number: int, what: str) -> str:
    """``3 wheels``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def project_name(text: str) -> str:
    """A Python project's name as indexes write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", text).lower()


@dataclass(frozen=True, slots=True)
class Mount:
    """A host folder or file seen inside: absolute paths, never created on the host.

    source: without symbolic links (``os.path.realpath``), which a start does not follow.
    """

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """How an image's kernel is started; ``{connection_file}`` in argv is replaced at launch.

    transport: "tcp" for one that cannot speak over Unix sockets.
    """

    argv: tuple[str, ...]
    language: str = "python"
    display_name: str = ""
    interrupt_mode: Literal["signal", "message"] = "signal"
    supported_encryption: tuple[str, ...] = ()
    transport: Literal["ipc", "tcp"] = "ipc"


@dataclass(frozen=True, slots=True)
class Image:
    """An immutable environment. ``id`` is the sha256 of its OCI config (``sha256:<hex>``).

    diff_ids: lowest layer first, as in the OCI image spec's ``rootfs.diff_ids``; network: what its containers reach at
    the most; parent: the ID of the image that a snapshot was taken over.
    """

    id: str
    diff_ids: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = "/"
    kernel: Kernel | None = None
    limits: Limits = field(default_factory=Limits)
    network: Network | None = None
    parent: str = ""
    created: str = ""
    labels: tuple[tuple[str, str], ...] = ()


#: Of our kernels' names.
KERNEL_PREFIX = "wb-"
#: Of an image: the Debian suite that it is of.
SUITE_LABEL = "org.jupyter.workbench.suite"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container's main process ended. ``reason`` is one line for people, empty when it ended well.

    limit: the one that was reached; asked: whether its owner stopped it (``Container.stop``).
    """

    code: int
    reason: str = ""
    limit: Literal["", "memory", "processes"] = ""
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that ``check`` or ``doctor`` found. ``remedy`` is the one line that mends it."""

    what: str
    obstacle: str
    remedy: str = ""
    repaired: bool = False


#: Paths in a writable layer that never count as a change of the environment (proc(5)-like trees,
#: temporary files, caches and histories), relative to ``/``; a trailing slash covers what lies below.
NOT_ENVIRONMENT: tuple[str, ...] = (
    "proc/", "sys/", "dev/", "run/", "tmp/", "var/tmp/",
    "root/.cache/", "root/.ipython/", "root/.local/share/jupyter/runtime/",
    "root/.bash_history", "root/.python_history",
    "var/cache/apt/", "var/lib/apt/lists/", "var/log/",
)  # fmt: skip


#: What of a writable layer no snapshot takes either: what names or lets in its owner.
CREDENTIALS: tuple[str, ...] = (
    "root/.netrc", "root/.pypirc", "root/.git-credentials", "root/.config/git/credentials", "root/.ssh/",
    "root/.pip/pip.conf", "root/.config/pip/pip.conf", "etc/pip.conf", "root/.config/uv/", "etc/uv/",
    "root/.local/share/uv/credentials/", "etc/apt/auth.conf", "etc/apt/auth.conf.d/",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What of the host's own settings is offered to builds and kernels, and never kept in a layer.

    env: variables; files: (host path, path inside) pairs to be bound read-only; texts: (path inside,
    content) pairs of small files that are made inside; mirrors: archive (``debian``, ``security``) and the
    address that the host uses in place of Debian's own.
    """

    env: tuple[tuple[str, str], ...] = field(default=())
    files: tuple[tuple[str, str], ...] = field(default=())
    texts: tuple[tuple[str, str], ...] = field(default=())
    mirrors: tuple[tuple[str, str], ...] = field(default=())
