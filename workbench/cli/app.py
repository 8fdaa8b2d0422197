"""The same commands as a Jupyter application: with its configuration files and ``--Class.trait=value``."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from jupyter_core.application import JupyterApp
from traitlets.config.loader import ConfigFileNotFound

from workbench.cli import Kernelspecs
from workbench.cli.commands import execute
from workbench.cli.options import CONFIG_NAME, Parsed
from workbench.containers.client import HelperClient
from workbench.model import InvalidInput
from workbench.workbench import Workbench


class WorkbenchApp(JupyterApp):
    """Images, and containers over them, for notebook kernels."""

    name = "jupyter-workbench"
    description = __doc__
    classes = [Workbench]  # noqa: RUF012 - traitlets declares it so

    def _config_file_name_default(self) -> str:
        return CONFIG_NAME

    def generate_config_file(self, classes: Any = None) -> str:
        """Only what concerns Workbench."""
        return str(super().generate_config_file(classes or [Workbench]))

    def set_up(self, parsed: Parsed) -> None:
        """Files first, what the command line says over them. Raises InvalidInput."""
        self.parse_command_line(list(parsed.settings))
        from_command_line = deepcopy(self.cli_config)
        self.raise_config_file_errors = True
        if parsed.values.config:
            self.config_file = os.path.abspath(parsed.values.config)
            if not os.path.isfile(self.config_file):
                raise InvalidInput("read the configuration", f"{self.config_file} is not there")
        try:
            self.load_config_file(suppress_errors=False)
        except ConfigFileNotFound:
            pass
        except Exception as error:  # a configuration file is Python: anything may go wrong in it
            raise InvalidInput("read the configuration", str(error), "mend the file") from error
        self.update_config(from_command_line)


def launch(parsed: Parsed, kernelspecs: Callable[[], Kernelspecs], helper: HelperClient | None = None) -> int:
    """Execute a command with all of the configuration; its exit code."""
    app: Any = WorkbenchApp.instance()
    if getattr(parsed.values, "help_all", False):
        print("Settings: in a configuration file as c.Workbench.NAME = VALUE, or here as --Workbench.NAME=VALUE\n")
        print(Workbench.class_get_help())
        return 0
    if getattr(parsed.values, "generate_config", False):
        app.write_default_config()
        return 0
    app.set_up(parsed)
    return execute(parsed, kernelspecs, helper=helper, parent=app)
