"""What this host offers to containers, each point tried for real, with the one line that mends it.

Nothing is changed: what has to be tried (an overlay, a veth pair, a rule) is tried in namespaces of a
process that ends right away.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import ssl
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.linux import syscalls as sc
from workbench.linux import userns
from workbench.model import HostLacks, Problem, WorkbenchError, format_size

#: Below this many bytes a build is likely to fail (the base of Debian and pandas with its friends: 0.7 GB).
SCARCE = 2 << 30
#: Where programs of the system are, also for users whose PATH leaves them out.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One point of the examination.

    state: ``ok``; ``note`` (works, with something to know); ``missing`` (something needed fails).
    found: what was seen; remedy: the one line that mends it, empty when there is nothing to mend.
    """

    name: str
    state: State
    found: str
    remedy: str = ""

    def problem(self) -> Problem | None:
        """The same as a Problem, None when all is well."""
        return None if self.state == "ok" else Problem(self.name, self.found, self.remedy)


class _LacksError(Exception):
    """A check failed: (what was found, the remedy)."""


class _NoteError(Exception):
    """A check found something that is good to know: (what was found, the remedy)."""


def examine(home: Path) -> list[Check]:
    """Every check, in the order in which a launch would need them. home: the store's folder, made or not."""
    ids = userns.host_ids()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("kernel", _kernel),
        ("user namespaces", _user_namespaces),
        ("id range", _id_range),
        ("store", lambda: _store(home)),
        ("free space", lambda: _space(home)),
        ("overlay", lambda: _overlay(home)),
        ("system call filter", _seccomp),
        ("init", _init),
        ("limits", _limits),
        ("network", _network_root if ids.kind == "root" else _network_user),
        ("Debian bases", _mmdebstrap),
        ("certificates", _certificates),
    ]
    return [_run(name, check) for name, check in checks]


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", check())
    except _NoteError as note:
        return Check(name, "note", *note.args)
    except _LacksError as lacks:
        return Check(name, "missing", *lacks.args)
    except WorkbenchError as error:
        return Check(name, "missing", error.obstacle, error.remedy)
    except OSError as error:
        return Check(name, "missing", f"{error.strerror} {error.filename or ''}".strip())


def _install(package: str) -> str:
    """How a Debian package is had by this user."""
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {package}"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":" + SYSTEM_PATH)


def _kernel() -> str:
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    # 5.12: mount_setattr(2) and id-mapped mounts; 5.19: overlayfs over them, which root's containers need.
    floor = (5, 19) if os.geteuid() == 0 else (5, 12)
    if version < floor:
        raise _LacksError(f"Linux {release}", f"boot Linux {floor[0]}.{floor[1]} or later")
    return f"Linux {release}"


def _setting(path: str) -> str | None:
    try:
        return Path("/proc/sys", path).read_text().strip()
    except OSError:
        return None


def _user_namespaces() -> str:
    sudo = "" if os.geteuid() == 0 else "sudo "
    knobs = (
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user/max_user_namespaces", "0", "28633"),
    )
    try:
        _in_namespaces("user")
    except (OSError, HostLacks) as error:
        obstacle = error.obstacle if isinstance(error, HostLacks) else error.strerror
        for path, bad, good in knobs:
            if _setting(path) == bad:
                name = path.replace("/", ".")
                raise _LacksError(f"{name} is {bad}", f"{sudo}sysctl -w {name}={good}") from None
        raise _LacksError(
            f"the kernel refuses them ({obstacle})",
            "allow user namespaces to this user (in a container: start that one with fewer restrictions)",
        ) from None
    return "allowed"


