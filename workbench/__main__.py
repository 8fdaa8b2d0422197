"""Where the command line and the Jupyter side, which do not import each other, are put together."""

from __future__ import annotations

import sys

from workbench import cli


def _kernelspecs() -> cli.Kernelspecs:
    from workbench.jupyter import kernelspecs

    return kernelspecs


def main() -> None:
    """``jupyter workbench`` and ``python -m workbench``."""
    sys.exit(cli.main(sys.argv[1:], _kernelspecs))


if __name__ == "__main__":
    main()
