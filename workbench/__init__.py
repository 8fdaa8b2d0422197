"""Workbench: each notebook kernel in its own container, each change a layer.

This module stays light: the helper process of every launch imports it.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext workbench`` in a kernel that runs in no container: ``%container`` asks the command line."""
    from workbench import guest

    guest.load_ipython_extension(shell)


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "workbench"}]


def _load_jupyter_server_extension(serverapp: Any) -> None:
    from workbench.jupyter import extension

    extension.load(serverapp)
