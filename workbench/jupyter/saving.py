"""A notebook that is saved is told its environment: within the editor's own save, so that nothing races it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from workbench.history import notebooks
from workbench.jupyter import shared
from workbench.jupyter.provisioner import WorkbenchProvisioner


def register(serverapp: Any) -> None:
    """Add the hook to a server's contents manager."""
    contents = serverapp.contents_manager
    if hasattr(contents, "register_pre_save_hook") and hasattr(contents, "_get_os_path"):
        contents.register_pre_save_hook(_Hook(serverapp))


class _Hook:
    """``pre_save_hook`` (jupyter_server, "File save hooks")."""

    def __init__(self, serverapp: Any) -> None:
        self._server = serverapp

    def __call__(self, model: dict[str, Any], path: str, contents_manager: Any, **_: Any) -> None:
        if model.get("type") != "notebook" or not isinstance(model.get("content"), dict):
            return
        file = contents_manager._get_os_path(path.strip("/"))
        provisioner = self._provisioner(path.strip("/"))
        text = b""
        with suppress(OSError), open(file, "rb") as old:
            text = old.read()
        if provisioner is None and f'"{notebooks.KEY}"'.encode() not in text:
            return  # nothing is known: what a notebook says that is uploaded or copied stays
        head = provisioner.head if provisioner else None
        before: dict[str, Any] = {}
        with suppress(ValueError):
            before = json.loads(text)
        ran = provisioner.ran if provisioner else {}
        notebooks.annotate(model["content"], before, head=head, running=provisioner is not None, ran=ran)
        if head is not None:
            notebooks.pin(shared.workbench(self._server.config).home, os.path.abspath(file), head.image)

    def _provisioner(self, path: str) -> WorkbenchProvisioner | None:
        """Of the kernel that a notebook's session has now, if it runs in a container."""
        sessions = self._server.session_manager
        row = sessions.cursor.execute("SELECT kernel_id FROM session WHERE path=?", (path,)).fetchone()
        if row is None or row["kernel_id"] not in self._server.kernel_manager:
            return None
        found = self._server.kernel_manager.get_kernel(row["kernel_id"]).provisioner
        return found if isinstance(found, WorkbenchProvisioner) else None
