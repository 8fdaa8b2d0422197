"""An image's config: ``model.Image`` to and from the JSON of the OCI image spec (``config.md``).

What is ours stands in labels, so that every OCI tool carries it unchanged. The bytes are deterministic:
the image's ID is their sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from workbench.model import NETWORKS, Corrupt, Image, InvalidInput, Kernel, Limits, Network

KERNEL_LABEL = "org.jupyter.workbench.kernel"
LIMITS_LABEL = "org.jupyter.workbench.limits"
NETWORK_LABEL = "org.jupyter.workbench.network"
#: The image that a snapshot was taken over.
PARENT_LABEL = "org.jupyter.workbench.parent"

#: A digest as the OCI spec writes it; only sha256 is in use.
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Larger than any config in use; registries refuse manifests over 4 MiB.
MAX_SIZE = 4 << 20

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

_NONE = Limits()

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]


class _RootFs(msgspec.Struct):
    type: str
    diff_ids: list[Digest]


class _Run(msgspec.Struct, rename="pascal"):
    # Docker writes null where the spec leaves a field out.
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None


class _Config(msgspec.Struct):
    os: str
    architecture: str
    rootfs: _RootFs
    config: _Run | None = None
    created: str | None = None


def digest_of(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encode(
    *,
    diff_ids: Iterable[str],
    env: Iterable[tuple[str, str]] | Mapping[str, str] = (),
    cmd: Sequence[str] = (),
    working_dir: str = "/",
    kernel: Kernel | None = None,
    limits: Limits = _NONE,
    network: Network | None = None,
    parent: str = "",
    created: str = "",
    labels: Iterable[tuple[str, str]] | Mapping[str, str] = (),
    history: Iterable[Mapping[str, Any]] = (),
    architecture: str = "",
) -> bytes:
    """The config of an image as JSON bytes, the same for the same arguments.

    created: RFC 3339 (``2025-01-31T00:00:00Z``) or empty; history: the spec's history entries, lowest layer
    first; architecture: as Go names it, by default this machine's. Raises InvalidInput.
    """
    layers = list(diff_ids)
    for layer in layers:
        if not DIGEST.fullmatch(layer):
            raise InvalidInput("write an image's config", f"{layer!r} is no layer digest", "give sha256:<64 hex>")
    pairs = list(env.items() if isinstance(env, Mapping) else env)
    for name, value in pairs:
        if not name or "=" in name or "\0" in name + value:
            raise InvalidInput("write an image's config", f"{name!r} cannot name an environment variable")
    marks = dict(labels)
    if kernel is not None:
        marks[KERNEL_LABEL] = _compact(kernel)
    if limits != _NONE:
        marks[LIMITS_LABEL] = _compact(limits)
    if network is not None:
        marks[NETWORK_LABEL] = network
    if parent:
        marks[PARENT_LABEL] = parent
    run: dict[str, Any] = {"Env": [f"{name}={value}" for name, value in pairs], "WorkingDir": working_dir}
    if cmd:
        run["Cmd"] = list(cmd)
    if marks:
        run["Labels"] = marks
    document: dict[str, Any] = {
        "architecture": architecture or _ARCHITECTURES.get(os.uname().machine, os.uname().machine),
        "config": run,
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": layers},
    }
    if created:
        document["created"] = created
    if entries := [dict(entry) for entry in history]:
        document["history"] = entries
    return msgspec.json.encode(document, order="sorted")


def decode(data: bytes) -> Image:
    """The image that a config describes; one that is not ours has no kernel.

    Raises Corrupt for bytes that are no OCI image config, InvalidInput for an image of another system or
    with a kernel label that says nothing.
    """
    try:
        document = msgspec.json.decode(data, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt("read an image's config", str(error), "build or pull the image again") from None
    if document.os != "linux" or document.rootfs.type != "layers":
        raise InvalidInput(
            "read an image's config",
            f"it is an image of {document.os} with a root file system of {document.rootfs.type!r}",
            "take one for linux",
        )
    run = document.config or _Run()
    labels = dict(run.labels or {})
    kernel = _ours(labels.pop(KERNEL_LABEL, None), Kernel, KERNEL_LABEL)
    limits = _ours(labels.pop(LIMITS_LABEL, None), Limits, LIMITS_LABEL)
    network = labels.pop(NETWORK_LABEL, None)
    if network is not None and network not in NETWORKS:  # no stranger's image joins a network of the user's
        raise InvalidInput(
            "read an image's config", f"its label {NETWORK_LABEL} is {network!r}", "build the image again"
        )
    parent = labels.pop(PARENT_LABEL, "")
    if parent and not DIGEST.fullmatch(parent):
        raise InvalidInput("read an image's config", f"its label {PARENT_LABEL} is no image ID", "take it again")
    pairs = (entry.partition("=") for entry in run.env or ())
    return Image(
        id=digest_of(data),
        diff_ids=tuple(document.rootfs.diff_ids),
        env=tuple((name, value) for name, equals, value in pairs if name and equals),
        cmd=(*(run.entrypoint or ()), *(run.cmd or ())),
        working_dir=run.working_dir or "/",
        kernel=kernel,
        limits=limits or _NONE,
        network=network,
        parent=parent,
        created=document.created or "",
        labels=tuple(sorted(labels.items())),
    )


def _compact(value: Kernel | Limits) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _ours(text: str | None, kind: type[Any], label: str) -> Any:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=kind, strict=True)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(
            "read an image's config", f"its label {label} is malformed ({error})", "build the image again"
        ) from None