def _id_range() -> str:
    ids = userns.host_ids()
    if ids.kind == "root":
        return f"root: each container gets {userns.IDS} ids of its own"
    name = os.environ.get("USER") or str(ids.uid)
    tools = [tool for tool in ("newuidmap", "newgidmap") if not _program(tool)]
    cost = "without it a container has one user only, and apt-get does not work inside"
    if tools:
        raise _NoteError(f"{' and '.join(tools)} not found: {cost}", _install("uidmap"))
    if ids.kind == "single":
        raise _NoteError(f"{name} has none in /etc/subuid and /etc/subgid: {cost}", _grant(name))
    for tool in ("newuidmap", "newgidmap"):
        path = _program(tool) or tool
        privileged = os.stat(path).st_mode & stat.S_ISUID or "security.capability" in os.listxattr(path)
        if not privileged:
            raise _LacksError(f"{path} is neither set-uid nor has it a capability", f"sudo chmod u+s {path}")
    count = min(ids.sub_uids[1], ids.sub_gids[1])
    if count < userns.IDS - 1:
        raise _NoteError(f"only {count} ids; packages that use id 65534 (nobody) need {userns.IDS}", _grant(name))
    return f"{count} ids from {ids.sub_uids[0]}"


def _grant(name: str) -> str:
    """The command that gives a user the first free range of sub-ids (subuid(5))."""
    start = 100000
    for file in ("/etc/subuid", "/etc/subgid"):
        with suppress(OSError, ValueError):
            for line in Path(file).read_text().splitlines():
                _, first, count = line.split(":")
                start = max(start, int(first) + int(count))
    ids = f"{start}-{start + userns.IDS - 1}"
    return f"sudo usermod --add-subuids {ids} --add-subgids {ids} {name}"


def _nearest(home: Path) -> Path:
    """The store, or the folder above it that exists already."""
    while not home.exists():
        home = home.parent
    return home


