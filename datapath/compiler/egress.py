# SPDX-License-Identifier: Apache-2.0
"""`egress`: connections that are opened from inside leave by a network, with an address of it, or not at all.

The first packet of a connection decides: after destination NAT, so that what goes to a service is known for what
it is, its source is looked up and the connection gets the egress mark of the network. Every packet in that
direction then gets the network's own mark, which the ip rules send to its table; replies never do. Before
anybody else's source NAT the connection gets its address. The last chain of all lets no packet out that is not
as it must be: whatever is missing, late or in the midst of a change costs a packet, and leaks none.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from datapath.compiler.context import Context, NetworkContext
from datapath.plan.egress import EgressEntry, member_elements, members_set
from datapath.plan.ingress import IpNetwork, address_order, prefix_order
from datapath.plan.model import Note, NoteLevel, Plan
from datapath.plan.nft import NftTable
from datapath.plan.rtnl import Family
from datapath.policy import Egress, IpAddress, VipRange
from datapath.policy.check_addresses import RangeIndex


@dataclass(frozen=True)
class EgressContext:
    """One entry with what follows from its network and the facts."""

    entry: Egress
    network: NetworkContext
    plan: EgressEntry

    @property
    def origin(self) -> str:
        return f"egress[{self.entry.name}]"


def resolve_egress(context: Context) -> tuple[EgressContext, ...]:
    """The entries in the order of the file."""
    networks = {network.name: network for network in context.networks}
    return tuple(_resolve(entry, networks[entry.network], context) for entry in context.policy.egress)


def _resolve(entry: Egress, network: NetworkContext, context: Context) -> EgressContext:
    families = tuple(Family(family) for family in entry.families(network.network))
    addresses = [
        address
        for family in families
        for address in (_own_address(network, family) if entry.has_own_address else entry.pool(family))
    ]
    members = context.facts.egress_sets.get(entry.name, ()) if entry.set else None
    return EgressContext(
        entry,
        network,
        EgressEntry(
            entry.name, network.name, network.device, entry.sources, members, families, tuple(addresses)
        ),
    )


def _own_address(network: NetworkContext, family: Family) -> tuple[IpAddress, ...]:
    """The device's address in its gateway's subnet, else its first one that is good beyond the link."""
    if network.link is None:
        return ()
    # None where a routing daemon or a VRF knows the next hops.
    gateways = [address for address in network.network.gateway_addresses if address.version == family]
    usable = [
        address
        for address in network.link.addresses
        if address.version == family and not address.ip.is_link_local and not address.ip.is_loopback
    ]
    usable.sort(key=lambda address: not any(gateway in address.network for gateway in gateways))
    return tuple(address.ip for address in usable[:1])


def source_addresses(entries: Iterable[EgressContext]) -> dict[str, tuple[IpNetwork, ...]]:
    """What replies that enter by a network are sent to, by its name."""
    found: dict[str, set[IpNetwork]] = {}
    for item in entries:
        found.setdefault(item.network.name, set()).update(map(ip_network, item.plan.addresses))
    return {name: tuple(sorted(prefixes, key=prefix_order)) for name, prefixes in found.items()}


def with_members(plan: Plan, sets: Mapping[str, tuple[IpNetwork, ...]]) -> Plan:
    """The same plan with other members: what a large policy need not be compiled anew for."""
    entries = tuple(
        item if item.members is None else dataclasses.replace(item, members=sets.get(item.name, ()))
        for item in plan.egress
    )
    filled = {
        members_set(item.name, family): member_elements(item.members, family)
        for item in entries
        if item.members is not None
        for family in item.families
    }
    return dataclasses.replace(
        plan,
        egress=entries,
        table=_filled(plan.table, filled),
        transition=_filled(plan.transition, filled),
        holding=_filled(plan.holding, filled),
    )


def _filled(table: NftTable | None, elements: Mapping[str, tuple[tuple[str, str], ...]]) -> NftTable | None:
    if table is None:
        return None
    maps = tuple(
        dataclasses.replace(item, elements=elements[item.name]) if item.name in elements else item
        for item in table.maps
    )
    return dataclasses.replace(table, maps=maps)


def egress_notes(context: Context, entries: tuple[EgressContext, ...]) -> Iterator[Note]:
    """Where the host does not have what an entry needs, or an entry takes more than is meant."""
    if not entries:
        return
    own = {
        address.ip for link in context.facts.links for address in link.addresses if not address.ip.is_loopback
    }
    ordered = sorted(own, key=address_order)
    vips = RangeIndex(vip for network in context.networks for vip in network.network.vips)
    for item in entries:
        for family in item.plan.families:
            if item.plan.lacks_address(family):
                yield Note(
                    NoteLevel.WARNING,
                    item.origin,
                    f"{item.network.device} has no IPv{family} address: IPv{family} connections of these sources are"
                    " dropped until it has one",
                )
        unheld = [a for a in item.plan.addresses if a not in own and vips.overlapping(VipRange(a, a)) is None]
        if unheld:
            more = f" and {len(unheld) - 1} more" if len(unheld) > 1 else ""
            yield Note(
                NoteLevel.INFO,
                item.origin,
                f"{unheld[0]}{more}: no VIP and no address of this node, so answers come only if the router has a route"
                " for it, or somebody answers ARP and neighbour discovery",
            )
        held = sorted(map(str, _within(item.entry.sources, ordered)))
        if held and not item.entry.destinations:
            yield Note(
                NoteLevel.WARNING,
                item.origin,
                f"the sources hold the node's own address {held[0]}: what its system services and tunnels open"
                f" leaves by {item.network.name}, too; name `destinations`, or `exclude` the other nodes",
            )


def _within(prefixes: Iterable[IpNetwork], ordered: Sequence[IpAddress]) -> Iterator[IpAddress]:
    """Those of a sorted list that are in any of the prefixes."""
    for prefix in prefixes:
        begin = bisect.bisect_left(ordered, address_order(prefix.network_address), key=address_order)
        end = bisect.bisect_right(ordered, address_order(prefix.broadcast_address), key=address_order)
        yield from ordered[begin:end]
