# SPDX-License-Identifier: Apache-2.0
"""BGP by FRR inside a namespace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from tools.lab.frr import FrrDaemons
from tools.lab.netns import Namespace
from tools.lab.topology import FAMILIES, Pair

_CONFIG: Final = """\
{before}router bgp {own}{vrf}
 bgp router-id {address.v4}
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor {peer.v4} remote-as {other}
 neighbor {peer.v6} remote-as {other}
 neighbor {peer.v4} timers 1 3
 neighbor {peer.v6} timers 1 3
 neighbor {peer.v4} timers connect 1
 neighbor {peer.v6} timers connect 1
 address-family ipv4 unicast
{lines4}
 exit-address-family
 address-family ipv6 unicast
  neighbor {peer.v6} activate
{lines6}
 exit-address-family
"""


@dataclass(frozen=True, slots=True)
class Speaker:
    """One side of two sessions over one link, one for each family.

    Attributes:
        own: number of the autonomous system.
        other: that of the peer.
        announced: addresses, whether or not there is a route to them, as MetalLB does it.
        announces_default: the peer gets a default route.
        table: what is learned goes there; 0 for where it would go by itself.
        vrf: whose link it is, if any.
    """

    own: int
    other: int
    address: Pair
    peer: Pair
    announced: tuple[Pair, ...] = ()
    announces_default: bool = False
    table: int = 0
    vrf: str = ""

    def config(self) -> str:
        """As it would stand in frr.conf."""
        lines = {family: "\n".join(self._lines(family)) for family in FAMILIES}
        # The map comes first: one that is not known yet denies everything for the five seconds of its delay timer.
        table = f"route-map TO-TABLE permit 10\n set table {self.table}\nexit\n" if self.table else ""
        return _CONFIG.format(
            before=table,
            own=self.own,
            other=self.other,
            vrf=f" vrf {self.vrf}" if self.vrf else "",
            address=self.address,
            peer=self.peer,
            lines4=lines[4],
            lines6=lines[6],
        )

    def _lines(self, family: int) -> Iterator[str]:
        for address in self.announced:
            yield f"  network {address.get(family)}/{address.get(family).max_prefixlen}"
        if self.announces_default:
            yield f"  neighbor {self.peer.get(family)} default-originate"
        if self.table:
            yield f"  neighbor {self.peer.get(family)} route-map TO-TABLE in"


class Frr(FrrDaemons):
    """A context manager: zebra and bgpd run in a namespace until it ends.

    Args:
        namespace: where.
        speaker: what bgpd is told.
    """

    def __init__(self, namespace: Namespace, speaker: Speaker) -> None:
        super().__init__(namespace, {"bgpd": speaker.config()})
        self._vrf = f"vrf {speaker.vrf} " if speaker.vrf else ""

    def wait_established(self, peer: str) -> None:
        """Wait until the session with a peer is up.

        Raises:
            LabError: it does not come up.
        """
        self.wait(lambda: self.state(peer) == "Established", f"the session with {peer} is up")

    def state(self, peer: str) -> str:
        """State of the session with a peer, as BGP calls it; empty for one that is not configured."""
        found: dict[str, Any] = self.ask(f"show bgp {self._vrf}neighbors {peer}").get(peer, {})
        return str(found.get("bgpState", ""))
