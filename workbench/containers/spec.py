"""What a container is to be: pure data. Every decision of policy is taken here, and only here.

The defaults are none looser than Podman's (capabilities(7), the runtime spec's masked paths); nothing that an
image says can widen them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from workbench.linux import mounts
from workbench.linux import syscalls as sc
from workbench.model import InvalidInput, Limits, Network, Settings
from workbench.model import Mount as HostMount

#: Podman's eleven.
CAPABILITIES = frozenset({
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP",
    "SETUID", "SYS_CHROOT",
})  # fmt: skip

HIDDEN = (
    "/proc/acpi", "/proc/asound", "/proc/dynamic_debug", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/key-users", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block", "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

#: Inside: where the container's own folder of the host (sockets, connection file) and the host's settings are.
RUN = "/run/workbench"
HOST_SETTINGS = RUN + "/host"
#: The folder of what helps a kernel (``guest/``), on its Python's path.
GUEST = HOST_SETTINGS + "/guest"

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_PROCESSES = 4096

Profile = Literal["default", "bootstrap"]


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """Everything that a helper needs to know to start a container.

    layers: host folders, highest first; forwards: names of sockets in the run folder, each with the TCP port on the
    container's loopback that it stands for; names: by which members of its named network find it; hidden: paths inside
    that are covered; fixed: paths inside that cannot be changed; ``profile`` "bootstrap" is for Debian's own bootstrap
    tool over no image at all: full rights in its own user namespace.
    """

    id: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: str
    layers: tuple[str, ...]
    hostname: str
    names: tuple[str, ...] = ()
    mounts: tuple[HostMount, ...] = ()
    hidden: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    forwards: tuple[tuple[str, int], ...] = ()
    limits: Limits = field(default_factory=Limits)
    network: Network = "outbound"
    terminal: bool = False
    profile: Profile = "default"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; ``from_json`` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ContainerSpec:
        """The spec that ``to_json`` wrote."""
        fields = dict(data)
        fields["mounts"] = tuple(HostMount(**m) for m in data["mounts"])
        fields["limits"] = Limits(**data["limits"])
        for name in ("argv", "layers", "hidden", "fixed", "names"):
            fields[name] = tuple(data.get(name, ()))
        for name in ("env", "texts"):
            fields[name] = tuple((str(k), str(v)) for k, v in data[name])
        fields["forwards"] = tuple((str(name), int(number)) for name, number in data.get("forwards", ()))
        return ContainerSpec(**fields)

    def capabilities(self) -> frozenset[str]:
        """What the main process may do in its own user namespace."""
        return frozenset(sc.CAPABILITIES) if self.profile == "bootstrap" else CAPABILITIES


def environment(
    image: Iterable[tuple[str, str]], settings: Settings, explicit: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """The whole environment inside: defaults, the image's, the host's settings, what was asked for; last wins.

    Nothing is taken from the caller's own environment.
    """
    env = {"PATH": DEFAULT_PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8"}
    env.update(image)
    env.update(settings.env)
    env.update(explicit)
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidInput("set the environment", f"{name!r} is no name of a variable", "leave it out")
    return tuple(sorted(env.items()))


def working_folder(folder: str, *, homes: Iterable[str]) -> list[HostMount]:
    """The mount of the folder that a kernel works in: it, at the same path, never above it; none for ``/``.

    Raises InvalidInput for a folder that a container has of its own instead, and for a link that leads to what is
    hidden in a home: a kernel could have put it there for others.
    """
    tried, remedy = "mount the working folder", "work in another folder"
    named = os.path.abspath(folder)
    try:
        folder = os.path.realpath(folder)
    except OSError as error:  # it is changing while one looks
        raise InvalidInput(tried, f"{folder}: {error.strerror}", remedy) from None
    if folder == "/":
        return []
    own = any(_within(folder, path) for path in _OWN) and not folder.startswith("/dev/shm/")
    if own or folder in _OTHERS:
        raise InvalidInput(tried, f"{folder} is a part of the system", remedy)
    if named != folder and any(_within(folder, path) for home in homes for path in _dot_files(os.path.realpath(home))):
        raise InvalidInput(tried, f"{named} is a link to {folder}", remedy)
    return [HostMount(folder, folder)]


def guard(
    mounted: Iterable[HostMount], *, homes: Iterable[str], private: Iterable[str], programs: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Paths inside to hide, and paths that cannot be changed, in what is mounted.

    homes: home folders of the host, whose dot-files stay unseen unless they are mounted by name; private: the
    store, tokens, sockets; programs: where the host's user runs programs from, which a kernel could change
    otherwise. Raises InvalidInput for a mount of something private.
    """
    mounted = list(mounted)
    if not mounted:
        return [], []
    named = {mount.target for mount in mounted}
    closed = set(map(os.path.realpath, private))
    near = {
        home for home in set(map(os.path.realpath, homes)) - {"/"}
        if any(_within(home, mount.source) or _within(mount.source, home) for mount in mounted)
    }  # fmt: skip
    dotted = {path for home in near for path in _dot_files(home)}
    hidden, fixed = set(), set()
    for mount in mounted:

        def inside(path: str, mount: HostMount = mount) -> str:
            return mount.target + path[len(mount.source.rstrip("/")) :]

        if any(_within(mount.source, path) for path in closed):
            raise InvalidInput(
                f"mount {mount.source}", "it belongs to Workbench or Jupyter itself", "work in another folder"
            )
        hidden |= {inside(path) for path in closed if _within(path, mount.source)}
        hidden |= {inside(path) for path in dotted if _within(path, mount.source)} - named
        for path in set(map(os.path.realpath, programs)) - {"/", "/usr", "/usr/local"}:
            if _within(path, mount.source):
                fixed.add(inside(path))
            elif _within(mount.source, path):
                fixed.add(mount.target)
    return sorted(hidden), sorted(fixed)


