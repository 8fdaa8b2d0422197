"""What each kind of network lets through and what it does not, with real packets; and that it goes without a trace.

The same tests with a bridge (as root) and with pasta (as anybody else, and as root with a single id).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.containers import network_probe
from workbench.containers import links, network, pasta, resolver
from workbench.linux import userns
from workbench.model import HostLacks

ROOT = os.geteuid() == 0 and userns.in_initial_namespace()
TOP = str(Path(__file__).parents[2])
PROBE = "tests.containers.network_probe"


@pytest.fixture(params=["bridge", "pasta"])
def ids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How the helper is told whose ids there are; the bridge is root's."""
    if request.param == "bridge" and not ROOT:
        pytest.skip("the bridge is root's")
    if request.param == "pasta" and ROOT:
        monkeypatch.setenv("WORKBENCH_SINGLE_ID", "1")
    return asdict(userns.host_ids())


@pytest.fixture
def host() -> Iterator[dict[str, Any]]:
    """Servers of the host: on loopback, on every address, and on an abstract socket."""
    name = f"workbench-test-{os.getpid()}"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0))]
    local = socket.socket(socket.AF_UNIX)
    local.bind("\0" + name)
    local.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        address = probe.getsockname()[0]
    ports = [server.getsockname()[1] for server in servers]
    assert network_probe.connect("127.0.0.1", ports[0])
    assert network_probe.connect(address, ports[1])
    assert network_probe.abstract(name)
    yield {"ports": ports, "address": address, "name": name}
    for server in (*servers, local):
        server.close()


def look(ids: dict[str, Any], kind: str, host: dict[str, Any]) -> dict[str, Any]:
    found = userns.call(f"{PROBE}:look", ids, kind, host["ports"], host["address"], host["name"])
    assert isinstance(found, dict)
    return found


def gone(container_ids: list[str], seconds: float = 8.0) -> bool:
    """Whether the links of these go in time; the bridge is left to the check after every test."""
    until = time.monotonic() + seconds
    while any(links.index(links.port_name(name)) for name in container_ids):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_none(ids: dict[str, Any], host: dict[str, Any]) -> None:
    found = look(ids, "none", host)
    assert found["interfaces"] == {"lo": True}
    assert found["own loopback"]
    assert found["host"] == []
    assert not found["abstract"]


def test_outbound_reaches_the_world_and_nothing_of_the_host(ids: dict[str, Any], host: dict[str, Any]) -> None:
    found = look(ids, "outbound", host)
    assert found["interfaces"]["lo"]
    assert found["interfaces"].keys() == {"lo", "eth0"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", found["name"])
    assert found["fetched"].startswith("HTTP/1")
    assert found["own loopback"]
    assert found["host"] == []
    assert not found["abstract"]


def test_containers_do_not_reach_each_other(ids: dict[str, Any]) -> None:
    found = userns.call(f"{PROBE}:two", ids)
    assert found["itself"]
    assert not found["other"]
    if ids["kind"] == "root":
        assert len(set(found["addresses"])) == 2


@pytest.mark.alone
def test_many_at_once(ids: dict[str, Any]) -> None:
    for again in reversed(range(3)):  # what else the machine does may slow down one half of a round
        times = userns.call(f"{PROBE}:many", ids, 50)
        assert len(times) == 50
        assert statistics.median(times) < 200  # 7 and 10 on a quiet machine; others use this one
        if statistics.median(times[-10:]) < 4 * max(10, statistics.median(times[1:11])):
            break
        assert again, times


def test_coming_and_going_side_by_side(ids: dict[str, Any]) -> None:
    """Whoever is last removes what is shared, while others are just coming."""
    code = "import sys, json; from workbench.linux import userns; userns.call(sys.argv[1], json.loads(sys.argv[2]), 6)"
    command = [sys.executable, "-c", code, f"{PROBE}:rounds", json.dumps(ids)]
    many = [subprocess.Popen(command, cwd=TOP, env=os.environ | {"PYTHONPATH": TOP}) for _ in range(3)]
    assert [process.wait(timeout=120) for process in many] == [0, 0, 0]


def test_killed_helper(ids: dict[str, Any]) -> None:
    """Nothing of its containers' networks stays: no link, no bridge, no table, no pasta."""
    read, write = os.pipe()
    code = (
        "import os, sys, json, signal\nfrom workbench.linux import userns\n"
        "fds = int(sys.argv[1]), int(sys.argv[2])\n"
        "served = 'workbench.linux.userns:_serve_call'\n"
        "process = userns.spawn(served, fds, [sys.argv[2]], found_by='tests')\n"
        "os.close(int(sys.argv[1])); print(process.pid, flush=True); process.wait()"
    )
    exchange = os.memfd_create("call", 0)
    os.write(exchange, json.dumps({"target": f"{PROBE}:hang", "args": [ids, write]}).encode())
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(write), str(exchange)],
        pass_fds=(write, exchange), cwd=TOP, env=os.environ | {"PYTHONPATH": TOP}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    os.close(exchange)
    assert process.stdout
    helper = int(process.stdout.readline())
    with os.fdopen(read, "rb") as file:
        names = json.loads(file.read(100))
    if ids["kind"] == "root":
        assert all(links.index(links.port_name(name)) for name in names)
    os.kill(helper, signal.SIGKILL)
    process.wait(timeout=20)
    assert gone(names)


