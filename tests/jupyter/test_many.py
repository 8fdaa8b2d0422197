"""Fifty kernels started at once: each comes up, in a container of its own, and all of them go."""

from __future__ import annotations

import asyncio
import resource
import time

import pytest
import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

from workbench.jupyter import shared

COUNT = 50


async def one(folder: str, manager: AsyncKernelManager) -> str:
    await manager.start_kernel(cwd=folder)
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=200)
        text = ""

        def take(message):
            nonlocal text
            text += message["content"].get("text", "")

        await client.execute_interactive("import platform; print(platform.node())", output_hook=take, timeout=200)
        return text.strip()
    finally:
        client.stop_channels()


@pytest.mark.alone
def test_fifty_at_once(image, tmp_path):
    async def all_of_them() -> list[str]:
        context = zmq.asyncio.Context()  # one for all, as a server has it
        managers = [AsyncKernelManager(kernel_name="wb-python", context=context) for _ in range(COUNT)]
        try:
            names = await asyncio.gather(*(one(str(tmp_path), each) for each in managers), return_exceptions=True)
            assert [entry for entry in names if isinstance(entry, BaseException)] == []
            assert len(shared.workbench().ps()) == COUNT
            return names
        finally:
            await asyncio.gather(*(each.shutdown_kernel(now=True) for each in managers if each.has_kernel))
            context.destroy(linger=0)  # of one that failed, sockets are open still: ``term`` would wait for them

    # As a server does (ServerApp.min_open_files_limit); a process has 1,024 descriptors at first.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 4096 else 4096, hard))
    began = time.monotonic()
    try:
        names = asyncio.run(all_of_them())
        assert len(set(names)) == COUNT
        assert shared.workbench().ps(True) == []
    finally:
        for bench in shared._known.values():
            bench.close()
        shared._known.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"{COUNT} kernels in {time.monotonic() - began:.1f} s")
