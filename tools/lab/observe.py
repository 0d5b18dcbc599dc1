# SPDX-License-Identifier: Apache-2.0
"""Where the node's packets went: nft counters at the other ends of its two links.

They hang at the ingress of the router's and the gateway's port, so they see every frame that left the node there,
also what goes straight to a client on the VLAN. Tagged frames on a trunk are counted where the tag ends. After
un-DNAT the source of a reply is the VIP, so (source, destination, protocol) names the cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.lab.netns import Namespace
from tools.lab.topology import IpAddress

_TABLE = """
table netdev lab {{
  set seen4 {{ type ether_addr . ipv4_addr . ipv4_addr . inet_proto; size 65535; flags dynamic; counter; }}
  set seen6 {{ type ether_addr . ipv6_addr . ipv6_addr . inet_proto; size 65535; flags dynamic; counter; }}
  set wrong4 {{ type ipv4_addr;{wrong4} }}
  set wrong6 {{ type ipv6_addr;{wrong6} }}
  counter wrong_way {{ }}
  chain in {{
    type filter hook ingress device "{device}" priority 0; policy accept;
    ether type 8021q accept
    icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report }} accept
    update @seen4 {{ ether daddr . ip saddr . ip daddr . ip protocol }}
    meta protocol ip6 update @seen6 {{ ether daddr . ip6 saddr . ip6 daddr . meta l4proto }}
    ip daddr @wrong4 counter name wrong_way drop
    ip6 daddr @wrong6 counter name wrong_way drop
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """Packets that left the node by one link.

    Attributes:
        mac: whom the node sent them to.
        protocol: ``tcp``, ``udp``, ``icmp`` or ``ipv6-icmp``.
    """

    mac: str
    source: str
    destination: str
    protocol: str
    packets: int


class LinkCounter:
    """Counts what arrives at a namespace's port from the node; drops what never should."""

    def __init__(self, namespace: Namespace, device: str, wrong: Iterable[IpAddress] = ()) -> None:
        self._namespace = namespace
        chosen = list(wrong)
        elements = {f: ", ".join(str(a) for a in chosen if a.version == f) for f in (4, 6)}
        filled = {f"wrong{f}": f" elements = {{ {text} }}" if text else "" for f, text in elements.items()}
        namespace.nft(_TABLE.format(device=device, **filled))

    def reset(self) -> None:
        """Forget everything counted so far."""
        flush = "".join(f"flush set netdev lab seen{family}\n" for family in (4, 6))
        self._namespace.nft(f"{flush}reset counter netdev lab wrong_way\n")

    def read(self) -> list[Seen]:
        """Return what was counted since the last reset."""
        result = []
        for family in (4, 6):
            listing = json.loads(
                self._namespace.run("nft", "-j", "list", "set", "netdev", "lab", f"seen{family}")
            )
            for item in listing["nftables"]:
                for element in item.get("set", {}).get("elem", ()):
                    mac, source, destination, protocol = element["elem"]["val"]["concat"]
                    result.append(
                        Seen(mac, source, destination, str(protocol), element["elem"]["counter"]["packets"])
                    )
        return result

    def wrong_way(self) -> int:
        """Return the number of packets dropped because they should not have come here."""
        listing = json.loads(
            self._namespace.run("nft", "-j", "list", "counter", "netdev", "lab", "wrong_way")
        )
        return sum(int(i["counter"]["packets"]) for i in listing["nftables"] if "counter" in i)


def to_any(seen: Sequence[Seen], addresses: Iterable[str]) -> list[Seen]:
    """Return the entries whose source or destination is one of some addresses."""
    chosen = set(addresses)
    return [s for s in seen if s.source in chosen or s.destination in chosen]
