"""Control groups: what a container may use, what it uses, and stopping all of it; v2 and v1 behind one face.

Groups lie at ``workbench/<name>`` below the highest folder of cgroup2 that may be written (the root as root, a
user's delegated service otherwise), or below the root of each v1 hierarchy (cgroups(7); the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1). Where neither can be, ``rlimits`` is what remains.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from workbench.model import HostLacks, Limits

#: The controllers that limits need; a v1 group also has freezer and cpuacct where they are mounted.
CONTROLLERS = ("memory", "pids", "cpu")
_PARENT = "workbench"
_ASK_AGAIN = 4  # looks at a freezer of v1 that has not frozen all
_PERIOD = 100_000  # microseconds over which processor time is dealt out
#: What says "not here": no rights, read-only, no such controller, busy with processes of its own.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP)

Kind = Literal["v2", "v1", "none"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group uses now. memory: bytes; processes: with their threads; cpu: seconds since its start."""

    memory: int
    processes: int
    cpu: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where groups can be made. bases: by controller; of v2 all are the one folder."""

    kind: Kind
    bases: dict[str, str]


def find() -> Place:
    """Where this process could make groups, by looking only."""
    unified, hierarchies = _mounts()
    for candidate in _delegated(unified) if unified else ():
        offered = set(_read(candidate, "cgroup.controllers").split())
        if "memory" in offered:
            return Place("v2", {name: candidate for name in CONTROLLERS if name in offered})
    usable = {name: path for name, path in hierarchies.items() if os.access(path, os.W_OK)}
    if "memory" in usable or "pids" in usable:
        return Place("v1", usable)
    return Place("none", {})


def available() -> tuple[Kind, frozenset[str]]:
    """For people: which kind of groups could be made here, and which limits they would hold."""
    place = find()
    return place.kind, frozenset(place.bases) & frozenset(CONTROLLERS)


def _mounts() -> tuple[str, dict[str, str]]:
    """Where cgroup2 is mounted (or ""), and each v1 controller (proc(5), mountinfo)."""
    unified = ""
    hierarchies: dict[str, str] = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, _, options = right.split()[:3]
            path = left.split()[4].encode().decode("unicode_escape")
            if kind == "cgroup2":
                unified = unified or path
            elif kind == "cgroup":
                for name in {*CONTROLLERS, "cpuacct", "freezer"} & set(options.split(",")):
                    hierarchies.setdefault(name, path)
    return unified, hierarchies


def _delegated(unified: str) -> Iterator[str]:
    """Folders of v2 on the way down to this process's group whose members this user may move, highest first."""
    own = next((line[3:] for line in _read("/proc/self", "cgroup").splitlines() if line.startswith("0::")), "/")
    path = unified
    for part in ("", *own.strip("/").split("/")):
        path = os.path.join(path, part) if part else path
        if all(os.access(os.path.join(path, name), os.W_OK) for name in ("cgroup.procs", "cgroup.subtree_control")):
            yield path


