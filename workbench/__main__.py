"""Where the command line and the Jupyter side, which do not import each other, are put together."""

from __future__ import annotations

import os
import sys

from workbench import cli


def _kernelspecs() -> cli.Kernelspecs:
    from workbench.jupyter import kernelspecs

    return kernelspecs


def main() -> None:
    """``jupyter workbench`` and ``python -m workbench``.

    Ends without taking the interpreter apart: everything was closed, and that alone takes 10 ms.
    """
    code = 141
    try:
        code = cli.main(sys.argv[1:], _kernelspecs)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        code = code or 141
    os._exit(code)


if __name__ == "__main__":
    main()
