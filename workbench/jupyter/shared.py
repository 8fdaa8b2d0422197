"""The `Workbench` of this process: one, and so one helper, for all kernels and for the REST API."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.model import InvalidInput

if TYPE_CHECKING:
    from traitlets.config import Config

    from workbench.workbench import Workbench

_CONFIG_NAME = "jupyter_workbench_config"
_known: dict[tuple[int, str], Workbench] = {}


def workbench(config: Mapping[str, Any] | None = None, home: str = "") -> Workbench:
    """The Workbench for this configuration; made when first asked for.

    config: the application's, which goes over ``jupyter_workbench_config.{py,json}``. home: from a kernelspec.
    """
    from traitlets.config import Config

    from workbench.workbench import Workbench

    merged = Config()
    if files := config_files():
        merged.merge(_load(files))
    if config:
        merged.merge(config)
    section = merged.get("Workbench", {})
    key = os.getpid(), json.dumps([home, section, os.environ.get("WORKBENCH_HOME")], default=repr, sort_keys=True)
    if key not in _known:
        arguments: dict[str, Any] = {"home": home} if home else {}
        _known[key] = Workbench(config=merged, **arguments)
    return _known[key]


def config_files() -> list[str]:
    """The configuration files that exist, weakest first (as JupyterApp has them)."""
    from jupyter_core.paths import jupyter_config_path

    return [
        path
        for folder in reversed(jupyter_config_path())
        for suffix in (".json", ".py")
        if os.path.exists(path := os.path.join(folder, _CONFIG_NAME + suffix))
    ]


def _load(files: list[str]) -> Config:
    from traitlets.config import Config
    from traitlets.config.loader import JSONFileConfigLoader, PyFileConfigLoader

    merged = Config()
    for path in files:
        loader = PyFileConfigLoader if path.endswith(".py") else JSONFileConfigLoader
        try:
            merged.merge(loader(os.path.basename(path), os.path.dirname(path)).load_config())
        except Exception as error:  # a configuration file is Python: anything may go wrong in it
            raise InvalidInput("read the configuration", f"{path}: {error}", "mend the file") from error
    return merged
