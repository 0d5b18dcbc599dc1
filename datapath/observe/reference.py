# SPDX-License-Identifier: Apache-2.0
"""The source checks in plain Python: the specification that the eBPF program and the nft backend must agree with.

Nothing here is fast or clever on purpose. `judge` takes a frame as it arrives on a device, `verdict` a parsed
packet of a known network.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final, Protocol

from datapath.observe.packet import (
    ETH_P_IP,
    ETH_P_IPV6,
    ICMPV6,
    IGMP,
    UDP,
    FrameProblem,
    IpAddress,
    Packet,
    parse_frame,
    parse_ip,
)
from datapath.plan.ingress import (
    MARTIANS,
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    SourceRule,
    Verdict,
    VipCheck,
    VlanProtocol,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_BROADCAST: Final = ip_address("255.255.255.255")
_LINK_LOCAL: Final = IPv6Network("fe80::/10")
_LINK_MULTICAST: Final = IPv4Network("224.0.0.0/24")

_DHCP_SERVER, _DHCP_CLIENT = 67, 68
_DHCPV6_CLIENT, _DHCPV6_SERVER = 546, 547
_NEIGHBOUR_DISCOVERY: Final = range(133, 138)
_LISTENER_DISCOVERY: Final = frozenset({130, 131, 132, 143})


class ReversePath(enum.Enum):
    """Where the kernel would send a packet to a source."""

    NONE = enum.auto()
    OTHER = enum.auto()
    DEVICE = enum.auto()
    UNKNOWN = enum.auto()


class Fib(Protocol):
    """The routing of a node."""

    def reverse_path(self, device: str, source: IpAddress, destination: IpAddress) -> ReversePath:
        """Where a reply from `destination` to `source` would leave, as seen from `device`, without a mark.

        `UNKNOWN` where forwarding is off on that device: bpf_fib_lookup does not look then.
        """
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A frame as it comes in.

    Attributes:
        data: from the Ethernet header on.
        metadata_tag: TPID and TCI of a tag that the kernel has taken off already.
        mark: the packet's mark before.
        is_merged: GRO made one packet of several.
    """

    ifname: str
    data: bytes
    metadata_tag: tuple[int, int] | None = None
    mark: int = 0
    is_merged: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """What becomes of a frame.

    Attributes:
        slot: whose counter counts it; None if it belongs to no network.
        verdict: `PASS` for what belongs to no network, too.
        mark: of the packet afterwards.
    """

    slot: int | None
    verdict: Verdict
    mark: int

    @property
    def passes(self) -> bool:
        """Whether the packet goes on."""
        return self.verdict is Verdict.PASS


def judge(program: IngressProgram, arrival: Arrival, fib: Fib) -> Judgement:
    """What the program does with a frame.

    Args:
        program: the policy's networks.
        arrival: the frame, and where it arrives.
        fib: the node's routing.
    """
    frame = parse_frame(arrival.data, arrival.metadata_tag)
    if frame is FrameProblem.TOO_MANY_TAGS and _has_checks(program, arrival.ifname):
        return Judgement(slot=0, verdict=Verdict.MALFORMED, mark=arrival.mark)
    if isinstance(frame, FrameProblem) or frame.ethertype not in {ETH_P_IP, ETH_P_IPV6}:
        return Judgement(slot=None, verdict=Verdict.PASS, mark=arrival.mark)
    point = (arrival.ifname, frame.vlan_protocol, frame.vlan_id)
    network = next((net for net in program.networks if _point(net.point) == point), None)
    if network is None:
        return Judgement(slot=None, verdict=Verdict.PASS, mark=arrival.mark)
    packet = parse_ip(frame, is_merged=arrival.is_merged)
    reached = verdict(network, packet, program.common_sources, fib)
    mark = arrival.mark
    if reached is Verdict.PASS and network.fwmark:
        mark = (mark & ~program.fwmark_mask) | network.fwmark
    return Judgement(slot=network.slot, verdict=reached, mark=mark)


def _point(point: IngressPoint) -> tuple[str, VlanProtocol, int]:
    return (point.ifname, point.vlan_protocol, point.vlan_id)


def _has_checks(program: IngressProgram, ifname: str) -> bool:
    return any(network.is_checked for network in program.networks if network.point.ifname == ifname)


def verdict(
    network: IngressNetwork, packet: Packet | None, common_sources: Iterable[SourceRule], fib: Fib
) -> Verdict:
    """Whether a packet may enter on a network; the first check that fails names the verdict.

    Args:
        network: where it came in.
        packet: None if it is malformed.
        common_sources: source rules of all networks.
        fib: the node's routing.
    """
    if not network.is_checked:
        return Verdict.PASS
    if packet is None:
        return Verdict.MALFORMED
    if is_link_traffic(packet):
        return Verdict.PASS
    if network.check_martians and is_martian(packet.source):
        return Verdict.MARTIAN
    if network.check_sources and is_spoofed(packet.source, network.sources, common_sources):
        return Verdict.SPOOFED
    return _check_reverse_path(network, packet, fib)


