"""What /etc/hosts and /etc/resolv.conf say inside (resolv.conf(5)), so that names work without the host's resolver.

A resolver on the host's loopback (systemd-resolved, dnsmasq) cannot be reached from inside: then the servers that it
asks itself are named.
"""

from __future__ import annotations

import socket

from workbench.model import LAN, Network

#: Where pasta listens inside when the host has only a resolver of its own; a link-local address nobody has.
FORWARDED = "169.254.53.53"

#: Looked at in turn until one names a server that can be reached from inside.
_SOURCES = (
    "/etc/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/run/NetworkManager/no-stub-resolv.conf",
    "/run/resolvconf/resolv.conf",
    "/run/dnsmasq/resolv.conf",
)
_LOCAL = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


def resolv_conf(kind: Network, *, rootful: bool) -> str:
    """The text of /etc/resolv.conf. rootful: the network is the bridge, else it is pasta's."""
    if kind == "host":
        return _read(_SOURCES[0])
    if kind == "none":
        return "# this container has no network\n"
    found = nameservers(rootful=rootful)
    if not found:
        found = () if rootful else (FORWARDED,)
    lines = [f"nameserver {address}" for address in found]
    if not lines:
        lines.append("# the host names no server but on its own loopback, which cannot be reached from here")
    kept = ("search ", "domain ", "options ")
    lines += [line.strip() for line in _read(_SOURCES[0]).splitlines() if line.startswith(kept)]
    return "\n".join(lines) + "\n"


def nameservers(*, rootful: bool) -> tuple[str, ...]:
    """The servers that can be asked from inside: of the host's, or those behind its resolver; possibly none."""
    for path in _SOURCES:
        named = [line.split()[1] for line in _read(path).splitlines() if line.startswith("nameserver ") and line[11:]]
        usable = tuple(address for address in named if _usable(address, rootful))
        if usable:
            return usable
    return ()


def hosts(kind: Network, hostname: str) -> str:
    """The text of /etc/hosts."""
    text = _read("/etc/hosts") if kind == "host" else _LOCAL
    # In a named network the name stands for the address that the others see, see ``lan.py``.
    return text if kind.startswith(LAN) else f"{text.rstrip()}\n127.0.1.1 {hostname}\n"


def _usable(address: str, rootful: bool) -> bool:
    if ":" in address:
        # The bridge carries IPv4 only, and a link-local server belongs to a link that is not inside.
        return not rootful and "%" not in address and not address.lower().startswith(("fe80:", "::1"))
    if address.startswith(("127.", "0.")):
        return False
    # Inside pasta's network the host's own address is the container's.
    return rootful or not _own(address)


def _own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
