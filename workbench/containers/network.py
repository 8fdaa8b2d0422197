"""The network of a container: ``none``, ``outbound`` or ``host``; what a named one adds to that is in ``lan.py``.

``outbound`` as root is a pair of links to a bridge, with masquerade by nftables, all made through pyroute2; as anybody
else it is pasta's (``pasta.py``). pyroute2 takes 0.1 s and 20 MB to import, so it lives in one *network worker* that
the helper forks: start it early with ``preload``, and the import runs beside everything else. The worker outlives its
helper, however that ends, for as long as tidying up takes. What is shared (bridge, table) is made and removed under a
lock, the first comes and the last goes; sysfs tells who is there, so nothing has to be remembered.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

from workbench.containers import links, resolver
from workbench.containers.pasta import Pasta
from workbench.containers.rules import Rules
from workbench.linux import syscalls as sc
from workbench.model import HostLacks, Network, WorkbenchError

if TYPE_CHECKING:
    import ipaddress

_TABLE = "workbench"
#: The first that is free becomes the bridge's; private, and seldom somebody's.
_NETWORKS = ("10.213.0.0/16", "10.87.0.0/16", "172.29.0.0/16", "10.174.0.0/16", "192.168.0.0/16")
_MODULES = "modprobe veth bridge nf_tables nft_masq nft_ct nft_reject_ipv4, or choose network none or host"
_TIMEOUT = 60.0  # seconds for the worker's answer
_PATIENCE = 2.0  # seconds that a worker which was preloaded waits for its first container
_LINGER = 0.5  # seconds until what the last container leaves is removed, while its helper lives


class Attachment:
    """A container's connection; ``detach`` once its processes are gone."""

    def __init__(self, container_id: str = "", pasta: Pasta | None = None) -> None:
        self._id, self._pasta = container_id, pasta

    def detach(self) -> None:
        """Take it down, without waiting. Detaching twice is fine."""
        if self._pasta:
            self._pasta.stop()
        if self._id:
            with suppress(OSError):
                _Worker.get().tell({"op": "detach", "id": self._id})
            self._id = ""


def files(kind: Network, *, rootful: bool, hostname: str) -> tuple[tuple[str, str], ...]:
    """(path inside, text) of the files that tell of names. rootful: the bridge is used, not pasta."""
    return (
        ("/etc/hostname", hostname + "\n"),
        ("/etc/hosts", resolver.hosts(kind, hostname)),
        ("/etc/resolv.conf", resolver.resolv_conf(kind, rootful=rootful)),
    )


def loopback_up() -> None:
    """Bring lo up in the network namespace that this process is in (netdevice(7)). Raises OSError."""
    links.bring_up("lo")


def preload() -> None:
    """Start the network worker now, for ``outbound`` as root; returns at once."""
    _Worker.get()


def close() -> None:
    """Let the network worker go; it tidies up in the background and ends."""
    if _Worker.current:
        _Worker.current.socket.close()
        _Worker.current = None


def attach(kind: Network, *, pid: int, slot: int, container_id: str, rootful: bool) -> Attachment:
    """Connect the network namespace of ``pid``, a container's init that waits for its exec.

    slot: a number > 0 that no other running container of the host has; it becomes the address.
    rootful: whether this is real root. Returns when packets can go. Raises HostLacks, OSError.
    """
    if kind in ("none", "host"):
        return Attachment()
    if not rootful:
        # A host that is offline is no reason not to work on it, and pasta refuses to start there.
        return Attachment(pasta=Pasta(pid)) if links.has_default_route() else Attachment()
    request = {"op": "attach", "pid": pid, "slot": slot, "id": container_id}
    try:
        answer = _Worker.get().ask(request)
    except OSError:  # somebody killed the worker
        close()
        answer = _Worker.get().ask(request)
    if "error" in answer:
        raise WorkbenchError.from_dict(answer)
    return Attachment(container_id)


def sweep() -> None:
    """Remove what containers of a killed helper left; for any process of root, also one with threads.

    Looks into sysfs first, and starts a process for the work only when there is some.
    """
    if (
        os.geteuid() != 0
        or not os.path.exists(f"/sys/class/net/{links.BRIDGE}")
        or any(map(links.alive, links.ports()))
    ):
        return
    from workbench.linux import userns

    if userns.in_initial_namespace():
        userns.spawn("workbench.containers.network:tidy", (), []).wait()


def tidy() -> None:
    """``sweep``'s work; imports pyroute2."""
    _Bridge().tidy()


