# SPDX-License-Identifier: Apache-2.0
"""What the egress program of `steering: direct` must know: whose answers go where, and which packets are left alone.

Interface names only: `kernel/` resolves them to ifindexes.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath.plan.ingress import IpNetwork


@dataclass(frozen=True, slots=True)
class SteeredNetwork:
    """One network, in the families in which its answers are steered.

    Attributes:
        slot: index of its counters, the same as at ingress; 1..65535.
        device: where its packets leave the node.
        vips: sources of its answers.
        gateways: one for each family of `vips`.
        on_link: destinations that are reached directly on the device.
    """

    name: str
    slot: int
    device: str
    vips: tuple[IpNetwork, ...]
    gateways: tuple[IPv4Address | IPv6Address, ...]
    on_link: tuple[IpNetwork, ...] = ()

    def gateway(self, family: int) -> IPv4Address | IPv6Address:
        """The gateway of a family that has VIPs."""
        return next(address for address in self.gateways if address.version == family)


@dataclass(frozen=True, slots=True)
class SteeringProgram:
    """Everything the program needs. No networks: nothing is attached.

    Attributes:
        devices: that main's default routes leave by; sorted.
        networks: no VIP in two of them.
        passed: destinations that are never steered, whatever the source.
    """

    devices: tuple[str, ...] = ()
    networks: tuple[SteeredNetwork, ...] = ()
    passed: tuple[IpNetwork, ...] = ()

    @property
    def attachments(self) -> tuple[str, ...]:
        """Devices that carry the program."""
        return self.devices if self.networks else ()
