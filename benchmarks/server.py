"""A process that keeps kernels as a server does, for the figure of memory: ``python -m benchmarks.server``.

Each line on stdin names a kernelspec; one kernel of it is started and kept. Its pid, then the container's init (or
the kernel's pid where there is none), is printed. At the end of stdin all are ended.
"""

from __future__ import annotations

import os
import sys

from benchmarks.kernels import Client, managed


def main() -> None:
    """See above."""
    managers = []
    for line in sys.stdin:
        manager = managed(line.strip(), os.getcwd())
        client = Client(manager.get_connection_info())
        client.result()
        client.close()
        managers.append(manager)
        container = getattr(manager.provisioner, "_container", None)
        print(os.getpid(), container.pid if container else manager.provisioner.pid, flush=True)
    for manager in managers:
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