def trial() -> None:
    """Make once what ``outbound`` takes, for ``doctor``: to be called in a network namespace that ends right away.

    Raises HostLacks.
    """
    what = "pyroute2"
    try:
        bridge = _Bridge()
        what = "bridge"
        bridge.ip.link("add", ifname="trial0", kind="bridge")
        what = "veth"
        bridge.ip.link("add", ifname="trial1", kind="veth", peer={"ifname": "trial2"})
        what = "nftables"
        bridge._make_table(bridge._ipaddress.IPv4Network(_NETWORKS[0]))
    except Exception as error:  # whatever pyroute2 raises, as above
        raise HostLacks("try the network", f"{what} does not work here: {error}", _remedy(error)) from None


def _remedy(error: Exception) -> str:
    """What helps against an error of pyroute2, whose NetlinkError is no OSError."""
    code = getattr(error, "code", None) or getattr(error, "errno", None)
    if code in (errno.EPERM, errno.EACCES, errno.EROFS):
        return "it takes CAP_NET_ADMIN and a writable /proc/sys/net; or choose network none or host"
    return _MODULES


# --- the worker: a process of its own -------------------------------------------------------------------------


class _Worker:
    """The helper's end of the network worker. Requests are answered in turn, ``tell`` asks for no answer."""

    current: _Worker | None = None

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(_TIMEOUT)
        if os.fork() == 0:
            _work(theirs)
        theirs.close()

    @classmethod
    def get(cls) -> _Worker:
        """This process's worker, started when there is none."""
        if cls.current is None or cls.current.owner != os.getpid():
            cls.current = cls()
        return cls.current

    def tell(self, message: dict[str, Any]) -> None:
        """Send. Raises OSError when the worker is gone."""
        self.socket.send(json.dumps(message).encode())

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send and wait for the answer. Raises OSError when the worker is gone."""
        self.tell(message)
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError(104, "the network worker ended")
        return dict(json.loads(data))


def _work(channel: socket.socket) -> NoReturn:
    """The worker's life, from the fork to its helper's end and a little further."""
    try:
        os.setsid()
        # Nothing of the helper stays open here, least of all its standard output, whose reader waits for the end.
        null = os.open("/dev/null", os.O_RDWR)
        kept = fcntl.fcntl(channel.detach(), fcntl.F_DUPFD, 100)
        for number in range(3):
            os.dup2(null, number)
        os.dup2(kept, 3, inheritable=False)
        sc.close_range(4)
        signal.set_wakeup_fd(-1)
        _Service(socket.socket(fileno=3)).serve()
    finally:
        os._exit(0)


class _Service:
    """Answers one helper; keeps the links of its containers until they are gone."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.own: set[str] = set()
        self.leaving: set[str] = set()
        self.due = math.inf  # when what is leaving is looked after
        self.bridge: _Bridge | WorkbenchError
        try:
            self.bridge = _Bridge()
        except ImportError as error:
            tried = "connect a container to the network"
            self.bridge = HostLacks(tried, f"pyroute2 cannot be imported: {error}", "pip install pyroute2")

    def serve(self) -> None:
        """Until the helper's end of the channel is closed."""
        if isinstance(self.bridge, _Bridge):
            # Ahead of the first container. Should it not come, this goes again; should this fail, it will hear why.
            with suppress(Exception):
                self.bridge.prepare()
            self.due = time.monotonic() + _PATIENCE
        while True:
            left = self.due - time.monotonic()
            if left <= 0:
                self._bury()
                continue
            self.channel.settimeout(None if left == math.inf else left)
            try:
                data = self.channel.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                break
            if not data:
                break
            self._request(json.loads(data))
        self._end()

    def _request(self, message: dict[str, Any]) -> None:
        port = links.port_name(message["id"])
        if message["op"] == "detach":
            # Later: the kernel is removing the link with its namespace, and perhaps the container starts again.
            self.leaving.add(port)
            self.due = min(self.due, time.monotonic() + _LINGER)
            return
        self.leaving.discard(port)
        self.own.add(port)
        answer = self._attach(message)
        with suppress(OSError):
            self.channel.send(json.dumps(answer).encode())

    def _attach(self, message: dict[str, Any]) -> dict[str, Any]:
        tried = f"connect container {message['id']} to the network"
        if isinstance(self.bridge, WorkbenchError):
            return dict(self.bridge.as_dict())
        try:
            self.bridge.attach(message["pid"], message["slot"], message["id"])
        except WorkbenchError as error:
            self.leaving.add(links.port_name(message["id"]))
            self.due = 0.0
            return dict(error.as_dict())
        except Exception as error:  # whatever pyroute2 raises
            self.leaving.add(links.port_name(message["id"]))
            self.due = 0.0
            return dict(HostLacks(tried, f"{type(error).__name__}: {error}", _remedy(error)).as_dict())
        return {}

    def _bury(self) -> None:
        self.due = math.inf
        leaving, self.leaving = self.leaving, set()
        self.own -= leaving
        if isinstance(self.bridge, _Bridge):
            with suppress(Exception):
                for port in leaving:
                    self.bridge.remove(port)
                self.bridge.tidy()

    def _end(self) -> None:
        """The helper is gone, and its containers with it, or about to."""
        if not isinstance(self.bridge, _Bridge):
            return
        until = time.monotonic() + 5
        while any(map(links.alive, self.own)) and time.monotonic() < until:
            time.sleep(0.005)
        with suppress(Exception):
            self.bridge.tidy()
        until = time.monotonic() + _LINGER
        while any(map(links.index, self.own)) and time.monotonic() < until:
            time.sleep(0.005)
        for port in self.own:
            self.bridge.remove(port)