class Cgroup:
    """The group of one container. Make it with ``make``; it stays until ``remove``."""

    def __init__(self, kind: Kind, folders: dict[str, str]) -> None:
        self.kind = kind
        self.folders = folders  #: by controller

    @classmethod
    def make(cls, name: str, limits: Limits, place: Place | None = None) -> Cgroup | None:
        """A group with these limits, or None where none may be made (then see ``rlimits``).

        Raises HostLacks when a group can be made but cannot hold a limit that was asked for, OSError.
        """
        place = place or find()
        if place.kind == "none":
            return None
        group = cls(place.kind, {key: os.path.join(base, _PARENT, name) for key, base in place.bases.items()})
        try:
            for base in dict.fromkeys(place.bases.values()):
                _make_folder(base, name, controllers=tuple(place.bases) if place.kind == "v2" else ())
            group._set(limits)
        except OSError as error:
            group.remove()
            if error.errno in _UNUSABLE:
                return None
            raise
        except BaseException:
            group.remove()
            raise
        return group

    @classmethod
    def forget(cls, name: str) -> None:
        """End and remove what is left of a group whose maker was killed."""
        if group := cls.of(name):
            group.remove()
        for base in find().bases.values():  # a maker killed between two steps had got no further than the parent
            with suppress(OSError):
                os.rmdir(os.path.join(base, _PARENT))

    @classmethod
    def of(cls, name: str) -> Cgroup | None:
        """The group of a container that some process of this user runs; None where there is none."""
        place = find()
        folders = {key: os.path.join(base, _PARENT, name) for key, base in place.bases.items()}
        there = {key: path for key, path in folders.items() if os.path.isdir(path)}
        return cls(place.kind, there) if there else None

    def _set(self, limits: Limits) -> None:
        if limits.cpus is not None and "cpu" not in self.folders:
            raise HostLacks(  # for the others, ``rlimits`` does what it can
                "limit a container's processors",
                f"cgroup {self.kind} has no cpu controller here",
                "leave that limit out, or see `jupyter workbench doctor`",
            )
        v2 = self.kind == "v2"
        if limits.memory is not None and "memory" in self.folders:
            # Swap counts as memory: a limit that moves the excess to the disk would be none.
            self._write("memory", "memory.max" if v2 else "memory.limit_in_bytes", limits.memory)
            with suppress(FileNotFoundError, PermissionError):  # no swap accounting in this kernel
                if v2:
                    self._write("memory", "memory.swap.max", 0)
                else:
                    self._write("memory", "memory.memsw.limit_in_bytes", limits.memory)
        if limits.processes is not None and "pids" in self.folders:
            self._write("pids", "pids.max", limits.processes)
        if limits.cpus is not None:
            quota = max(1000, int(limits.cpus * _PERIOD))
            if v2:
                self._write("cpu", "cpu.max", f"{quota} {_PERIOD}")
            else:
                self._write("cpu", "cpu.cfs_period_us", _PERIOD)
                self._write("cpu", "cpu.cfs_quota_us", quota)

    def add(self, pid: int) -> None:
        """Move a process in. Its children follow, those it has already do not."""
        for folder in self._distinct():
            _write(folder, "cgroup.procs", pid)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While it lasts, this process (which must have one thread) is in the group, and so are those it forks.

        For v1: moving another process takes a lock of the whole host, 8 ms where nobody took it lately, and
        moving oneself by thread does not. The child's cgroup namespace then has this group as its root, too.
        For v2 nothing is done; use ``add``.
        """
        if self.kind != "v1":
            yield
            return
        _, hierarchies = _mounts()
        home = _own_groups()
        back: list[tuple[str, int]] = []
        try:
            for controller, folder in self.folders.items():
                origin = os.path.join(hierarchies[controller], home.get(controller, "").strip("/"))
                if folder not in (entered for entered, _ in back):
                    back.append((folder, os.open(os.path.join(origin, "tasks"), os.O_WRONLY | os.O_CLOEXEC)))
            for folder, _ in back:
                _write(folder, "tasks", 0)
            yield
        finally:
            for _, tasks in back:
                os.write(tasks, b"0")
                os.close(tasks)

    def pids(self) -> list[int]:
        """The processes in the group; 0 for those that this process cannot see."""
        for folder in self._distinct():
            return [int(line) for line in _read(folder, "cgroup.procs").split()]
        return []

    def oom_kills(self) -> int:
        """How many processes the kernel killed because the memory limit was reached."""
        name = "memory.events" if self.kind == "v2" else "memory.oom_control"
        return _counter(_read(self.folders.get("memory", ""), name), "oom_kill")

    def pids_refused(self) -> int:
        """How many processes or threads were not made because the limit of them was reached."""
        return _counter(_read(self.folders.get("pids", ""), "pids.events"), "max")

    def usage(self) -> Usage:
        """What it uses now; zero for what cannot be read."""
        v2 = self.kind == "v2"
        memory = _read(self.folders.get("memory", ""), "memory.current" if v2 else "memory.usage_in_bytes")
        processes = _read(self.folders.get("pids", ""), "pids.current")
        if v2:
            cpu = _counter(_read(self.folders.get("cpu", ""), "cpu.stat"), "usage_usec") / 1e6
        else:
            cpu = int(_read(self.folders.get("cpuacct", ""), "cpuacct.usage") or 0) / 1e9
        return Usage(int(memory or 0), int(processes or 0), cpu)

    def freeze(self, timeout: float = 5.0) -> None:
        """Stop every process where it is; returns when all stand still.

        timeout: seconds; then they go on and TimeoutError is raised. Raises HostLacks without a freezer.
        """
        self._freezer("1", "FROZEN")
        deadline = time.monotonic() + timeout
        tries = 0
        while not self._frozen():
            if time.monotonic() > deadline:
                self.thaw()
                raise TimeoutError(errno.ETIMEDOUT, "some process of the container does not stop")
            time.sleep(0.0005)
            tries += 1
            if self.kind == "v1" and tries % _ASK_AGAIN == 0:
                # What was forked meanwhile may hold it up for good, unless it is let go and asked again.
                self.thaw()
                self._freezer("1", "FROZEN")

    def thaw(self) -> None:
        """Let them go on."""
        self._freezer("0", "THAWED")

    def _freezer(self, v2: str, v1: str) -> None:
        folder = next(iter(self._distinct()), "") if self.kind == "v2" else self.folders.get("freezer", "")
        if not folder:
            raise HostLacks("freeze a container", "the freezer of cgroup v1 is not mounted here", "")
        _write(folder, *(("cgroup.freeze", v2) if self.kind == "v2" else ("freezer.state", v1)))

    def _frozen(self) -> bool:
        if self.kind == "v2":
            return _counter(_read(next(iter(self._distinct())), "cgroup.events"), "frozen") == 1
        return _read(self.folders["freezer"], "freezer.state").strip() == "FROZEN"

    def kill(self) -> None:
        """SIGKILL to every process in the group, frozen ones too; does not wait for their end."""
        if self.kind == "v2":
            with suppress(FileNotFoundError):  # before Linux 5.14
                for folder in self._distinct():
                    _write(folder, "cgroup.kill", 1)
                return
        # One that forks faster than we read is caught by the next round, or by the end of its pid namespace.
        for _ in range(10):
            pids = [pid for pid in self.pids() if pid > 0 and pid != os.getpid()]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                break
        with suppress(OSError, HostLacks):
            self.thaw()

    def remove(self, timeout: float = 5.0) -> None:
        """End what still runs and remove the group, and ``workbench`` with the last one. Removing twice is fine.

        timeout: seconds that dying processes have to drain. Raises OSError (EBUSY) when they do not.
        """
        deadline = time.monotonic() + timeout
        killed = False
        for folder in self._distinct():
            while True:
                try:
                    os.rmdir(folder)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                    if not killed:
                        self.kill()
                        killed = True
                    time.sleep(0.001)
                    continue
                break
            with suppress(OSError):  # others are still in it
                os.rmdir(os.path.dirname(folder))

    def _distinct(self) -> list[str]:
        return list(dict.fromkeys(self.folders.values()))

    def _write(self, controller: str, name: str, value: int | str) -> None:
        _write(self.folders[controller], name, value)


def rlimits(limits: Limits, group: Cgroup | None) -> list[tuple[int, int, int]]:
    """What setrlimit(2) can do where there is no group or not that controller, as (resource, soft, hard).

    No hard limit is ever raised. Memory is each process's own private writable memory, not the container's;
    processor shares have none.
    """
    wanted = (
        ("memory", resource.RLIMIT_DATA, limits.memory),
        ("pids", resource.RLIMIT_NPROC, limits.processes),
    )
    found = []
    for controller, kind, value in wanted:
        if value is not None and not (group and controller in group.folders):
            hard = resource.getrlimit(kind)[1]
            least = value if hard == resource.RLIM_INFINITY else min(value, hard)
            found.append((kind, least, least))
    return found


def _make_folder(base: str, name: str, controllers: tuple[str, ...]) -> None:
    """``base/workbench/name``; in v2 with these controllers switched on from the base down."""
    parent = os.path.join(base, _PARENT)
    for attempt in range(1000):
        with suppress(FileExistsError):
            os.mkdir(parent, 0o755)
        try:
            os.mkdir(os.path.join(parent, name), 0o755)
            break
        except OSError as error:
            # ENOENT, ENODEV: the last of the others left meanwhile and took the parent along.
            if error.errno not in (errno.ENOENT, errno.ENODEV) or attempt == 999 or not os.path.isdir(base):
                raise
    # Now that somebody is in it the parent stays; what is switched on above appears in groups that are there. The file
    # is not asked first: it names a controller that another process is just switching on before its files are there.
    for folder in (base, parent) if controllers else ():
        _write(folder, "cgroup.subtree_control", " ".join(f"+{controller}" for controller in controllers))


def _own_groups() -> dict[str, str]:
    """The path of this process's group in each v1 hierarchy, by controller (cgroups(7))."""
    found = {}
    for line in _read("/proc/self", "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = path
    return found


def _write(folder: str, name: str, value: int | str) -> None:
    fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _read(folder: str, name: str) -> str:
    """A file's text, or nothing where there is none."""
    try:
        with open(os.path.join(folder, name)) as file:
            return file.read()
    except OSError:
        return ""


def _counter(text: str, name: str) -> int:
    """The number behind a name, in a file of ``name number`` lines."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
