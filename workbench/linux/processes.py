"""The processes of a pid namespace as /proc tells them, where no control group does (proc(5), pid_namespaces(7))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from workbench.linux.cgroup import Usage

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds


def members(init: int) -> Iterator[int]:
    """The processes in the pid namespace of this one, itself as well; not those of namespaces below. Raises OSError."""
    namespace = os.stat(f"/proc/{init}/ns/pid").st_ino
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}/ns/pid").st_ino == namespace:
                yield int(name)


def state(pid: int) -> str:
    """The letter of proc_pid_stat(5); X for one that is gone."""
    with suppress(OSError, IndexError):
        return _stat(pid)[0]
    return "X"


def resident(pid: int) -> int:
    """Bytes that a process has in memory, shared ones too (proc_pid_statm(5)); none once it ended. Raises OSError."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def usage(init: int) -> Usage | None:
    """What the namespace of this process uses, added up; None when it is gone.

    Of memory that several share each has its part; files that nobody has mapped are not in it, other than in a
    control group. Processor time of those that ended is with who waited for them, in the end the init.
    """
    memory = threads = ticks = 0
    try:
        for pid in members(init):
            with suppress(OSError, IndexError):
                fields = _stat(pid)
                ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
                threads += int(fields[17])
                memory += _memory(pid)
    except OSError:
        return None
    return Usage(memory, threads, ticks * _TICK)


def _stat(pid: int) -> list[str]:
    """What comes after the name, from field 3 on."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _memory(pid: int) -> int:
    """Bytes: its part of all that it has in memory; where that may not be read, all."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return resident(pid)
