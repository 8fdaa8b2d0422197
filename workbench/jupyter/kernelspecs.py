"""Kernelspecs of images: written when an image is named, removed with the name.

They go to the user's Jupyter data folder, the one place where every client looks, whatever environment it runs
in. ``argv`` is our launcher, for clients that start it themselves; ``metadata.kernel_provisioner`` serves those
built on jupyter_client.

Format: https://jupyter-client.readthedocs.io/en/stable/kernels.html#kernel-specs
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from traitlets.log import get_logger

import workbench
from workbench.model import KERNEL_PREFIX, Conflict, Image, InvalidInput

_MARK = "workbench"
_LOGOS = ("logo-svg.svg", "logo-64x64.png")
_STAGING = (".kernel.json.", ".logo-")
#: The variable by which a kernelspec tells the launcher what its kernels see besides: JSON, a list of texts.
MOUNTS = "WORKBENCH_KERNEL_MOUNTS"


def write(image_name: str, image: Image, *, logo: Path | None = None, mounts: Sequence[str] = ()) -> Path:
    """Write the kernelspec of an image's name; its folder.

    logo: an SVG or PNG in place of the language's own; mounts: host folders that its kernels see. Both come from a
    recipe on this machine, never from an image.

    Raises InvalidInput for an image without a kernel, Conflict where somebody else has the name.
    """
    kernel = image.kernel
    if kernel is None:
        raise InvalidInput(f"write a kernelspec for {image_name}", "the image has no kernel")
    folder = _folder() / kernel_name(image_name)
    if folder.exists() and not _is_ours(folder):
        raise Conflict(f"write the kernelspec {folder.name}", f"{folder} is not ours", "remove or rename it")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name in _LOGOS or old.name.startswith(_STAGING):
            with suppress(FileNotFoundError):
                old.unlink()
    logo = logo or _logo(kernel.language)
    if logo is not None:
        name = "logo-svg.svg" if logo.suffix == ".svg" else "logo-64x64.png"
        _replace(folder / name, logo.read_bytes())
    # last, since a folder counts as a kernelspec from here on
    _replace(folder / "kernel.json", json.dumps(_content(image_name, image, mounts), indent=1).encode() + b"\n")
    return folder


def offer(image_name: str, image: Image | None) -> None:
    """A card for a name that was just given, if there is an image with a kernel. That its folder is somebody else's
    takes nothing back: the image has its name, and the log says what it has not."""
    if image is None or image.kernel is None:
        return
    try:
        write(image_name, image)
    except Conflict as conflict:
        get_logger().warning("%s has no kernel in the launcher: %s", image_name, conflict)


def remove(image_name: str) -> None:
    """Remove the kernelspec of a name, if there is one of ours."""
    folder = _folder() / kernel_name(image_name)
    if not folder.exists() or not _is_ours(folder):
        return
    with suppress(FileNotFoundError):
        (folder / "kernel.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)


def kernel_name(image_name: str) -> str:
    """``wb-<name>``, the tag at its end unless it is ``latest``; only characters that a kernelspec may have."""
    name, _, tag = image_name.partition(":")
    parts = [name.replace("/", "-"), *([tag.lower()] if tag not in ("", "latest") else [])]
    return KERNEL_PREFIX + "-".join(parts)


def written() -> Iterator[tuple[str, dict[str, Any]]]:
    """The kernelspecs of ours that are there: name and content."""
    try:
        folders = sorted(_folder().iterdir())
    except OSError:
        return
    for folder in folders:
        known = _read(folder)
        if known is not None and _MARK in known.get("metadata", {}):
            yield folder.name, known


def _content(image_name: str, image: Image, mounts: Sequence[str]) -> dict[str, Any]:
    kernel = image.kernel
    assert kernel is not None
    config: dict[str, Any] = {"image": image_name}
    display_name = kernel.display_name or image_name
    own = kernel_name(image_name)
    if any(known.get("display_name") == display_name for name, known in written() if name != own):
        display_name = f"{display_name} [{image_name}]"  # two cards of one name say nothing
    if mounts:
        config["mounts"] = list(mounts)
    content: dict[str, Any] = {
        "argv": [*_launcher(), image_name, "{connection_file}"],
        "display_name": display_name,
        "language": kernel.language,
        # A client that starts argv itself signals processes; one message is surer where the kernel knows it.
        "interrupt_mode": kernel.interrupt_mode,
        "metadata": {
            "kernel_provisioner": {"provisioner_name": "workbench", "config": config},
            _MARK: {"image": image.id},
            "supported_encryption": list(kernel.supported_encryption),
            "debugger": kernel.language == "python",
        },
        # kernel_protocol_version stays out: from 5.5 on Positron would want the handshake of a registration file
    }
    env = {MOUNTS: json.dumps(list(mounts))} if mounts else {}  # the launcher sees the command line and this
    if home := _unusual_home():
        config["home"] = home
        env["WORKBENCH_HOME"] = home
    if env:
        content["env"] = env
    return content


def _unusual_home() -> str:
    """The store, when clients that know nothing of our environment could not find it."""
    home = os.environ.get("WORKBENCH_HOME", "")
    return os.path.abspath(home) if home else ""


def _launcher() -> list[str]:
    """Our launcher by its absolute path, not named python (a client might put another interpreter in its place)."""
    for folder in (os.path.dirname(sys.executable), sysconfig.get_path("scripts")):
        path = os.path.join(folder, "workbench-kernel")
        if os.access(path, os.X_OK):
            return [path]
    if found := shutil.which("workbench-kernel"):
        return [os.path.abspath(found)]
    return [sys.executable, "-P", "-m", "workbench.jupyter.launcher"]  # not installed: a checkout on PYTHONPATH


def _folder() -> Path:
    from jupyter_core.paths import jupyter_data_dir

    return Path(jupyter_data_dir()) / "kernels"


def _logo(language: str) -> Path | None:
    if not re.fullmatch(r"[\w+#-]+", language):  # an image says it, and it is a folder's name here
        return None
    package = Path(workbench.__file__).parent
    for root in (package / "kernels", package.parent / "kernels"):  # installed, or in a checkout
        path = root / language.lower() / "logo-svg.svg"
        if path.is_file():
            return path
    return None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / "kernel.json").read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a kernelspec of ours, or one that was cut off while it was written or removed."""
    known = _read(folder)
    if known is not None:
        return _MARK in known.get("metadata", {})
    return all(name in _LOGOS or name.startswith(_STAGING) for name in os.listdir(folder))


def _replace(path: Path, content: bytes) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_bytes(content)
        os.replace(staging, path)
    except BaseException:
        with suppress(OSError):
            staging.unlink()
        raise