def _check_reverse_path(network: IngressNetwork, packet: Packet, fib: Fib) -> Verdict:
    if has_no_reverse_path(packet):
        return Verdict.PASS
    if any(packet.destination in prefix for prefix in network.vips):
        return _check_vip(network, packet, fib)
    return _check_other(network, packet, fib)


def _check_vip(network: IngressNetwork, packet: Packet, fib: Fib) -> Verdict:
    """A packet to an address served here: the reply will follow the network's own table first."""
    if network.vip_check is VipCheck.OFF:
        return Verdict.PASS
    if any(packet.source in prefix for prefix in network.feasible):
        return Verdict.PASS
    if network.vip_check is VipCheck.FEASIBLE:
        return Verdict.VIP_UNREACHABLE
    return Verdict.PASS if _leads_back(network, packet, fib) else Verdict.VIP_STRICT


def _check_other(network: IngressNetwork, packet: Packet, fib: Fib) -> Verdict:
    """A packet to anything else: what the kernel's rp_filter would say, 1 or 2."""
    match network.other_check:
        case OtherCheck.OFF:
            return Verdict.PASS
        case OtherCheck.STRICT:
            return Verdict.PASS if _leads_back(network, packet, fib) else Verdict.RPF_STRICT
        case OtherCheck.LOOSE:
            path = fib.reverse_path(network.device, packet.source, packet.destination)
            return Verdict.RPF_LOOSE if path is ReversePath.NONE else Verdict.PASS


def _leads_back(network: IngressNetwork, packet: Packet, fib: Fib) -> bool:
    path = fib.reverse_path(network.device, packet.source, packet.destination)
    return path in {ReversePath.DEVICE, ReversePath.UNKNOWN}


def is_martian(source: IpAddress) -> bool:
    """Whether this address can never be a source."""
    return any(source in prefix for prefix in MARTIANS)


def is_spoofed(source: IpAddress, own: Iterable[SourceRule], common: Iterable[SourceRule]) -> bool:
    """The longest matching rule of both lists says deny; the network's own wins a tie; no match allows."""
    # max() keeps the first of equals.
    matches = [rule for rules in (own, common) for rule in rules if source in rule.prefix]
    longest = max(matches, key=lambda rule: rule.prefix.prefixlen, default=None)
    return longest is not None and longest.action is SourceAction.DENY


def is_link_traffic(packet: Packet) -> bool:
    """Traffic that keeps the link going, whatever its source: it passes before the first check.

    IPv6: link-local sources (the kernel never forwards them), neighbour and router discovery with the
    hop limit 255 that proves it local (RFC 4861), listener discovery of a host that has no address yet (RFC 3810).
    IPv4: DHCP and IGMP of a host without an address. 169.254/16 is no such case: the kernel forwards it.
    """
    if packet.version == 4:
        return _is_from_unnumbered(packet)
    if packet.source in _LINK_LOCAL:
        return True
    if packet.protocol != ICMPV6:
        return False
    is_neighbour_discovery = packet.hop_limit == 255 and packet.icmp_type in _NEIGHBOUR_DISCOVERY
    is_listener_discovery = (
        packet.hop_limit == 1 and int(packet.source) == 0 and packet.icmp_type in _LISTENER_DISCOVERY
    )
    return is_neighbour_discovery or is_listener_discovery


def _is_from_unnumbered(packet: Packet) -> bool:
    if int(packet.source) != 0:
        return False
    if packet.protocol == IGMP:
        return packet.destination.is_multicast
    ports = (packet.source_port, packet.destination_port)
    return (
        packet.protocol == UDP and ports == (_DHCP_CLIENT, _DHCP_SERVER) and packet.destination == _BROADCAST
    )


def has_no_reverse_path(packet: Packet) -> bool:
    """Traffic whose source must be acceptable but need not be routed by this device.

    To everybody on the link (the kernel's rp_filter leaves 224.0.0.0/24 out, too), and answers of a DHCP
    server to a client that has no route yet.
    """
    is_udp = packet.protocol == UDP
    ports = (packet.source_port, packet.destination_port)
    if packet.version == 4:
        if packet.destination == _BROADCAST or packet.destination in _LINK_MULTICAST:
            return True
        return is_udp and ports == (_DHCP_SERVER, _DHCP_CLIENT)
    destination = int(packet.destination)
    is_multicast, scope = destination >> 120 == 0xFF, destination >> 112 & 0x0F
    if is_multicast and scope in {1, 2}:
        return True
    return is_udp and ports == (_DHCPV6_SERVER, _DHCPV6_CLIENT) and packet.destination in _LINK_LOCAL
