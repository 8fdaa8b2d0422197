"""Starting and ending a container, seen from the helper: the stages of DESIGN's launch, in order.

clone -> maps -> limits and network -> mounts (a worker) -> go -> exec. Whatever a stage made is undone when a
later one fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import termios
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import NoReturn

from workbench.containers import enter, forward, lan, links, network, spec, state
from workbench.linux import cgroup, mounts, seccomp
from workbench.linux import syscalls as sc
from workbench.linux.userns import HostIds
from workbench.model import LAN, Conflict, Exit, HostLacks, LaunchFailed, NotFound, WorkbenchError, format_size

INIT_CANDIDATES = ("/usr/bin/tini-static", "/usr/local/bin/tini-static", "/sbin/tini-static")
_EVERYBODYS = (*(f"/dev/{name}" for name in spec.DEVICES), "/sys")
SLOTS = 8192


@dataclass(slots=True)
class Running:
    """A container that runs, and what has to be undone at its end."""

    id: str
    folder: str
    writable: str
    spec: spec.ContainerSpec
    pid: int = -1
    started: str = ""
    pidfd: int = -1
    worker: int = -1
    terminal: int = -1
    lock: int = -1
    slot: int = 0
    slot_lock: int = -1
    group: cgroup.Cgroup | None = None
    attachment: network.Attachment | None = None
    forward: forward.Forward | None = None
    sources: dict[str, int] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)


class Launcher:
    """Starts containers and buries them."""

    def __init__(self, ids: HostIds) -> None:
        self.ids = ids
        self._init_fd = -1
        self._filters: dict[str, bytes] = {}

    def warm(self, kind: str) -> None:
        """Read what every launch needs: the init program, the filter, the network library."""
        self._init()
        self._filter("default")
        if kind not in ("none", "host") and self.ids.kind == "root":
            network.preload()

    def start(self, folder: str, stdio: Sequence[int]) -> Running:
        """Start the container that is laid out in ``folder``. Raises WorkbenchError or OSError, leaving nothing."""
        known = state.load(folder)
        wanted = spec.ContainerSpec.from_json(known["spec"])
        running = Running(wanted.id, folder, state.tree(folder, known), wanted, lock=state.hold(folder))
        try:
            state.forget_the_wish_to_stop(folder)
            self._start(running, known["run_dir"], stdio)
            now = {"status": "running", "pid": running.pid, "started": running.started, "exit": None}
            state.save(folder, known | now)
        except BaseException:
            self._undo(running)
            raise
        finally:
            for fd in running.sources.values():
                os.close(fd)
            running.sources.clear()
            running.contents.clear()
        return running

    def _start(self, running: Running, run_dir: str, stdio: Sequence[int]) -> None:
        wanted = running.spec
        if wanted.forwards and wanted.network == "host":
            raise LaunchFailed(
                f"start container {wanted.id}", "its kernel speaks TCP, which everybody on the host could reach",
                "choose network outbound or none",
            )  # fmt: skip
        if self.ids.kind == "root":
            running.slot, running.slot_lock = take_slot()
        own_network = wanted.network != "host"
        flags = enter.NAMESPACES if own_network else enter.NAMESPACES & ~sc.CLONE_NEWNET
        running.group, rlimits = self._limits(wanted)
        parameters = {
            "init_fd": self._init(), "argv": wanted.argv, "env": dict(wanted.env), "cwd": wanted.cwd,
            "stdio": stdio, "terminal": wanted.terminal, "capabilities": wanted.capabilities(),
            "filter_program": self._filter(wanted.profile), "rlimits": rlimits,
            "set_groups": self.ids.kind != "single",
        }  # fmt: skip
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            with running.group.joined() if running.group else nullcontext():
                running.pid = sc.clone(flags, signal.SIGCHLD)
                if running.pid == 0:
                    ours.close()
                    enter.in_child(theirs, **parameters)  # type: ignore[arg-type]
            theirs.close()
            running.pidfd = os.pidfd_open(running.pid)
            running.started = links.start_time(running.pid)
            self._write_maps(running)
            if running.group and running.group.kind != "v1":
                running.group.add(running.pid)
            self._furnish(running, run_dir)
            if wanted.forwards:
                running.forward = forward.Forward.start(running.pidfd, run_dir, wanted.forwards)
            with suppress(OSError, ValueError):  # known before the program looks
                window = fcntl.ioctl(stdio[0], termios.TIOCGWINSZ, bytes(8))
                fcntl.ioctl(running.terminal, termios.TIOCSWINSZ, window)
            ours.send(b"g")
            failure = ours.recv(4096).decode(errors="replace")
            # Not before, since the end of a process takes its time; nor left to itself, for code inside could stop it.
            os.kill(running.worker, signal.SIGKILL)
            self._reap_worker(running)
            if failure:
                self._refuse(running, failure)

    def _limits(self, wanted: spec.ContainerSpec) -> tuple[cgroup.Cgroup | None, list[tuple[int, int, int]]]:
        """A control group, and resource limits for what it cannot hold; core dumps are off either way."""
        import resource

        no_core = (resource.RLIMIT_CORE, 0, 0)
        group = cgroup.Cgroup.make(wanted.id, wanted.limits)
        return group, [no_core, *cgroup.rlimits(wanted.limits, group)]

    def _write_maps(self, running: Running) -> None:
        text = self.ids.container_map(running.slot)
        files = [("uid_map", text), ("gid_map", text)]
        if self.ids.kind == "single":
            files.insert(0, ("setgroups", "deny"))
        for name, content in files:
            with open(f"/proc/{running.pid}/{name}", "w") as file:
                file.write(content)

    def _furnish(self, running: Running, run_dir: str) -> None:
        """Root and network of a child that waits, side by side."""
        wanted = running.spec
        if self.ids.kind == "root":
            own = self.ids.container_root(running.slot)
            for path in (run_dir, os.path.join(run_dir, "host")):
                os.chown(path, own, own)
            for name in os.listdir(run_dir):
                os.chown(os.path.join(run_dir, name), own, own, follow_symlinks=False)
        rootful = self.ids.kind == "root"
        texts = network.files(wanted.network, rootful=rootful, hostname=wanted.hostname)
        wanted = replace(wanted, texts=(*texts, *wanted.texts))
        steps = spec.plan(wanted, writable=running.writable, run_dir=run_dir, id_kind=self.ids.kind)
        self._open_sources(running, steps, run_dir)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            running.worker = self._fork_worker(running, theirs, steps)
            theirs.close()
            running.attachment = network.attach(
                wanted.network, pid=running.pid, slot=running.slot, container_id=wanted.id, rootful=rootful
            )
            answer, fds, _, _ = socket.recv_fds(ours, 4096, 2)
        if answer != b"ok":
            raise LaunchFailed(f"start container {wanted.id}", answer.decode(errors="replace") or "its worker died")
        hosts = fds.pop() if wanted.network.startswith(LAN) else -1
        if fds:
            running.terminal = fds[0]
        if hosts >= 0:
            try:
                home = os.path.dirname(os.path.dirname(running.folder))
                lan.join(
                    home, wanted.network.removeprefix(LAN), target=running.pidfd, hosts=hosts,
                    names=(*wanted.names, wanted.hostname),
                )  # fmt: skip
            finally:
                os.close(hosts)

    def _fork_worker(self, running: Running, report: socket.socket, steps: Sequence[mounts.Mount]) -> int:
        worker = self._fork_into(running.pidfd)
        if worker == 0:
            enter.in_worker(
                report,
                running.pidfd,
                steps,
                sources=running.sources,
                contents=running.contents,
                hostname=running.spec.hostname,
                terminal=running.spec.terminal,
                loopback_up=network.loopback_up if running.spec.network != "host" else None,
                kept="/etc/hosts" if running.spec.network.startswith(LAN) else "",
            )
        return worker

    def _fork_into(self, child: int) -> int:
        """fork(2) whose child is born into another pid namespace: only a member of it can mount its /proc.

        child: a pidfd of a process in there. What the helper forks next is to be its own again, and the way back
        into the host's namespace is root's alone; for others a process in between goes (pid_namespaces(7)).
        """
        if self.ids.kind == "root":
            own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            sc.setns(child, sc.CLONE_NEWPID)
            try:
                worker = os.fork()
            except OSError:
                worker = -1
            if worker:
                sc.setns(own, sc.CLONE_NEWPID)
                os.close(own)
            if worker < 0:
                raise LaunchFailed("start a container", "no process can be made", "try again when fewer are running")
            return worker
        worker = os.fork()
        if worker == 0:
            member = -1
            with suppress(OSError):
                sc.setns(child, sc.CLONE_NEWPID)
                member = os.fork()
            if member:
                os._exit(os.waitstatus_to_exitcode(os.waitpid(member, 0)[1]) & 0xFF if member > 0 else 1)
        return worker

    def _open_sources(self, running: Running, steps: Sequence[mounts.Mount], run_dir: str) -> None:
        """Detached trees of everything that comes from outside, with the container's ids where we are root."""
        userns = os.open(f"/proc/{running.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC) if self.ids.kind == "root" else -1
        try:
            for step in steps:
                if isinstance(step, mounts.Overlay):
                    paths = {path: path for path in step.sources}
                elif isinstance(step, mounts.Bind):
                    paths = {step.key: step.source}
                elif isinstance(step, mounts.Copy):
                    with open(step.source, "rb") as file:
                        running.contents[step.source] = file.read()
                    continue
                else:
                    continue
                for key, path in paths.items():
                    if key in running.sources:
                        continue
                    # Devices and /sys are everybody's, the run folder was given to the container's root.
                    plain = path in _EVERYBODYS or path == run_dir
                    # What was named when the container was made, not where a link leads that another has put there.
                    follow = plain or isinstance(step, mounts.Overlay)
                    running.sources[key] = self._open_source(path, -1 if plain else userns, follow)
        finally:
            if userns >= 0:
                os.close(userns)

    def _open_source(self, path: str, userns: int, follow: bool) -> int:
        tried = "open what is to be mounted"
        try:
            return mounts.open_source(path, userns, follow=follow)
        except FileNotFoundError:
            raise LaunchFailed(tried, f"{path} is not there", "see `jupyter workbench check`") from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise LaunchFailed(tried, f"a symbolic link has taken the place of {path}", "look who did that") from None

    def _refuse(self, running: Running, failure: str) -> NoReturn:
        code, _, text = failure.partition(" ")
        tried = f"start {running.spec.argv[0]!r} in container {running.id}"
        raise LaunchFailed(tried, f"cannot {text}", exit_code=int(code) if code.isdigit() else 126)

    def finish(self, running: Running, override: Exit | None = None) -> Exit:
        """After the init's end: how it ended and why; nothing of the container is left but its folder."""
        _, status = os.waitpid(running.pid, 0)
        end = override or self._exit(running, os.waitstatus_to_exitcode(status))
        if state.was_asked_to_stop(running.folder):
            end = Exit(end.code, "stopped by `jupyter workbench stop`", asked=True)
        running.pid = -1
        with suppress(WorkbenchError, OSError):
            known = state.load(running.folder)
            state.save(running.folder, known | {"status": "exited", "pid": None, "exit": asdict(end)})
        self._undo(running)
        return end

    def _exit(self, running: Running, code: int) -> Exit:
        code = 128 - code if code < 0 else code
        limits = running.spec.limits
        if code and running.group and running.group.oom_kills() and limits.memory:
            return Exit(code, f"killed: it reached its memory limit of {format_size(limits.memory)}", "memory")
        if code and running.group and running.group.pids_refused() and limits.processes:
            return Exit(code, f"ended with exit code {code} after it reached its limit of {limits.processes} processes",
                        "processes")  # fmt: skip
        if code > 128:
            with suppress(ValueError):
                return Exit(code, f"killed by {signal.Signals(code - 128).name}")
        return Exit(code, f"ended with exit code {code}" if code else "")

    @staticmethod
    def _reap_worker(running: Running) -> None:
        if running.worker > 0:
            os.waitpid(running.worker, 0)
            running.worker = -1

    def _undo(self, running: Running) -> None:
        """Give back whatever a start took, in reverse."""
        if running.pid > 0:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
            self._reap_worker(running)  # the end of an init waits for every member of its namespace
            os.waitpid(running.pid, 0)
        if running.forward:
            running.forward.stop()
        for fd in (running.pidfd, running.terminal):
            if fd >= 0:
                os.close(fd)
        if running.attachment:
            running.attachment.detach()
        if running.group:
            running.group.remove()
        if running.slot_lock >= 0:
            os.close(running.slot_lock)
        if running.lock >= 0:
            os.close(running.lock)

    def close(self) -> None:
        """Give up what all containers shared."""
        network.close()

    def _init(self) -> int:
        """The init program on a file system of its own: nothing of the host's files is behind /proc/1/exe.

        Read-only, for the container's root owns the file where the user's own id is all that there is: without,
        one container could make it useless for all others (a memfd's mode can be changed through /proc/1/exe).
        """
        if self._init_fd < 0:
            for path in INIT_CANDIDATES:
                with suppress(FileNotFoundError), open(path, "rb") as file:
                    program = file.read()
                    break
            else:
                raise HostLacks("start a container", "its init, tini-static, is missing", "apt-get install tini")
            self._init_fd = mounts.lone_file("init", program, 0o555)
        return self._init_fd

    def _filter(self, profile: str) -> bytes:
        if profile == "bootstrap":
            return seccomp.compile_ownership() if self.ids.kind == "single" else b""
        if profile not in self._filters:
            self._filters[profile] = seccomp.compile_default(
                spec.CAPABILITIES, fake_ownership=self.ids.kind == "single"
            )
        return self._filters[profile]


def take_slot() -> tuple[int, int]:
    """A number that no other running container of this host has, for its ids and its address; and what holds it.

    That is a bound abstract socket (unix(7)): its name is unique in the network namespace in which the addresses
    have to be, whatever folders two helpers see, and is free again when the last descriptor is closed.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for number in range(1, SLOTS):
        try:
            holder.bind(f"\0workbench-slot-{number}")
            return number, holder.detach()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    holder.close()
    raise LaunchFailed("start a container", f"{SLOTS} containers run already", "stop some of them")


def _wait_for_end(pid: int, seconds: float = 5.0) -> None:
    """Until a process that is no child of ours has ended."""
    until = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            links.start_time(pid)
            time.sleep(0.005)


def settle(folder: str) -> bool:
    """``state.settle``, also after an end that no helper saw."""
    _take_down(folder)
    return state.settle(folder)


def remove(folder: str) -> None:
    """``state.remove``, also after an end that no helper saw. Raises Conflict while it runs, NotFound."""
    os.close(state.hold(folder))
    _take_down(folder)
    state.remove(folder)


def bury(folder: str, name: str) -> None:
    """Tidy up after a container whose launcher and helper were killed; its folder goes if it is unchanged."""
    _take_down(folder, name)
    try:
        lock = state.hold(folder)
    except (Conflict, FileNotFoundError):
        return
    try:
        if os.path.basename(folder).startswith(".gone-") or not os.path.exists(os.path.join(folder, state.STATE)):
            state.remove(folder)
        else:
            state.save(folder, state.load(folder) | state.KILLED_WITH_ITS_LAUNCHER)
            state.settle(folder)
    except (FileNotFoundError, NotFound):  # its helper lives, tidies up as well, and was quicker
        return
    finally:
        os.close(lock)


def _take_down(folder: str, name: str = "") -> None:
    """The processes, group and links of a container whose end is not on record.

    Its processes are gone already, killed with the helper (PR_SET_PDEATHSIG), unless they have talked their init
    out of that (ptrace(2)). name: its id, for a folder that may hold no state.
    """
    try:
        known = state.load(folder)
    except NotFound:
        if not name:
            raise
        known = {}
    if known.get("exit") and not name:
        return
    with suppress(OSError):
        if known.get("pid") and links.start_time(known["pid"]) == known.get("started"):
            os.kill(known["pid"], signal.SIGKILL)
            _wait_for_end(known["pid"])
    cgroup.Cgroup.forget(name or known["id"])
    network.sweep()
