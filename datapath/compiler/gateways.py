# SPDX-License-Identifier: Apache-2.0
"""Several gateways of a network: which get which flows, and what the daemon watches.

The kernel gives each next hop a part of the range of hash values, in the order of the hops. When a gateway goes down,
only its own part may find other owners: so it is dealt out in its place, and the parts of the others stay where they
are. IPv4 takes the same gateway several times in one route, so that each of the others gets its share of that part;
IPv6 refuses that, and the part goes to the neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from math import gcd

from datapath.compiler.context import Context
from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, NextHop, Route
from datapath.policy import Network, Policy
from datapath.policy.gateways import GatewayMode

Address = IPv4Address | IPv6Address
#: Of one next hop: `rtnh_hops` is a byte, and counts from 0.
_WEIGHT_MAX = 256


def by_gateways(route: Route, network: Network, down: Collection[Address]) -> Route:
    """The route by those gateways of its family that are to be used; there is at least one."""
    hops = next_hops(network, route.family, down)
    if len(hops) == 1:
        return dataclasses.replace(route, gateway=hops[0].gateway, hops=())
    return dataclasses.replace(route, gateway=None, hops=hops)


def next_hops(network: Network, family: Family, down: Collection[Address]) -> tuple[NextHop, ...]:
    """In use with these gateways down. All down is as good as none: a check must never be what cuts a node off."""
    if not network.gateways:
        return tuple(NextHop(address) for address in network.gateway if address.version == family)
    gateways = network.gateways_of(family)
    shares = [(gateway.address, gateway.weight) for gateway in gateways]
    down = {address for address, _ in shares} & set(down)
    if len(down) == len(shares):
        down = set()
    if network.gateway_mode is GatewayMode.ACTIVE_STANDBY:
        return (next(NextHop(address) for address, _ in shares if address not in down),)
    return _reduced(_deal(shares, down) if family is Family.IPV4 else _absorb(shares, down))


def _deal(shares: Sequence[tuple[Address, int]], down: Collection[Address]) -> list[tuple[Address, int]]:
    """The part of each that is down as parts of all the others, in proportion to their weights."""
    alive = [(address, weight) for address, weight in shares if address not in down]
    total = sum(weight for _, weight in alive)
    dealt: list[tuple[Address, int]] = []
    for address, weight in shares:
        if address in down:
            dealt += [(other, weight * part) for other, part in alive]
        else:
            dealt.append((address, weight * total))
    return dealt


def _absorb(shares: Sequence[tuple[Address, int]], down: Collection[Address]) -> list[tuple[Address, int]]:
    """The part of each that is down for the next one before it and the next one behind it, half each."""
    parts = {address: 0 for address, _ in shares if address not in down}
    alive = [address for address, _ in shares if address not in down]
    passed = 0
    for address, weight in shares:
        if address not in down:
            parts[address] += 2 * weight
            passed += 1
            continue
        before, behind = alive[max(passed - 1, 0)], alive[min(passed, len(alive) - 1)]
        parts[before] += weight
        parts[behind] += weight
    return list(parts.items())


def _reduced(parts: list[tuple[Address, int]]) -> tuple[NextHop, ...]:
    """Neighbours of one gateway as one hop, and weights that the kernel takes."""
    merged: list[tuple[Address, int]] = []
    for address, weight in parts:
        if merged and merged[-1][0] == address:
            merged[-1] = (address, merged[-1][1] + weight)
        else:
            merged.append((address, weight))
    divisor = gcd(*(weight for _, weight in merged))
    largest = max(weight for _, weight in merged) // divisor
    if largest <= _WEIGHT_MAX:
        return tuple(NextHop(address, weight // divisor) for address, weight in merged)
    # A few flows more move than need to: parts of such weights do not come out even.
    scale = _WEIGHT_MAX / (largest * divisor)
    return tuple(NextHop(address, max(1, round(weight * scale))) for address, weight in merged)


def gateways_in_use(
    network: Network, families: Collection[int], down: Collection[Address]
) -> tuple[Address, ...]:
    """One for each of the families, where only one can be used at a time."""
    return tuple(
        hop.gateway for family in Family if family in families for hop in next_hops(network, family, down)[:1]
    )


def emit_checks(context: Context) -> tuple[GatewayCheck, ...]:
    """Gateways to be watched, in the order of the policy: those whose answers something depends on."""
    return tuple(
        check for network in context.networks if network.is_steered for check in _checks(network.network)
    )


def _checks(network: Network) -> Iterator[GatewayCheck]:
    wish = network.gateway_check
    if wish.method is CheckMethod.OFF:
        return
    for gateway in network.gateways:
        yield GatewayCheck(
            network.name,
            network.device,
            gateway.address,
            wish.method,
            wish.interval_ms / 1000,
            wish.multiplier,
            wish.recovery,
            wish.hold_s,
            wish.bfd_socket if wish.method is CheckMethod.BFD else "",
        )


def rerouted(plan: Plan, policy: Policy, down: dict[str, tuple[Address, ...]]) -> Plan:
    """The plan as it would be compiled with these gateways down instead; much cheaper than to compile it."""
    tables = {ids.name: ids.table for ids in plan.ids}
    several = {network.name: network for network in policy.networks if network.gateways}
    # Several networks may share the table of a VRF.
    owners = {(tables.get(name, 0), network.device): network for name, network in several.items()}
    routes = tuple(
        by_gateways(route, owner, down.get(owner.name, ()))
        if (route.gateway is not None or route.hops) and (owner := owners.get((route.table, route.device)))
        else route
        for route in plan.routes
    )
    steered = tuple(
        dataclasses.replace(
            item,
            gateways=gateways_in_use(
                several[item.name], {address.version for address in item.gateways}, down.get(item.name, ())
            ),
        )
        if item.name in several
        else item
        for item in plan.steering.networks
    )
    steering = dataclasses.replace(plan.steering, networks=steered)
    return dataclasses.replace(plan, routes=tuple(sorted(routes, key=Route.sort_key)), steering=steering)
