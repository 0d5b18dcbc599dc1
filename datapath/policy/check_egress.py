# SPDX-License-Identifier: Apache-2.0
"""`egress`: the network can carry it, its addresses lead back to that network, and what is inside is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import VipRange, shown, supernets, united
from datapath.policy.check_addresses import (
    NOT_SERVABLE_INDEX,
    NOT_SERVABLE_NAME,
    RangeIndex,
    duplicates,
    internal_index,
)
from datapath.policy.check_references import unknown_network
from datapath.policy.check_steering import is_direct
from datapath.policy.egress import POOL_MAX, Egress
from datapath.policy.model import ReturnPath

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from datapath.plan.ingress import IpNetwork
    from datapath.policy.model import Network
    from datapath.policy.readable import Readable

_KEYS = ("sources", "destinations", "exclude")


def egress(readable: Readable) -> Iterator[Problem]:
    """Each entry on its own and with its network."""
    if not readable.egress:
        return
    networks = {network.name: network for _, network in readable.networks}
    internal = internal_index(readable)
    vips = RangeIndex(vip for _, network in readable.networks for vip in network.vips)
    names: dict[str, int] = {}
    for index, entry in readable.egress:
        path: PolicyPath = ("egress", index)
        first = names.setdefault(entry.name, index)
        if first != index:
            yield Problem(
                (*path, "name"),
                f"the name {shown(entry.name)} is already that of egress[{first}]",
                "give each entry a name of its own",
            )
        yield from unknown_network((*path, "network"), entry.network, networks, readable)
        yield from _prefixes(path, entry)
        yield from _pool(path, entry, internal)
        network = networks.get(entry.network)
        if network is not None:
            yield from _carried(path, network, readable)
            yield from _addresses(path, entry, network)
            yield from _others(path, entry, network, readable, vips)
            yield from _families(path, entry, network, readable)


def egress_order(readable: Readable) -> Iterator[Problem]:
    """The first entry that matches decides: none may stand behind one that takes all of its connections."""
    whole: dict[IpNetwork, Egress] = {}
    lengths: set[int] = set()
    for index, entry in readable.egress:
        for position, prefix in enumerate(entry.sources):
            for wide in supernets(prefix, sorted(lengths)):
                if wide in whole:
                    yield Problem(
                        ("egress", index, "sources", position),
                        f"{prefix} is of egress {shown(whole[wide].name)} ({wide}), which takes all of its connections",
                        "put the narrower entry first, or give the other one `destinations`",
                    )
                    break
        if not entry.destinations and not entry.exclude:
            for prefix in entry.sources:
                if prefix.prefixlen:
                    whole.setdefault(prefix, entry)
                    lengths.add(prefix.prefixlen)


def _prefixes(path: PolicyPath, entry: Egress) -> Iterator[Problem]:
    for key in _KEYS:
        prefixes: Sequence[IpNetwork] = getattr(entry, key)
        yield from duplicates((*path, key), prefixes)
        for position, prefix in enumerate(prefixes):
            if prefix.prefixlen == 0:
                hint = (
                    "leave it out: that is the default"
                    if key == "destinations"
                    else "list those that are meant"
                )
                yield Problem((*path, key, position), f"{prefix} is every address", hint)


def _carried(path: PolicyPath, network: Network, readable: Readable) -> Iterator[Problem]:
    """New connections are steered by the network's fwmark, rule and table."""
    name = shown(network.name)
    if not _leads_out(network):
        yield Problem(
            (*path, "network"),
            f"network {name} has no gateway, so nothing outside can be reached by it",
            "give it one",
        )
    elif network.return_path is not ReturnPath.CONNTRACK:
        yield Problem(
            (*path, "network"),
            f"network {name} has `return_path: {network.return_path}`, and so no mark to steer connections by",
            "egress needs `return_path: conntrack` there",
        )
    elif is_direct(readable, network):
        yield Problem(
            (*path, "network"),
            f"network {name} has `steering: direct`, which knows answers only, no connections of our own",
            "give that network `steering: rules`",
        )


