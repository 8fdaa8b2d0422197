"""Facts of the machine that a snapshot was taken on: they may explain why numbers differ elsewhere."""

from __future__ import annotations

import os
import platform
from contextlib import suppress

#: Of an image, where its facts stand.
LABEL = "org.jupyter.workbench.machine"
#: Of the processor's features those that numerical libraries choose their code by.
_FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile",
    "asimd", "sve", "sve2",
)  # fmt: skip
_NVIDIA = "/proc/driver/nvidia/version"


def facts() -> dict[str, str]:
    """``architecture``, ``processor``, ``features``, ``kernel`` and, where there is one, ``gpu_driver``."""
    processor, flags = "", set()
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                processor = processor or value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    found = {
        "architecture": platform.machine(), "processor": processor,
        "features": " ".join(name for name in _FEATURES if name in flags), "kernel": os.uname().release,
    }  # fmt: skip
    with suppress(OSError), open(_NVIDIA) as file:
        found["gpu_driver"] = file.readline().removeprefix("NVRM version:").strip()
    return {key: value for key, value in found.items() if value}