# --- links, addresses, rules: pyroute2 ------------------------------------------------------------------------


class _Bridge:
    """The bridge ``wb0``, its table ``workbench``, and the pairs of links that hang on it."""

    def __init__(self) -> None:
        """Imports pyroute2. Raises ImportError."""
        import importlib.util
        import ipaddress

        # Only what is needed: pyroute2's own __init__ imports all of it, which takes 0.06 s more.
        spec = importlib.util.find_spec("pyroute2")
        if spec is None:
            raise ImportError("it is not installed")
        if "pyroute2" not in sys.modules:
            sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
        from pyroute2.iproute.linux import IPRoute
        from pyroute2.nftables import expressions
        from pyroute2.nftables.main import NFTables

        self._open = cast(Any, IPRoute)
        self._rules = Rules(expressions)
        self._ipaddress = ipaddress
        self.ip = self._open()
        self.nft = cast(Any, NFTables)(nfgen_family=socket.AF_INET)

    def prepare(self) -> None:
        """Make what all containers share."""
        with links.Lock():
            self._shared()

    def attach(self, pid: int, slot: int, container_id: str) -> None:
        """Give the container an ``eth0`` with an address, a way out, and nothing else."""
        port = links.port_name(container_id)
        with links.Lock():
            bridge, network, mtu = self._shared()
            self.remove(port)
            peer = {"ifname": "eth0", "net_ns_pid": pid, "mtu": mtu}
            self.ip.link("add", ifname=port, kind="veth", master=bridge, mtu=mtu, peer=peer)
            index = links.index(port)
            links.without_ipv6(port)
            alias = f"workbench {container_id} {slot}"
            self.ip.link("set", index=index, state="up", ifalias=alias)
            # Isolated ports reach the host and not each other.
            self.ip.brport("set", index=index, IFLA_BRPORT_ISOLATED=1)
        inside, eth0 = self._inside(pid)
        try:
            inside.link("set", index=eth0, state="up")
            inside.addr("add", index=eth0, address=str(network[1 + slot]), prefixlen=network.prefixlen)
            inside.route("add", dst="default", gateway=str(network[1]))
        finally:
            inside.close()

    def _inside(self, pid: int) -> tuple[Any, int]:
        """pyroute2 on a socket of the container's namespace, and the index of eth0 there; its IPv6 is off now."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            sc.setns(there, sc.CLONE_NEWNET)
            try:
                links.without_ipv6("eth0")
                return self._open(), links.index("eth0")
            finally:
                sc.setns(home, sc.CLONE_NEWNET)
        finally:
            os.close(home)
            os.close(there)

    def _shared(self) -> tuple[int, ipaddress.IPv4Network, int]:
        """The bridge's index, network and MTU; made when missing, and mended (a firewall may flush the table)."""
        ways_out = links.uplinks()
        mtu = min((links.mtu(name) for name in ways_out), default=1500)
        index = links.index(links.BRIDGE)
        if index:
            with open(f"/sys/class/net/{links.BRIDGE}/ifalias") as file:
                if not file.read().startswith("workbench"):
                    raise HostLacks("make the bridge", f"a link {links.BRIDGE} of somebody else is there", "rename it")
            address = next((a for a in self.ip.get_addr(index=index, family=socket.AF_INET)), None)
            if address is not None:
                text = f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
                network = self._ipaddress.IPv4Network(text, strict=False)
                if not self._has_table():
                    self._make_table(network)
                links.forward(ways_out)
                return index, network, mtu
            self.ip.link("del", index=index)  # its maker was killed half-way
        network = self._free_network()
        try:
            # An address of its own: else it is that of some port, and guests lose their gateway with that port.
            address = "02:" + os.urandom(5).hex(":")
            self.ip.link("add", ifname=links.BRIDGE, kind="bridge", address=address)
            index = links.index(links.BRIDGE)
            links.without_ipv6(links.BRIDGE)
            self.ip.link("set", index=index, state="up", ifalias="workbench")
            self.ip.addr("add", index=index, address=str(network[1]), prefixlen=network.prefixlen)
            self._make_table(network)
            links.forward(ways_out)
        except BaseException:
            self._remove_shared()
            raise
        return index, network, mtu

    def _free_network(self) -> ipaddress.IPv4Network:
        """The first of ours that no route, address or nameserver of the host lies in."""
        taken = [self._ipaddress.ip_network(f"{name}/32") for name in resolver.nameservers(rootful=True)]
        for route in self.ip.get_routes(family=socket.AF_INET):
            if route["dst_len"]:
                taken.append(
                    self._ipaddress.ip_network(f"{route.get_attr('RTA_DST')}/{route['dst_len']}", strict=False)
                )
        for text in _NETWORKS:
            network = self._ipaddress.IPv4Network(text)
            if not any(network.overlaps(other) for other in taken):
                return network
        raise HostLacks(
            "find addresses for containers",
            f"the host has routes into each of {', '.join(_NETWORKS)}",
            "choose network none or host",
        )

    def _has_table(self) -> bool:
        return any(table.get_attr("NFTA_TABLE_NAME") == _TABLE for table in self.nft.get_tables())

    def _make_table(self, network: ipaddress.IPv4Network) -> None:
        """Containers reach the world, the host for names only, each other not; the world begins nothing with them."""
        if self._has_table():
            self.nft.table("del", name=_TABLE)
        self.nft.table("add", name=_TABLE)
        for name, kind, priority in (("postrouting", "nat", 100), ("forward", "filter", 0), ("input", "filter", 0)):
            self.nft.chain("add", table=_TABLE, name=name, hook=name, type=kind, priority=priority, policy=1)
        x = self._rules
        for chain, *parts in (
            ("postrouting", x.source(network), x.to_bridge(False), x.masquerade()),
            ("forward", x.from_bridge(), x.to_bridge(True), x.drop()),
            ("forward", x.to_bridge(True), x.answers(), x.accept()),
            ("forward", x.to_bridge(True), x.drop()),
            ("input", x.from_bridge(), x.answers(), x.accept()),
            ("input", x.from_bridge(), x.port(socket.IPPROTO_UDP, 53), x.accept()),
            ("input", x.from_bridge(), x.port(socket.IPPROTO_TCP, 53), x.accept()),
            ("input", x.from_bridge(), x.reject()),
        ):
            self.nft.rule("add", table=_TABLE, chain=chain, expressions=parts)
        self._pass_others()

    def _pass_others(self) -> None:
        """Where another table lets nothing be forwarded by default (Docker's, ufw's), make it leave that to ours.

        The rules are as ``iptables -I FORWARD -i wb0 -j ACCEPT`` writes them, since iptables has to understand them.
        """
        self._leave_others()
        for chain in self.nft.get_chains():
            hook = chain.get_attr("NFTA_CHAIN_HOOK")
            table = chain.get_attr("NFTA_CHAIN_TABLE")
            forward = hook is not None and hook.get_attr("NFTA_HOOK_HOOKNUM") == 2
            if forward and table != _TABLE and chain.get_attr("NFTA_CHAIN_POLICY") == 0:
                for part in (self._rules.from_bridge(), self._rules.to_bridge(True)):
                    name = chain.get_attr("NFTA_CHAIN_NAME")
                    self.nft.rule("insert", table=table, chain=name, expressions=(part, self._rules.accept()))

    def _leave_others(self) -> None:
        for rule in self.nft.get_rules():
            table, chain = rule.get_attr("NFTA_RULE_TABLE"), rule.get_attr("NFTA_RULE_CHAIN")
            if table != _TABLE and self._rules.passes_bridge(rule.get_attr("NFTA_RULE_EXPRESSIONS") or ()):
                self.nft.rule("del", table=table, chain=chain, handle=rule.get_attr("NFTA_RULE_HANDLE"))

    def remove(self, port: str) -> None:
        """Remove a link, of a pair both ends, if it is still there."""
        index = links.index(port)
        if index:
            with suppress(Exception):  # the kernel was quicker
                self.ip.link("del", index=index)

    def tidy(self) -> None:
        """Remove what is shared if no container is there; links of dead ones go with it."""
        with links.Lock() as lock:
            ports = links.ports()
            if any(map(links.alive, ports)):
                return
            self._remove_shared()
            for port in ports:
                self.remove(port)
            lock.remove()

    def _remove_shared(self) -> None:
        links.stop_forwarding()
        with suppress(Exception):
            self._leave_others()
        with suppress(Exception):
            self.nft.table("del", name=_TABLE)
        self.remove(links.BRIDGE)