def _pool(path: PolicyPath, entry: Egress, internal: RangeIndex) -> Iterator[Problem]:
    """Addresses that replies can be sent to, and not too many of them."""
    for position, item in enumerate(entry.source_ranges):
        where = (*path, "source_ip", position)
        refused = NOT_SERVABLE_INDEX.overlapping(item)
        inside = internal.overlapping(item)
        if refused:
            yield Problem(
                where,
                f"{item} cannot be a source address: it is or holds {NOT_SERVABLE_NAME[refused]} ({refused})",
                "use addresses that the network's router sends here",
            )
        elif inside:
            yield Problem(
                where,
                f"{item} is or holds a part of node.internal ({inside})",
                "use addresses that the network's router sends here",
            )
    for family in (4, 6):
        if len(entry.pool(family)) > POOL_MAX:
            yield Problem(
                (*path, "source_ip"),
                f"more than {POOL_MAX} IPv{family} addresses",
                "a few are enough: each serves some ten thousand connections to one destination at a time",
            )


def _addresses(path: PolicyPath, entry: Egress, network: Network) -> Iterator[Problem]:
    """Replies to them come back by this network, and not to its router."""
    for position, item in enumerate(entry.source_ranges):
        where = (*path, "source_ip", position)
        if _leads_out(network) and not network.carries_egress(item.version):
            yield Problem(where, _no_way(network, item.version), f"remove {item}, or give the network one")
        held = next((gateway for gateway in network.gateway_addresses if gateway in item), None)
        if held is not None:
            yield Problem(where, f"{item} is or holds the gateway {held}", "leave the router its address")


def _others(
    path: PolicyPath, entry: Egress, network: Network, readable: Readable, vips: RangeIndex
) -> Iterator[Problem]:
    """Replies come back by no other network. A VIP of this one is its own, whoever else isolates clients of it."""
    own = united(network.vips)
    for position, item in enumerate(entry.source_ranges):
        for part in _besides(item, own):
            if vips.overlapping(part) is None:
                continue
            other = next(n for _, n in readable.networks if any(map(part.overlaps, n.vips)))
            yield Problem(
                (*path, "source_ip", position),
                f"{item} is or holds a VIP of network {shown(other.name)}: replies would come by that one",
                f"use an address of network {shown(network.name)}",
            )
            break


def _besides(item: VipRange, own: Iterable[VipRange]) -> Iterator[VipRange]:
    """What of a range is in none of these, which are sorted and do not overlap."""
    address, last = type(item.first), int(item.last)
    start = int(item.first)
    for vip in own:
        if vip.overlaps(item):
            if int(vip.first) > start:
                yield VipRange(address(start), address(int(vip.first) - 1))
            start = int(vip.last) + 1
    if start <= last:
        yield VipRange(address(start), item.last)


def _leads_out(network: Network) -> bool:
    """In any family; that it does not is a problem of its own."""
    return any(network.carries_egress(family) for family in (4, 6))


def _no_way(network: Network, family: int) -> str:
    if network.is_routed(family):
        return f"network {shown(network.name)} has no IPv{family} VIPs, and so no IPv{family} table"
    return f"network {shown(network.name)} has no IPv{family} gateway"


def _families(path: PolicyPath, entry: Egress, network: Network, readable: Readable) -> Iterator[Problem]:
    """What its sources have, the network and the source address must have, too; and what is inside is known."""
    served = entry.families(network)
    for position, prefix in enumerate(entry.sources):
        if not _leads_out(network) or prefix.version in served:
            continue
        if not network.carries_egress(prefix.version):
            hint = f"give it one, or leave IPv{prefix.version} sources out"
            yield Problem((*path, "sources", position), _no_way(network, prefix.version), hint)
        else:
            message = f"no IPv{prefix.version} address, but {prefix} is one of the sources"
            yield Problem((*path, "source_ip"), message, "add one")
    for key in ("destinations", "exclude"):
        for position, prefix in enumerate(getattr(entry, key)):
            if _leads_out(network) and prefix.version not in served:
                yield Problem(
                    (*path, key, position),
                    f"this entry has no connections of IPv{prefix.version}",
                    "remove it, or add sources and a source address of that family",
                )
    if readable.node is None:
        return
    known = {prefix.version for prefix in readable.node.internal}
    needed = {prefix.version for prefix in entry.sources} if not entry.set else set(served)
    for family in sorted(needed - known):
        yield Problem(
            path,
            f"nothing says which IPv{family} destinations are inside: pods' connections to each other and to services"
            " would be sent out",
            f"list the IPv{family} prefixes of pods and services in `node.internal`",
        )
