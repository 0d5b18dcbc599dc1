# SPDX-License-Identifier: Apache-2.0
"""Routes: a table for each steered network, and on-link routes for VIPs that have no gateway."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from datapath.compiler.context import ROUTED, Context, NetworkContext, Treatment, on_own_subnet
from datapath.compiler.gateways import by_gateways
from datapath.plan.ingress import IpNetwork
from datapath.plan.rtnl import TABLE_MAIN, Family, Route, RouteType

DEFAULT: dict[Family, IpNetwork] = {
    Family.IPV4: IPv4Network("0.0.0.0/0"),
    Family.IPV6: IPv6Network("::/0"),
}
#: What the kernel gives an IPv6 route without a metric; IPv4 routes get 0. Said aloud, so that a dump compares.
METRIC: dict[Family, int] = {Family.IPV4: 0, Family.IPV6: 1024}
#: Behind every other route: a reply whose network is down is refused, it never leaves by another gateway.
LAST_METRIC = 0xFFFFFFFF
#: Ours in the table of a VRF, where others have routes, too: before those of routing daemons (FRR: 20) and of NMState
#: (150), behind those of people (0), and never in their place.
VRF_METRIC = 10
#: Link-local clients are on the link itself; the main table has this route for every device, ours must, too.
LINK_LOCAL = IPv6Network("fe80::/64")


def emit_routes(context: Context) -> tuple[Route, ...]:
    """All routes, sorted."""
    parts = context.kept.routes.emit(
        context.named,
        context.unchanged,
        lambda network: _network_routes(context, network),
        scope=context.facts.ipv6,
    )
    return context.kept.all_routes.merge(tuple(parts.values()))


def external_tables(context: Context) -> tuple[int, ...]:
    """Tables that others fill, sorted."""
    return tuple(
        sorted(
            {
                network.ids.table
                for network in context.networks
                if network.network.has_external_routes and any(network.families(*ROUTED))
            }
        )
    )


def _network_routes(context: Context, network: NetworkContext) -> Iterator[Route]:
    for family in network.families(Treatment.ON_LINK):
        for prefix in network.vip_prefixes(family):
            if on_own_subnet(prefix, network.link) is None:
                yield Route(TABLE_MAIN, prefix, network.device, metric=METRIC[family])
    if network.network.vrf is not None:
        yield from _vrf_routes(context, network, network.network.vrf.table)
        return
    for family in network.families(*ROUTED):
        table = network.ids.table
        on_link = {*network.network.effective_on_link, LINK_LOCAL}
        for prefix in on_link:
            if prefix.version == family:
                yield Route(table, prefix, network.device, metric=METRIC[family])
        if network.network.has_gateway(family):
            default = Route(table, DEFAULT[family], network.device, metric=METRIC[family])
            yield by_gateways(default, network.network, _down(context, network))
        yield Route(table, DEFAULT[family], type=RouteType.UNREACHABLE, metric=LAST_METRIC)


def _down(context: Context, network: NetworkContext) -> tuple[IPv4Address | IPv6Address, ...]:
    return context.facts.gateways_down.get(network.name, ())


def _vrf_routes(context: Context, network: NetworkContext, table: int) -> Iterator[Route]:
    """The kernel itself has the routes of the device's addresses there, link-local ones included.

    The last one is there in both families, whatever the VIPs: a look-up that finds nothing would go on to main.
    """
    families = set(network.families(*ROUTED))
    for prefix in network.network.link_prefixes:
        if prefix.version in families:
            yield Route(table, prefix, network.device, metric=VRF_METRIC)
    for family in families:
        if network.network.has_gateway(family):
            default = Route(table, DEFAULT[family], network.device, metric=VRF_METRIC)
            yield by_gateways(default, network.network, _down(context, network))
    for family in Family:
        if context.facts.has_family(family):
            yield Route(table, DEFAULT[family], type=RouteType.UNREACHABLE, metric=LAST_METRIC)
