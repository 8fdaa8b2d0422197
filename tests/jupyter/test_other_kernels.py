"""Kernels of other languages: R's, which speaks only TCP and is relayed, and a shell's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from jupyter_client.blocking import BlockingKernelClient

from tests.conftest import TOP
from tests.jupyter.clients import argv_kernel, gone, run
from tests.jupyter.conftest import Start


@pytest.fixture
def built(cli, image: str):
    def build(name: str) -> str:
        done = cli("build", str(TOP / "recipes" / name), "--refresh", timeout=280)
        assert done.code == 0, done.err
        return f"wb-{name}"

    return build


def listening() -> set[str]:
    """TCP ports of this host that something of this account listens at (proc_net_tcp(5))."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[7]) == os.geteuid():
                found.add(fields[1])
    return found


def test_r_is_relayed_from_its_own_loopback(start: Start, built) -> None:
    before = listening()
    manager, client = start(kernel_name=built("r"))
    assert manager.transport == "ipc"
    assert run(client, "cat(1 + 1)").stdout == "2"
    assert listening() == before, "a port has opened on the host"
    ports = run(client, 'cat(readLines("/proc/net/tcp"), sep = "\\n")').stdout
    assert ports.count("0100007F:") >= 5  # all of them on its loopback
    run(client, "kept <- 5")
    begin = time.monotonic()
    run(client, "Sys.sleep(60)", after=manager.interrupt_kernel)
    assert time.monotonic() - begin < 3
    assert run(client, "cat(kept)").stdout == "5"
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    assert run(client, "kept").error == "ERROR"
    assert run(client, "cat(3)").stdout == "3"


@pytest.mark.second
def test_r_loses_none_of_a_flood(start: Start, built) -> None:
    _, client = start(kernel_name=built("r"))
    assert flood(client, 'for (i in 1:100) cat(strrep("x", 1000000))') == 100_000_000


def flood(client: BlockingKernelClient, code: str) -> int:
    """Characters of output that come, with a client that reads nothing at first."""
    request = client.execute(code)
    time.sleep(3)
    size, idle, until = 0, False, time.monotonic() + 150
    while not idle:
        assert time.monotonic() < until
        message = client.get_iopub_msg(timeout=100)
        if message["parent_header"].get("msg_id") == request:
            if message["msg_type"] == "stream":
                size += len(message["content"]["text"])
            idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
    return size


def test_r_by_the_launcher(tmp_path: Path, built) -> None:
    built("r")
    with argv_kernel(tmp_path, ref="r") as (kernel, client):
        assert run(client, "cat(6 * 7)").stdout == "42"
        family = kernel.family()
    assert gone(family)


def test_a_kernel_that_speaks_tcp_gets_no_network_of_the_host(cli, built, start: Start) -> None:
    from traitlets.config import Config

    from workbench.model import WorkbenchError

    name = built("r")
    with pytest.raises(WorkbenchError, match="its kernel speaks TCP, which everybody on the host could reach"):
        start(kernel_name=name, traits={"config": Config({"Workbench": {"network": "host"}})})


def test_a_shell(start: Start, built, tmp_path: Path) -> None:
    manager, client = start(kernel_name=built("bash"))
    assert run(client, "cd /opt; kept=5; double() { echo $(( $1 * 2 )); }; double 21").stdout == "42\n"
    assert run(client, 'echo "$kept $PWD"; echo to-error >&2').stdout == "5 /opt\n"
    assert run(client, "echo to-error >&2").stderr == "to-error\n"
    assert run(client, "printf 'no end of line'").stdout == "no end of line"
    failed = run(client, "(exit 3)")
    assert (failed.error, failed.reply["status"]) == ("ExitCode", "error")
    assert "syntax error" in run(client, "for in do").stderr
    assert run(client, 'read line; echo "got $line"').stdout == "got \n"  # nobody can answer
    for code in ("sleep 60", "while true; do :; done", "sleep 60 | cat"):
        begin = time.monotonic()
        run(client, code, after=manager.interrupt_kernel)
        assert time.monotonic() - begin < 3, code
    assert run(client, 'echo "$kept"').stdout == "5\n"
    assert "The shell has ended" in run(client, "exit 4").stderr
    assert run(client, 'echo "[$kept]"').stdout == "[]\n"
    assert run(client, f"ls -d {tmp_path}").stdout == f"{tmp_path}\n"
    assert flood(client, "head -c 20000000 /dev/zero | tr '\\0' x") == 20_000_000
