# SPDX-License-Identifier: Apache-2.0
"""What is looked at as packets enter: the mark of each network, and which sources it may carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_network

from datapath.compiler.context import STEERED, Context, NetworkContext
from datapath.compiler.routes import DEFAULT
from datapath.facts import LinkFacts
from datapath.plan.ingress import (
    IngressNetwork,
    IngressProgram,
    IpNetwork,
    OtherCheck,
    SourceAction,
    SourceRule,
    VipCheck,
    prefix_order,
)
from datapath.plan.rtnl import Family
from datapath.policy.addresses import collapse, prefix_range
from datapath.policy.check_addresses import RangeIndex

#: A /31 or /32 has no broadcast address (RFC 3021).
_LAST_WITH_BROADCAST = 30


def emit_ingress(context: Context, sent_from: Mapping[str, tuple[IpNetwork, ...]]) -> IngressProgram:
    """The program's input, sorted by slot; networks without a slot are not looked at.

    Args:
        context: the policy and the host.
        sent_from: by network, the addresses of connections that leave by it: their replies are checked as what
            comes to a VIP is.
    """
    parts = context.kept.ingress.emit(
        ((name, network) for name, network in context.named if network.ids.slot),
        context.unchanged,
        lambda network: (_network(network, sent_from.get(network.name, ())),),
        scope=sent_from,
    )
    networks = tuple(sorted((network for (network,) in parts.values()), key=lambda network: network.slot))
    checked = any(network.is_checked for network in networks)
    common = _common_sources(context, sent_from) if checked else ()
    return IngressProgram(context.mask, networks, common)


def _network(network: NetworkContext, sent_from: tuple[IpNetwork, ...]) -> IngressNetwork:
    checked = network.is_checked
    reverse_path = network.network.reverse_path
    return IngressNetwork(
        name=network.name,
        slot=network.ids.slot,
        fwmark=network.ids.fwmark,
        point=network.point,
        device=network.device,
        vips=collapse((*network.network.vip_prefixes, *sent_from))
        if sent_from
        else network.network.vip_prefixes,
        vip_check=_vip_check(network) if checked else VipCheck.OFF,
        other_check=reverse_path.other if checked else OtherCheck.OFF,
        sources=tuple(_own_sources(network)) if checked else (),
        feasible=tuple(_feasible(network)) if checked else (),
        check_martians=checked,
        check_sources=checked,
    )


def _vip_check(network: NetworkContext) -> VipCheck:
    """`feasible` asks the network's own table; where a family has none, replies follow the main one: `strict`."""
    wish = network.network.reverse_path.vips
    if wish is not VipCheck.FEASIBLE:
        return wish
    if network.network.has_external_routes:
        # Only the default gets here: the plan does not know what is in that table.
        return VipCheck.OFF
    if network.network.vrf is not None and any(
        not network.network.has_gateway(family) for family in network.treatments
    ):
        # Beyond the link, only what others have put into the VRF's table tells the way.
        return VipCheck.STRICT
    return wish if STEERED.issuperset(network.treatments.values()) else VipCheck.STRICT


def _common_sources(
    context: Context, sent_from: Mapping[str, tuple[IpNetwork, ...]]
) -> tuple[SourceRule, ...]:
    """Never a valid source on any network, unless the network itself says otherwise. The first of equal prefixes."""
    own = context.kept.own_addresses.emit(
        ((link.name, link) for link in context.facts.links),
        context.unchanged_links,
        lambda link: _denied(_own_addresses(link), "the node's own addresses"),
    )
    vips = context.kept.vips.emit(
        context.named,
        context.unchanged,
        lambda network: _denied(network.network.vip_prefixes, "networks[*].vips"),
    )
    internal = _denied(context.policy.node.internal, "node.internal")
    served = (prefix for network in context.networks for prefix in network.network.vip_prefixes)
    others = _denied(_besides(served, sent_from), "egress[*].source_ip")
    return context.kept.all_sources.merge((tuple(internal), *own.values(), *vips.values(), tuple(others)))


def _denied(prefixes: Iterable[IpNetwork], origin: str) -> Iterator[SourceRule]:
    for prefix in prefixes:
        yield SourceRule(prefix, SourceAction.DENY, origin)


def _besides(
    vips: Iterable[IpNetwork], sent_from: Mapping[str, tuple[IpNetwork, ...]]
) -> Iterator[IpNetwork]:
    """Addresses that are no VIPs: a VIP may move to another node, whose packets carry it then."""
    if not sent_from:
        return
    held = RangeIndex(map(prefix_range, vips))
    for addresses in sent_from.values():
        for address in addresses:
            if held.overlapping(prefix_range(address)) is None:
                yield address


def _own_addresses(link: LinkFacts) -> Iterator[IpNetwork]:
    """What a packet from outside can never carry, and what the kernel itself no longer refuses with `accept_local`."""
    for address in link.addresses:
        # Denied or passed as a whole, whoever has them. IPv4 link-local ones are addresses like any other.
        if address.ip.is_loopback or (address.version == 6 and address.ip.is_link_local):
            continue
        yield ip_network(address.ip)
        if address.version == 4 and address.network.prefixlen <= _LAST_WITH_BROADCAST:
            yield ip_network(address.network.broadcast_address)


def _own_sources(network: NetworkContext) -> Iterator[SourceRule]:
    """The network's own list; it wins against the common one where both name the same prefix."""
    reverse_path = network.network.reverse_path
    named: dict[IpNetwork, SourceRule] = {}
    element: tuple[tuple[str, SourceAction, Iterable[IpNetwork]], ...] = (
        ("reverse_path.deny", SourceAction.DENY, reverse_path.deny),
        ("reverse_path.allow", SourceAction.ALLOW, reverse_path.allow),
        ("on_link", SourceAction.ALLOW, _on_link(network)),
    )
    for name, action, prefixes in element:
        for prefix in prefixes:
            named.setdefault(prefix, SourceRule(prefix, action, f"{network.origin}.{name}"))
    for prefix in sorted(named, key=prefix_order):
        yield named[prefix]


def _on_link(network: NetworkContext) -> Iterator[IpNetwork]:
    """Where clients may be neighbours: the on-link prefixes, or the VIPs' own prefixes in a family that has none.

    Without a gateway the VIPs' prefix is on the link; with a link-local one nothing tells where the link's prefix ends.
    With a routing daemon it is a prefix that is announced, and no neighbour has an address of it.
    """
    known = network.network.effective_on_link
    yield from known
    if network.network.has_external_routes:
        return
    for vip in network.network.vips:
        if vip.is_single or any(prefix.version == vip.version for prefix in known):
            continue
        if vip.prefix:
            yield vip.prefix


def _feasible(network: NetworkContext) -> Iterator[IpNetwork]:
    """What the network's own table can reach: its on-link prefixes, and everything where it has a gateway."""
    if network.network.has_external_routes:
        return
    reachable = set(network.network.effective_on_link)
    reachable |= {DEFAULT[Family(gateway.version)] for gateway in network.network.gateway_addresses}
    yield from sorted(reachable, key=prefix_order)