def _dot_files(home: str) -> list[str]:
    try:
        return [os.path.join(home, name) for name in os.listdir(home) if name.startswith(".")]
    except OSError:  # a home that its owner keeps closed is closed inside as well
        return []


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


#: What a container has of its own: neither these nor what is below can be worked in.
_OWN = ("/proc", "/sys", "/dev", RUN)
_RESERVED = ("/", "/proc", "/sys", "/dev", "/run", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/tmp", "/var")
#: Of these, those that nobody works in, with what /bin and its kin are links to.
_OTHERS = {*_RESERVED, "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/boot"} - {"/tmp"}


def parse_mount(text: str) -> HostMount:
    """``SRC[:DST][:ro]`` as a mount. Raises InvalidInput for what cannot be meant."""
    parts = text.split(":")
    read_only = parts[-1] in ("ro", "rw") and parts.pop() == "ro"
    if not parts or len(parts) > 2 or not parts[0]:
        raise InvalidInput("read a mount", f"{text!r}", "write it as SOURCE[:TARGET][:ro]")
    try:
        source = os.path.realpath(os.path.expanduser(parts[0]))
    except OSError as error:
        raise InvalidInput("read a mount", f"{parts[0]}: {error.strerror}", "name a folder of your own") from None
    target = os.path.normpath(parts[1]) if len(parts) == 2 else source
    if not os.path.exists(source):
        raise InvalidInput("read a mount", f"{source} does not exist", "name a folder or file of the host")
    if not target.startswith("/") or target in _RESERVED or source == "/":
        raise InvalidInput("read a mount", f"{text!r} would cover a part of the system", "choose another target")
    return HostMount(source, target, read_only)


def plan(spec: ContainerSpec, *, writable: str, run_dir: str, id_kind: str) -> list[mounts.Mount]:
    """The steps that lay out the root, in order.

    writable: host folder with upper/ and work/; run_dir: the container's own folder, at RUN inside;
    id_kind: ``HostIds.kind``.
    """
    binds: list[mounts.Bind | mounts.Copy] = [
        mounts.Copy(m.source, m.target)
        if _within(m.target, HOST_SETTINGS)
        else mounts.Bind(m.source, m.target, m.read_only, directory=os.path.isdir(m.source))
        for m in spec.mounts
    ]
    points = [(path, True) for path in ("/proc", "/sys", "/dev", "/run", "/tmp")]
    points += [("/etc/hostname", False), ("/etc/hosts", False), ("/etc/resolv.conf", False)]
    points += [(b.path, b.directory) for b in binds if isinstance(b, mounts.Bind) and not _within(b.path, RUN)]
    nosuid = sc.MS_NOSUID
    gid = ",gid=5" if id_kind != "single" else ""
    steps: list[mounts.Mount] = [
        mounts.Overlay(spec.layers, writable, tuple(points)),
        mounts.FileSystem("proc", "/proc"),
        _sys(spec.network),
        mounts.FileSystem("tmpfs", "/dev", "mode=755,size=64k", sc.MS_NOSUID | sc.MS_NOEXEC),
        *(mounts.Bind(f"/dev/{name}", f"/dev/{name}", directory=False, device=True) for name in DEVICES),
        mounts.FileSystem("devpts", "/dev/pts", f"newinstance,ptmxmode=0666,mode=0620{gid}", nosuid | sc.MS_NOEXEC),
        mounts.FileSystem("tmpfs", "/dev/shm", "mode=1777"),
        mounts.FileSystem("mqueue", "/dev/mqueue"),
        mounts.Links("/dev", (
            ("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"), ("core", "/proc/kcore"),
        )),
        mounts.FileSystem("tmpfs", "/run", "mode=755", sc.MS_NOSUID | sc.MS_NODEV),
        mounts.Bind(run_dir, RUN),
        mounts.FileSystem("tmpfs", HOST_SETTINGS, "mode=755,size=1m"),
        *binds,
        *(mounts.Text(path, content) for path, content in spec.texts),
    ]  # fmt: skip
    steps += [mounts.Pin(path) for path in _above((*spec.hidden, *spec.fixed), spec.mounts)]
    steps += [mounts.ReadOnly(path) for path in spec.fixed]
    steps += [mounts.Hide(path) for path in spec.hidden]
    if spec.profile == "default":
        steps += [mounts.ReadOnly(path) for path in READ_ONLY]
        steps += [mounts.Hide(path) for path in HIDDEN]
    return steps


def _above(paths: Iterable[str], mounted: Iterable[HostMount]) -> list[str]:
    """The folders between mounts and what is guarded in them, outermost first.

    Moving one away would leave its name free, and the host would then find the container's files by it.
    """
    found = set()
    for mount in mounted:
        for path in paths:
            above = os.path.dirname(path)
            while _within(above, mount.target) and above != mount.target:
                found.add(above)
                above = os.path.dirname(above)
    return sorted(found)


def _sys(network: Network) -> mounts.Mount:
    """sysfs shows the network's namespace; without one of its own, the host's is bound (user_namespaces(7))."""
    if network == "host":
        return mounts.Bind("/sys", "/sys", read_only=True)
    return mounts.FileSystem("sysfs", "/sys", "", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC | sc.MS_RDONLY)


def label(text: str) -> str:
    """A text as a name in a network (RFC 1123, 2.1); empty when nothing of it can be one."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:63].strip("-")


def describe(spec: ContainerSpec, steps: Iterable[mounts.Mount]) -> str:
    """A launch as a plan, for ``--debug``."""
    lines = [f"container {spec.id}: {json.dumps(list(spec.argv))} in {spec.cwd}"]
    lines += ["  mount    " + step.describe() for step in steps]
    lines.append("  limits   " + json.dumps(asdict(spec.limits)))
    lines.append(f"  network  {spec.network}")
    lines.append("  keep     " + " ".join(sorted(spec.capabilities())).lower())
    lines.append("  filter   " + ("none (bootstrap)" if spec.profile == "bootstrap" else "seccomp, default profile"))
    return "\n".join(lines)
