"""What /proc tells of a pid namespace, against what its processes are known to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from workbench.linux import processes

#: An init with memory that its child shares, a thread in that, and one that used a processor and ended.
LIFE = """
import os, sys, threading, time
held = bytearray(b"x") * (64 << 20)
if not os.fork():
    until = time.process_time() + 0.3
    while time.process_time() < until: pass
    os._exit(0)
os.wait()
if not os.fork():
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("ready", flush=True)
    time.sleep(60)
sys.stdin.read()
"""


def test_the_processes_of_a_namespace_are_added_up():
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-I", "-S", "-c", LIFE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as outer:
        assert outer.stdout.readline() == b"ready\n"
        with open(f"/proc/{outer.pid}/task/{outer.pid}/children") as file:
            init = int(file.read())
        found = list(processes.members(init))
        assert init in found and outer.pid not in found and len(found) == 2
        used = processes.usage(init)
        assert used.processes == 3
        assert 64 << 20 < used.memory < 100 << 20
        assert 0.25 < used.cpu < 2
        found.remove(init)
        os.kill(found[0], signal.SIGSTOP)
        until = time.monotonic() + 5
        while processes.state(found[0]) != "T":
            assert time.monotonic() < until
        outer.stdin.close()
    assert processes.usage(init) is None
    assert processes.state(init) == "X"
