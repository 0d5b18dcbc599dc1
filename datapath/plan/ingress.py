# SPDX-License-Identifier: Apache-2.0
"""What the tc eBPF program must know: which packets belong to which network, and what may enter there.

Interface names only: `kernel/` resolves them to ifindexes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

IpNetwork = IPv4Network | IPv6Network


class VlanProtocol(enum.IntEnum):
    """TPID of the tag that selects a network (`linux/if_ether.h`)."""

    UNTAGGED = 0
    DOT1Q = 0x8100
    DOT1AD = 0x88A8


class VipCheck(enum.StrEnum):
    """`reverse_path.vips`: how the source of a packet to one of the network's VIPs is checked."""

    FEASIBLE = "feasible"
    STRICT = "strict"
    OFF = "off"


class OtherCheck(enum.StrEnum):
    """`reverse_path.other`: how the source of any other packet is checked."""

    STRICT = "strict"
    LOOSE = "loose"
    OFF = "off"


class SourceAction(enum.StrEnum):
    """What the longest matching source prefix says."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, order=True)
class IngressPoint:
    """Where a network's packets are first seen: a device, and the outermost tag they carry there.

    Attributes:
        ifname: the device that the program is attached to: the network's own, or its trunk.
        vlan_protocol: TPID of the outermost tag, `UNTAGGED` where the device itself is the network.
        vlan_id: 1..4094, or 0 with `UNTAGGED`.
    """

    ifname: str
    vlan_protocol: VlanProtocol = VlanProtocol.UNTAGGED
    vlan_id: int = 0


@dataclass(frozen=True, slots=True)
class SourceRule:
    """One prefix of a network's source list; the longest match decides.

    Attributes:
        origin: the policy element that asked for it, for `explain`.
    """

    prefix: IpNetwork
    action: SourceAction
    origin: str = ""


@dataclass(frozen=True, slots=True)
class IngressNetwork:
    """One network as the program sees it.

    Attributes:
        name: the policy's name.
        slot: index of its counters and of its prefixes in the tries, 1..65535.
        fwmark: value (inside the mask) that its packets get; 0 leaves the mark alone (the network is
            only checked, not steered).
        point: where its packets are first seen.
        device: where the IP stack sees them: what a reverse-path lookup must answer.
        vips: the prefixes served here.
        feasible: prefixes that the network's own table can reach; `VipCheck.FEASIBLE` asks these.
    """

    name: str
    slot: int
    fwmark: int
    point: IngressPoint
    device: str
    vips: tuple[IpNetwork, ...] = ()
    vip_check: VipCheck = VipCheck.OFF
    other_check: OtherCheck = OtherCheck.OFF
    sources: tuple[SourceRule, ...] = ()
    feasible: tuple[IpNetwork, ...] = ()
    check_martians: bool = False


@dataclass(frozen=True, slots=True)
class IngressProgram:
    """Everything the program needs. No networks: nothing is attached."""

    fwmark_mask: int
    networks: tuple[IngressNetwork, ...] = field(default=())

    @property
    def attachments(self) -> tuple[str, ...]:
        """Devices that carry the program, sorted, each once: a trunk serves all its VLANs."""
        return tuple(sorted({n.point.ifname for n in self.networks}))