def _store(home: Path) -> str:
    there = _nearest(home)
    owner = there.stat().st_uid
    if there == home and owner != os.geteuid():
        raise _LacksError(
            f"{home} belongs to uid {owner}, not to uid {os.geteuid()}",
            "set WORKBENCH_HOME to a folder of yours",
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise _LacksError(f"{there} cannot be written", "set WORKBENCH_HOME to a folder of yours")
    return str(home) + ("" if there == home else " (made at the first use)")


def _space(home: Path) -> str:
    usage = shutil.disk_usage(_nearest(home))
    found = f"{format_size(usage.free)} free"
    if usage.free < SCARCE:
        raise _LacksError(found, "free some space; `jupyter workbench gc` removes what no name and no container needs")
    return found


def _overlay(home: Path) -> str:
    there = _nearest(home)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _LacksError(f"not tried: {there} cannot be written", "set WORKBENCH_HOME to a folder of yours")
    with _scratch(there) as folder:
        try:
            _in_namespaces("overlay", folder)
        except OSError as error:
            raise _LacksError(
                f"cannot be mounted over {there}: {error.strerror}",
                "set WORKBENCH_HOME to a folder on ext4, xfs, btrfs or tmpfs; on Linux before 5.11 update it",
            ) from None
    return f"works on the store's file system ({_file_system(there)})"


@contextmanager
def _scratch(parent: Path) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix=".doctor-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _file_system(path: Path) -> str:
    """The type of the file system of a path, from mountinfo (proc(5))."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return "unknown"


def _seccomp() -> str:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise _LacksError(
            "libseccomp.so.2 cannot be loaded: nothing is started without it", _install("libseccomp2")
        ) from None

    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    library.seccomp_version.restype = ctypes.POINTER(Version)
    version = library.seccomp_version().contents
    return f"libseccomp {version.major}.{version.minor}.{version.micro}"


def _init() -> str:
    path = _program("tini-static")
    if path is None:
        raise _LacksError("tini-static not found", _install("tini"))
    return path


def _limits() -> str:
    """Looks at files only: which hierarchy a group for containers could be made in (cgroups(7))."""
    from workbench.linux import cgroup

    kind, controllers = cgroup.available()
    lacking = [name for name in ("memory", "pids", "cpu") if name not in controllers]
    if kind == "none" or lacking:
        what = "no cgroup may be made here" if kind == "none" else f"cgroup {kind} without {', '.join(lacking)}"
        raise _NoteError(
            f"{what}: memory is limited for each process (rlimits), not for the container",
            "start from a session with a delegated cgroup: systemd-run --user --scope -p Delegate=yes ...",
        )
    return f"cgroup {kind}: {', '.join(sorted(controllers))}"


def _network_root() -> str:
    _in_namespaces("network")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise _NoteError("veth, bridge and nftables work; networks lan:NAME lack /dev/net/tun", "modprobe tun")
    return "veth, bridge and nftables work"


def _network_user() -> str:
    path = _program("pasta")
    if path is None:
        raise _LacksError("pasta not found: network `outbound` does not work", _install("passt"))
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _LacksError(
            f"/dev/net/tun cannot be opened ({error.strerror}): network `outbound` does not work",
            "sudo modprobe tun && sudo chmod 0666 /dev/net/tun",
        ) from None
    return path


def _mmdebstrap() -> str:
    path = _program("mmdebstrap")
    if path is None:
        raise _LacksError("mmdebstrap not found: `build` does not work", _install("mmdebstrap"))
    return path


def _certificates() -> str:
    named = os.environ.get("SSL_CERT_FILE")
    if named and not os.path.isfile(named):
        raise _LacksError(f"SSL_CERT_FILE names {named}, which is not there", "unset SSL_CERT_FILE, or mend it")
    default = ssl.get_default_verify_paths().cafile
    for path in (named, default, "/etc/ssl/certs/ca-certificates.crt"):
        if path and os.path.isfile(path):
            return path
    raise _NoteError("no bundle of certificates found: downloads by https will fail", _install("ca-certificates"))


# --- what is tried in a process of its own ------------------------------------------------------------------


def _in_namespaces(probe: str, *arguments: str) -> None:
    """Run ``_probe_<probe>`` where a container's root would be. Raises its OSError, or HostLacks."""
    reader, writer = os.pipe()
    with open(reader, "rb") as answer:
        try:
            process = userns.spawn("workbench.doctor:_probe", (writer,), [str(writer), probe, *arguments])
        finally:
            os.close(writer)
        raw = answer.read()
        process.wait()
    result = json.loads(raw) if raw else {"errno": 0, "strerror": f"the trial ended with {process.returncode}"}
    if "error" in result:
        raise WorkbenchError.from_dict(result)
    if result:
        raise OSError(result["errno"], result["strerror"], result.get("filename"))


def _probe(writer: str, probe: str, *arguments: str) -> None:
    """The trial's own side: an empty object for success, or the OSError as JSON."""
    answer: dict[str, Any] = {}
    try:
        if probe == "user":
            sc.unshare(sc.CLONE_NEWUSER)  # one below B, as each container has
        elif probe == "network":
            from workbench.containers import network

            sc.unshare(sc.CLONE_NEWNET)
            network.trial()
        else:
            _probe_overlay(*arguments)
    except WorkbenchError as error:
        answer = error.as_dict()
    except OSError as error:
        name = error.filename
        answer = {
            "errno": error.errno or 0,
            "strerror": error.strerror or str(error),
            "filename": name.decode() if isinstance(name, bytes) else name,
        }
    os.write(int(writer), json.dumps(answer).encode())


def _probe_overlay(folder: str) -> None:
    """An overlay with userxattr: read through, change, remove (a whiteout), make a folder (opaque)."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    os.chdir(folder)
    for name in ("lower", "upper", "work", "merged", "lower/folder"):
        os.mkdir(name)
    Path("lower/file").write_text("lower")
    options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr,redirect_dir=nofollow,metacopy=off,index=off"
    sc.mount("overlay", "merged", "overlay", 0, options)
    Path("merged/file").write_text("upper")
    os.rmdir("merged/folder")
    os.mkdir("merged/folder")
    os.unlink("merged/file")
    sc.umount2("merged")
    if os.stat("upper/file").st_rdev != 0 or os.getxattr("upper/folder", "user.overlay.opaque") != b"y":
        raise OSError(0, "it does not mark what was removed in the form that layers have")
    shutil.rmtree("work")  # overlayfs leaves a folder without permissions in there, root's here


def summary(checks: Sequence[Check]) -> str:
    """The closing line for people."""
    missing = sum(check.state == "missing" for check in checks)
    notes = sum(check.state == "note" for check in checks)
    if missing:
        return f"{missing} of {len(checks)} points need mending."
    return "This host can run containers." + (f" {notes} to know about." if notes else "")
