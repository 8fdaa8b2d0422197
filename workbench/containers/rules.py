"""The bridge's rules: nf_tables expressions (nft(8), linux/netfilter/nf_tables.h) in the form that pyroute2 takes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from workbench.containers import links

if TYPE_CHECKING:
    import ipaddress

_NAME = links.BRIDGE.encode().ljust(16, b"\0")


class Rules:
    """nf_tables expressions (nft(8)), as lists that pyroute2 takes."""

    def __init__(self, expressions: Any) -> None:
        self._new = expressions.genex
        self.masquerade = expressions.masq
        self._verdict = expressions.verdict
        self._address = expressions.ipv4addr

    def _is(self, value: bytes, equal: bool = True) -> dict[str, Any]:
        data = {"attrs": [("NFTA_DATA_VALUE", value)]}
        return dict(self._new("cmp", {"sreg": 1, "op": int(not equal), "data": data}))

    def _interface(self, key: int, equal: bool) -> list[dict[str, Any]]:
        return [self._new("meta", {"key": key, "dreg": 1}), self._is(_NAME, equal)]

    def passes_bridge(self, expressions: Iterable[Any]) -> bool:
        """Whether a rule that the kernel told of is ``from_bridge`` or ``to_bridge`` and ``accept``, no more."""
        parts = list(expressions)
        if [part.get_attr("NFTA_EXPR_NAME") for part in parts] != ["meta", "cmp", "immediate"]:
            return False
        compared = parts[1].get_attr("NFTA_EXPR_DATA").get_attr("NFTA_CMP_DATA")
        return bool(compared.get_attr("NFTA_DATA_VALUE") == _NAME)

    def from_bridge(self) -> list[dict[str, Any]]:
        """It came in by the bridge."""
        return self._interface(6, True)  # NFT_META_IIFNAME

    def to_bridge(self, equal: bool) -> list[dict[str, Any]]:
        """It goes out by the bridge; with False, elsewhere."""
        return self._interface(7, equal)  # NFT_META_OIFNAME

    def source(self, network: ipaddress.IPv4Network) -> list[dict[str, Any]]:
        """It comes from that network."""
        return list(self._address(src=str(network)))

    def answers(self) -> list[dict[str, Any]]:
        """Packets of connections that were made the other way (ct state established,related)."""
        mask = {"attrs": [("NFTA_DATA_VALUE", struct.pack("=I", 2 | 4))]}
        zero = {"attrs": [("NFTA_DATA_VALUE", bytes(4))]}
        return [
            self._new("ct", {"key": 0, "dreg": 1}),
            self._new("bitwise", {"sreg": 1, "dreg": 1, "len": 4, "mask": mask, "xor": zero}),
            self._is(bytes(4), equal=False),
        ]

    def port(self, protocol: int, number: int) -> list[dict[str, Any]]:
        """To this port of that protocol."""
        return [
            self._new("meta", {"key": 16, "dreg": 1}),  # NFT_META_L4PROTO
            self._is(bytes([protocol])),
            self._new("payload", {"dreg": 1, "base": 2, "offset": 2, "len": 2}),
            self._is(struct.pack("!H", number)),
        ]

    def accept(self) -> list[dict[str, Any]]:
        """Let it pass this chain."""
        return list(self._verdict(code=1))

    def drop(self) -> list[dict[str, Any]]:
        """It never was."""
        return list(self._verdict(code=0))

    def reject(self) -> list[dict[str, Any]]:
        """Refuse at once, with an ICMP "port unreachable"."""
        return [self._new("reject", {"type": 0, "icmp_code": 3})]