# --- the bridge, in a host of its own: a network namespace that stands for one ---------------------------------


def alone(code: str) -> str:
    """Run code with a ``bridge`` in a new network namespace with its own /sys; what it prints."""
    text = (
        "import os, subprocess, time\n"
        "from workbench.linux import syscalls as sc\n"
        "sc.unshare(sc.CLONE_NEWNET | sc.CLONE_NEWNS)\n"
        "sc.mount(None, '/', None, sc.MS_REC | sc.MS_PRIVATE)\n"
        "sc.mount('none', '/sys', 'sysfs')\n"
        "from workbench.containers import network, links\n"
        "links.sysctl('ipv4/ip_forward', '0')\n"  # a new namespace copies the host's
        "bridge = network._Bridge()\n"
        "def tables(): return [t.get_attr('NFTA_TABLE_NAME') for t in bridge.nft.get_tables()]\n"
        "def guest(): return subprocess.Popen(['unshare', '-n', 'sleep', '60'])\n"
        "def up(name):\n"
        "    bridge.ip.link('add', ifname=name, kind='bridge'); index = links.index(name)\n"
        "    bridge.ip.link('set', index=index, state='up'); return index\n"
        "def address():\n"
        "    found = bridge.ip.get_addr(index=links.index('wb0'), family=2)\n"
        "    return [a.get_attr('IFA_ADDRESS') for a in found]\n"
        "one = guest(); time.sleep(0.2)\n"
        "try:\n" + "".join(f"    {line}\n" for line in code.strip().splitlines()) + "finally:\n"
        "    one.kill(); one.wait()\n    bridge.tidy()\n"
        "    left = lambda: [n for n in os.listdir('/sys/class/net') if n.startswith('wb')]\n"
        "    until = time.monotonic() + 5\n"  # the kernel removes links of a dead namespace behind our back
        "    while left() and time.monotonic() < until: time.sleep(0.01)\n"
        "    print(left(), tables())\n"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=TOP, env=os.environ | {"PYTHONPATH": TOP},
                          capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "[] []"
    return "\n".join(lines)


needs_root = pytest.mark.skipif(not ROOT, reason="the bridge is root's")


@needs_root
def test_addresses_that_the_host_uses_are_left_alone() -> None:
    said = alone("""
lan = up('lan')
bridge.ip.addr('add', index=lan, address='10.213.7.1', prefixlen=24)
bridge.attach(one.pid, 1, '0123456789ab')
print(address()[0])
""")
    assert said == "10.87.0.1"


@needs_root
def test_no_free_addresses() -> None:
    said = alone("""
lan = up('lan')
for text in network._NETWORKS: bridge.ip.route('add', dst=text, oif=lan)
try: bridge.attach(one.pid, 1, '0123456789ab')
except Exception as error: print(type(error).__name__, error)
""")
    assert said.startswith("HostLacks find addresses for containers")


@needs_root
def test_a_flushed_table_comes_back_and_forwarding_is_given_back() -> None:
    said = alone("""
bridge.ip.addr('add', index=up('up'), address='198.51.100.2', prefixlen=24)
bridge.ip.route('add', dst='default', gateway='198.51.100.1')
bridge.attach(one.pid, 1, '0123456789ab')
state = lambda: [links.sysctl(f'ipv4/conf/{name}/forwarding') for name in ('all', 'up', 'wb0')]
print(tables(), state())
bridge.nft.table('del', name='workbench')
bridge.attach(one.pid, 1, '0123456789ab')
print(tables())
one.kill(); one.wait(); bridge.tidy()
print(links.sysctl('ipv4/conf/up/forwarding'))
""")
    assert said.splitlines() == ["['workbench'] ['0', '1', '1']", "['workbench']", "0"]


@needs_root
def test_through_a_firewall_that_forwards_nothing() -> None:
    """As Docker and ufw leave a host; with packets, and without a trace in their table."""
    said = alone("""
world = guest(); time.sleep(0.3)
bridge.ip.link('add', ifname='way', kind='veth', peer={'ifname': 'way', 'net_ns_pid': world.pid})
bridge.ip.link('set', index=links.index('way'), state='up')
bridge.ip.addr('add', index=links.index('way'), address='198.51.100.2', prefixlen=24)
bridge.ip.route('add', dst='default', gateway='198.51.100.1')
enter = lambda pid: ['nsenter', '-n', '-t', str(pid)]
subprocess.run([*enter(world.pid), 'sh', '-c', 'ip addr add 198.51.100.1/24 dev way; ip link set way up'])
serve = 'import socket; s = socket.create_server(("0.0.0.0", 80)); print(1, flush=True); print(s.accept()[1][0])'
server = subprocess.Popen([*enter(world.pid), 'python3', '-c', serve], stdout=subprocess.PIPE, text=True)
server.stdout.readline()
bridge.nft.table('add', name='filter')
bridge.nft.chain('add', table='filter', name='FORWARD', hook='forward', type='filter', priority=0, policy=0)
bridge.attach(one.pid, 1, '0123456789ab')
call = 'import socket; socket.create_connection(("198.51.100.1", 80), 5)'
print(subprocess.run([*enter(one.pid), 'python3', '-c', call]).returncode, server.communicate(timeout=10)[0].strip())
ours = lambda: [r for r in bridge.nft.get_rules() if r.get_attr('NFTA_RULE_TABLE') == 'filter']
print(len(ours()), end=' ')
one.kill(); one.wait(); bridge.tidy()
print(len(ours()), tables())
bridge.nft.table('del', name='filter'); world.kill(); world.wait()
""")
    assert said.splitlines() == ["0 198.51.100.2", "2 0 ['filter']"]


@needs_root
def test_the_gateway_keeps_its_address_whoever_comes() -> None:
    said = alone("""
bridge.attach(one.pid, 1, '0123456789ab')
mac = lambda: open('/sys/class/net/wb0/address').read()
before, more = mac(), [guest() for _ in range(6)]
time.sleep(0.3)
for number, other in enumerate(more): bridge.attach(other.pid, number + 2, f'{number}abcdef01234')
for other in more: other.kill(); other.wait()
print(before == mac())
""")
    assert said == "True"


@needs_root
def test_a_bridge_of_somebody_else() -> None:
    said = alone("""
bridge.ip.link('add', ifname='wb0', kind='bridge')
try: bridge.attach(one.pid, 1, '0123456789ab')
except Exception as error: print(type(error).__name__, error)
bridge.ip.link('del', index=links.index('wb0'))
""")
    assert "a link wb0 of somebody else is there" in said


@needs_root
def test_a_worker_that_died_is_replaced() -> None:
    ids = asdict(userns.host_ids())
    with network_probe.guests(ids) as (guest,):
        worker = network._Worker.get()
        worker.socket.shutdown(socket.SHUT_RDWR)
        other = network_probe.Guest(ids)
        try:
            assert other.run(network_probe.interfaces)["eth0"]
            assert guest.run(network_probe.interfaces)["eth0"]
        finally:
            other.end()


# --- what a host may lack ---------------------------------------------------------------------------------------


@needs_root
def test_without_root_a_host_that_is_offline_has_containers_too(image: str, tmp_path: Path) -> None:
    command = ["unshare", "-n", sys.executable, "-m", "workbench", "run", image, "ls", "/sys/class/net"]
    done = subprocess.run(
        command, env=os.environ | {"WORKBENCH_SINGLE_ID": "1"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["lo"], "")


def test_no_pasta(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostLacks, match="pasta is missing; apt-get install passt"):
        pasta.find()


def test_a_pasta_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "pasta"
    program.write_text("#!/bin/sh\necho 'Cannot do it' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(pasta.Pasta, "_proved", False)
    with pytest.raises(HostLacks, match="Cannot do it"):
        pasta.Pasta(os.getpid())


# --- names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def resolv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def write(*texts: str) -> None:
        paths = []
        for number, text in enumerate(texts):
            paths.append(str(tmp_path / str(number)))
            Path(paths[-1]).write_text(text)
        monkeypatch.setattr(resolver, "_SOURCES", tuple(paths))

    return write


@pytest.mark.parametrize("rootful", [True, False])
def test_names_are_asked_of_the_hosts_servers(resolv: Any, rootful: bool) -> None:
    resolv("# made by hand\nnameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch example.org\noptions edns0\n")
    text = resolver.resolv_conf("outbound", rootful=rootful)
    assert text == "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch example.org\noptions edns0\n"


@pytest.mark.parametrize("rootful", [True, False])
def test_behind_a_resolver_on_loopback(resolv: Any, rootful: bool) -> None:
    resolv("nameserver 127.0.0.53\nsearch lan\n", "nameserver 192.0.2.1\nnameserver fe80::1%2\n")
    assert resolver.resolv_conf("outbound", rootful=rootful) == "nameserver 192.0.2.1\nsearch lan\n"


def test_nothing_but_loopback(resolv: Any) -> None:
    resolv("nameserver 127.0.0.1\nnameserver ::1\n")
    assert resolver.resolv_conf("outbound", rootful=False) == f"nameserver {resolver.FORWARDED}\n"
    assert "--dns-forward" in pasta.arguments(1, "/dev/null")
    assert resolver.resolv_conf("outbound", rootful=True).startswith("# the host names no server")


def test_other_addresses(resolv: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        own = probe.getsockname()[0]
    resolv(f"nameserver {own}\nnameserver 2001:db8::53\nnameserver\n")
    assert resolver.nameservers(rootful=True) == (own,)
    assert resolver.nameservers(rootful=False) == ("2001:db8::53",)


def test_files() -> None:
    texts = dict(network.files("none", rootful=True, hostname="box"))
    assert texts["/etc/hostname"] == "box\n"
    assert "127.0.0.1 localhost\n" in texts["/etc/hosts"]
    assert texts["/etc/hosts"].endswith("127.0.1.1 box\n")
    assert "nameserver" not in texts["/etc/resolv.conf"]
    texts = dict(network.files("host", rootful=True, hostname="box"))
    assert texts["/etc/resolv.conf"] == Path("/etc/resolv.conf").read_text()
    assert texts["/etc/hosts"].startswith(Path("/etc/hosts").read_text().rstrip())


def test_loopback_up_needs_no_library() -> None:
    """In a thread of a child: the namespace of this process stays as it is."""
    code = "import sys; from workbench.containers import network; assert 'pyroute2' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n"
