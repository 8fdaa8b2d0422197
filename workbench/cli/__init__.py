"""``jupyter workbench``: the command line, thin over ``Workbench``.

``options`` declares every command (argparse, nothing heavy); ``app`` is the JupyterApp with its configuration
files; ``commands`` and ``run`` do the work; ``show`` prints it.

``jupyter workbench run`` is to be quicker than its peers: modules are imported only when they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from workbench.model import WorkbenchError, printable

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.model import Image


class Kernelspecs(Protocol):
    """What the Jupyter side offers to the command line; handed in, since neither imports the other."""

    def write(
        self, image_name: str, image: Image, *, logo: Path | None = None, mounts: Sequence[str] = ()
    ) -> Path:  # fmt: skip
        """Make the kernelspec of a name; the folder that it is in."""

    def remove(self, image_name: str) -> None:
        """Remove the kernelspec of a name, if there is one."""


def main(argv: Sequence[str], kernelspecs: Callable[[], Kernelspecs]) -> int:
    """Run one command; the exit code (0 well, 1 a named error, 2 usage, else the command's own)."""
    from workbench.cli import options

    debug = False
    try:
        parsed = options.parse(argv)
        debug = parsed.debug
        helper = None
        if parsed.name == "run":
            from workbench.cli import early

            helper = early.helper(parsed.values.network or "outbound")
        try:
            if parsed.plain and not options.config_files():
                from workbench.cli.commands import execute

                return execute(parsed, kernelspecs, helper=helper)
            from workbench.cli.app import launch

            return launch(parsed, kernelspecs, helper)
        finally:
            if helper is not None:
                helper.close()
    except WorkbenchError as error:
        if debug:
            raise
        print(f"jupyter workbench: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever reads has seen enough; see __main__.py
        raise
    except OSError as error:
        if debug:
            raise
        named = f" ({error.filename})" if error.filename else ""
        print(f"jupyter workbench: {printable(f'{error.strerror or error}{named}')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
