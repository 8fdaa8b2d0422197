"""What runs inside a container, beside the kernel: standard library and IPython only, Python 3.8 and later.

Inside it this folder is seen as the package ``workbench_guest``; a kernel in no container has it by ``%load_ext
workbench``.
"""

from __future__ import annotations

from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Add ``%container`` to an IPython."""
    from .magics import load

    load(shell)
