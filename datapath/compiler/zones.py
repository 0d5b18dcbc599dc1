# SPDX-License-Identifier: Apache-2.0
"""`isolate_clients`: connections are tracked in a zone of their network, so equal clients of two networks differ.

Only the original direction has the zone. An answer is found in zone 0, where it comes from a pod or a socket that
knows no zones; where two answers would look the same, NAT gives the newer connection another source port.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from datapath.compiler.context import Context
from datapath.plan.model import Note, NoteLevel, ZoneChange
from datapath.plan.nft import ZONES, BaseChain, ChainType, Hook, NftChain, NftMap, NftRule, NftTable
from datapath.plan.rtnl import Sysctl

#: Before the reassembly of fragments (-400), which keeps those of equal clients apart by the zone, too.
PRIORITY = -450
#: With everybody's source NAT: who gets there first does not matter, as nothing is decided there.
NAT_PRIORITY = 100
#: Requests wait no longer than this, whoever is killed while their connections move.
HELD_S = 20
_CLASHES, _HELD = "clashes", "held"
_ORIGIN = "networks[*].isolate_clients"


def zones_now(context: Context) -> dict[str, int]:
    """Zones by device, as they are to be."""
    return {network.device: network.ids.zone for network in context.networks if network.ids.zone}


def zone_changes(context: Context) -> tuple[ZoneChange, ...]:
    """Networks that are served already, and whose connections are in another zone than they are to be."""
    live = {ids.name: ids.zone for ids in context.facts.ids if ids.fwmark}
    live |= {name: zone for name, zone in context.facts.live_zones.items() if name in live}
    return tuple(
        ZoneChange(
            network.name,
            network.device,
            network.ids.fwmark,
            context.mask,
            live[network.name],
            network.ids.zone,
        )
        for network in sorted(context.networks, key=lambda network: network.name)
        if network.is_marked and live.get(network.name, network.ids.zone) != network.ids.zone
    )


def zones_before(context: Context, changes: Iterable[ZoneChange]) -> dict[str, int]:
    """Zones by device until connections move: a network that is not served yet has its own from the start."""
    zones = zones_now(context) | {change.device: change.old for change in changes}
    return {device: zone for device, zone in zones.items() if zone}


def with_zones(table: NftTable, zones: Mapping[str, int], held: Sequence[str] = ()) -> NftTable:
    """The table with what sets the zones; the same table where there are none.

    Args:
        table: without zones.
        zones: by device.
        held: devices whose packets are dropped, because their connections are being moved.
    """
    if not zones and not held:
        return table
    elements = tuple(sorted((f'"{device}"', str(zone)) for device, zone in zones.items()))
    maps = [NftMap(ZONES, "ifname", "integer", elements, typeof="iifname : ct zone")]
    if held:
        waiting = tuple((f'"{device}" timeout {HELD_S}s', "") for device in sorted(held))
        maps.append(NftMap(_HELD, "ifname", "", waiting, ("timeout",)))
    return table.also(_chains(held=bool(held)), maps)


def _chains(*, held: bool) -> Iterator[NftChain]:
    rules = [NftRule(f"iifname @{_HELD} drop", f"{_ORIGIN} while connections move")] if held else []
    rules.append(
        NftRule(f"ct original zone set iifname map @{ZONES}", f"{_ORIGIN} by the device they enter on")
    )
    yield NftChain(ZONES, tuple(rules), BaseChain(ChainType.FILTER, Hook.PREROUTING, PRIORITY))
    # Only where some chain of type nat is does the kernel look for a free port for connections that nobody translates.
    yield NftChain(
        _CLASHES,
        (NftRule("continue", f"{_ORIGIN} another source port where answers would clash"),),
        BaseChain(ChainType.NAT, Hook.INPUT, NAT_PRIORITY),
    )


def zone_sysctls(context: Context) -> Iterator[Sysctl]:
    """Where the kernel looks for a packet's socket before NAT, and keeps to it: there it must not look so early.

    The second of two equal clients of a local socket has another port only after NAT, and would get the first one's.
    """
    if context.facts.stale_early_demux and zones_now(context):
        # Of both families.
        for protocol in ("tcp", "udp"):
            yield Sysctl(f"net/ipv4/{protocol}_early_demux", "0")


def zone_notes(context: Context, changes: Iterable[ZoneChange]) -> Iterator[Note]:
    """What a reviewer should know."""
    if next(zone_sysctls(context), None):
        yield Note(
            NoteLevel.INFO,
            "host",
            "tcp_early_demux and udp_early_demux go to 0: before Linux 6.6, local sockets get packets of equal clients"
            " of another network",
        )
    origins = {network.name: network.origin for network in context.networks}
    for change in changes:
        yield Note(
            NoteLevel.WARNING,
            f"{origins[change.name]}.isolate_clients",
            f"connections move from conntrack zone {change.old} to {change.new}; meanwhile (25 ms for a thousand)"
            f" requests that enter by {change.device} are dropped and must be sent again",
        )
