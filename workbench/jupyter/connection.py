"""Connection files: the client's, and the kernel's own with the socket folder as it is seen inside.

Format: https://jupyter-client.readthedocs.io/en/stable/kernels.html#connection-files
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.containers.spec import GUEST
from workbench.model import Image, InvalidInput, Kernel, LaunchFailed

#: The channels in the order of their numbers: the kernel's sockets are named ``k-1`` to ``k-5``.
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
#: The first part of the sockets' names, outside in the run folder and inside.
PREFIX = "k"
#: Their names, in the order of CHANNELS.
SOCKETS = tuple(f"{PREFIX}-{number}" for number in range(1, len(CHANNELS) + 1))
#: Where the run folder is seen inside.
INSIDE = "/run/workbench"
#: The kernel's connection file, outside in the run folder and inside.
NAME = "connection.json"

#: The TCP ports inside come after this one: nobody's, and below those that the system gives out by itself.
_PORTS = 17000
_CURVE_KEYS = ("curve_publickey", "curve_secretkey")


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A connection file that a client has written.

    ports: the number of each of CHANNELS. ip: an address, or for ipc the first part of the sockets' paths.
    """

    transport: str
    ip: str
    ports: tuple[int, ...]
    key: str
    signature_scheme: str
    curve: tuple[str, str] | None


def number(channel: str) -> int:
    """The "port" of a channel on the kernel's side."""
    return CHANNELS.index(channel) + 1


def read(path: str) -> ClientFile:
    """The client's connection file, read in place.

    (emacs-jupyter waits for its access time to change.) Raises InvalidInput.
    """
    tried = f"read the connection file {path}"
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read())
    except FileNotFoundError:
        raise InvalidInput(
            tried, "there is no such file", "this command is for Jupyter clients; see `jupyter workbench run`"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidInput(tried, str(error)) from None
    if not isinstance(data, dict):
        raise InvalidInput(tried, "it holds no JSON object")
    if "registration_port" in data:
        raise InvalidInput(
            tried,
            "the client wants the handshake of kernel protocol 5.5",
            "its kernelspec must not declare it",
        )
    transport = data.get("transport", "tcp")
    if transport not in ("tcp", "ipc"):
        raise InvalidInput(tried, f"its transport {transport!r} is unknown", "use tcp or ipc")
    try:
        ports = tuple(int(data[f"{channel}_port"]) for channel in CHANNELS)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(tried, f"it names no five ports ({error})") from None
    curve: tuple[str, str] | None = None
    if any(data.get(name) for name in _CURVE_KEYS):
        if not all(isinstance(data.get(name), str) and data[name] for name in _CURVE_KEYS):
            raise InvalidInput(tried, "it has one of the two CURVE keys only")
        curve = (data["curve_publickey"], data["curve_secretkey"])
    return ClientFile(
        transport,
        str(data.get("ip") or "127.0.0.1"),
        ports,
        str(data.get("key", "")),
        str(data.get("signature_scheme") or "hmac-sha256"),
        curve,
    )


def require_curve(kernel: Kernel, image: str) -> None:
    """Refuse a kernel that would answer an encrypted client in clear. Raises LaunchFailed."""
    if "curve" not in kernel.supported_encryption:
        raise LaunchFailed(
            f"start a kernel of {image}",
            "unencrypted: CURVE is required, and this image's kernel does not support it",
            "use ipykernel 7.3 or newer in its recipe",
        )


def guest_content(
    *, key: str, signature_scheme: str, kernel_name: str, curve: tuple[str, str] | None, transport: str = "ipc"
) -> dict[str, Any]:
    """What the kernel's own connection file says. transport: "tcp" for ports of its own loopback (``forwards``)."""
    tcp = transport == "tcp"
    content: dict[str, Any] = {f"{channel}_port": number(channel) + (_PORTS if tcp else 0) for channel in CHANNELS}
    content |= {
        "transport": transport,
        "ip": "127.0.0.1" if tcp else f"{INSIDE}/{PREFIX}",
        "key": key,
        "signature_scheme": signature_scheme,
        "kernel_name": kernel_name,
    }
    if curve:
        content |= dict(zip(_CURVE_KEYS, curve, strict=True))
    return content


def forwards(kernel: Kernel) -> tuple[tuple[str, int], ...]:
    """Names of sockets in the run folder that stand for TCP ports inside; none for a kernel that makes its own."""
    if kernel.transport != "tcp":
        return ()
    return tuple((name, _PORTS + number(channel)) for name, channel in zip(SOCKETS, CHANNELS, strict=True))


def write_guest(run_dir: str, content: Mapping[str, Any]) -> None:
    """Write the kernel's connection file into ``run_dir``, for the container's root only.

    The folder is writable from inside: an existing file is replaced, never followed or opened.
    """
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        owner = os.fstat(folder)
        staging = f".{NAME}.{os.getpid()}"
        remove(staging, folder)
        fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, owner.st_uid, owner.st_gid)
            os.write(fd, json.dumps(content, indent=1).encode())
        finally:
            os.close(fd)
        os.rename(staging, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def remove(name: str, folder: int) -> None:
    """Remove one file of an open folder, if it is there."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return


def clear_sockets(run_dir: str) -> None:
    """Remove what an earlier run of the kernel left, so that nobody connects to a dead socket's name."""
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in SOCKETS:
            try:
                if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.rmdir(name, dir_fd=folder)
                else:
                    os.unlink(name, dir_fd=folder)
            except OSError:
                continue
    finally:
        os.close(folder)


def has_magics(kernel: Kernel) -> bool:
    """Whether ``%container`` can be loaded into it: it is IPython's."""
    return kernel.language == "python" and any("ipykernel" in word for word in kernel.argv)


def command(kernel: Kernel) -> tuple[str, ...]:
    """The kernel's argv inside the container."""
    argv = tuple(word.replace("{connection_file}", f"{INSIDE}/{NAME}") for word in kernel.argv)
    return (*argv, "--ext=workbench_guest") if has_magics(kernel) else argv


#: The variables of the client's that a kernel sees: which notebook it works for, and nothing else.
PASSED_ENV = ("JPY_SESSION_NAME",)


def kernel_env(environ: Mapping[str, str], image: Image) -> dict[str, str]:
    """What of a client's environment reaches the kernel (never more: tokens live in environments), and where its
    Python finds what helps it."""
    passed = {name: environ[name] for name in PASSED_ENV if name in environ}
    if image.kernel is not None and has_magics(image.kernel):
        own = dict(image.env).get("PYTHONPATH", "")
        passed["PYTHONPATH"] = f"{own}:{GUEST}" if own else GUEST
    return passed
