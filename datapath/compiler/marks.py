# SPDX-License-Identifier: Apache-2.0
"""The nftables half: remember the network of a connection, and give it back to replies only.

The tc program marks a packet as it enters. After conntrack and before destination NAT, the mark moves
into the connection and leaves the packet: an original packet that kept it would be routed back out of
its VLAN once DNAT has changed its destination. A reply gets it back before it is routed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datapath.compiler.acceleration import NO_ACCELERATION, Acceleration
from datapath.compiler.context import Context, NetworkContext
from datapath.compiler.flowtables import emit_swap
from datapath.compiler.rules import group_count
from datapath.plan.egress import egress_name
from datapath.plan.model import NetworkIds, ZoneChange
from datapath.plan.nft import (
    FULL,
    IDS,
    TABLE_FAMILY,
    TABLE_NAME,
    BaseChain,
    ChainType,
    Hook,
    NftChain,
    NftMap,
    NftRule,
    NftTable,
)
from datapath.policy.model import Track

#: After conntrack (-200), before destination NAT (-100); -150 would tie with Calico and OVN-Kubernetes,
#: where the order of registration decides.
PRIORITY = -140
_FOLLOW = "follow"
#: First key, in the set of ids, of the marks of `egress`: behind every slot.
_EGRESS_KEYS = 0x80000000
#: After so many bits a chain looks whether any are left.
_BITS_AT_ONCE = 4


def ids_comment(ids: NetworkIds, zone: int = 0) -> str:
    """What `kernel/` reads back: `network=public fwmark=0x00010000 table=700001 slot=1`, and ` zone=40001` if any.

    A table of a VRF is followed by ` vrf`.
    """
    table = f"{ids.table} vrf" if ids.in_vrf else f"{ids.table}"
    text = f"network={ids.name} fwmark={ids.fwmark:#010x} table={table} slot={ids.slot}"
    return f"{text} zone={zone}" if zone else text


@dataclass(frozen=True, slots=True)
class Classification:
    """What nftables does in place of the tc program; empty where that program does it."""

    chains: tuple[NftChain, ...] = ()
    maps: tuple[NftMap, ...] = ()
    counters: tuple[str, ...] = ()

    def also(self, other: Classification) -> Classification:
        """This and what another feature has for the table."""
        return Classification(
            (*self.chains, *other.chains), (*self.maps, *other.maps), (*self.counters, *other.counters)
        )


def emit_table(
    context: Context,
    classification: Classification,
    *,
    rule_bank: int,
    acceleration: Acceleration = NO_ACCELERATION,
    moving: tuple[ZoneChange, ...] = (),
) -> NftTable | None:
    """The table without its zones, or None where no network needs an id.

    Args:
        context: with the ids.
        classification: what looks at packets as they enter.
        rule_bank: of the ip rules.
        acceleration: what carries established connections past all this.
        moving: networks whose connections are still in another zone: their comments say so, for whoever comes next.
    """
    remembered = [network for network in context.networks if any(_numbers(network))]
    # A network that is steered directly has nothing here but its slot, and the state remembers that.
    if not classification.chains and all(network.is_direct for network in remembered):
        return None
    marked = [network for network in remembered if network.is_marked]
    chains = [_about_chain(context, rule_bank), *classification.chains, *acceleration.chains]
    maps: list[NftMap] = [_ids_set(context, remembered, moving), *classification.maps]
    maps += acceleration.maps
    if marked:
        followers = [network for network in marked if network.network.track is Track.LAST]
        chains += _hook_chains(context.mask, follow=bool(followers))
        chains += _copy_chains(context.mask)
        chains += emit_swap(context, marked, has_own=bool(acceleration.flowtables))
        chains += [_follow_chain(network, context.mask) for network in followers]
        maps += _follow_map(followers)
    return NftTable(
        TABLE_FAMILY,
        TABLE_NAME,
        counters=tuple(sorted(classification.counters)),
        flowtables=acceleration.flowtables,
    ).also(chains, maps)


def _numbers(network: NetworkContext) -> tuple[int, int, int]:
    return network.ids.fwmark, network.ids.table, network.ids.slot


def _about_chain(context: Context, rule_bank: int) -> NftChain:
    tree = " tree" if group_count(context) > 1 else ""
    header = NftRule("continue", f"fwmark_mask={context.mask:#010x} rule_bank={rule_bank}{tree}")
    return NftChain(IDS, (header,))


def _ids_set(context: Context, networks: list[NetworkContext], moving: tuple[ZoneChange, ...]) -> NftMap:
    """Elements, not rules: one more network is one more element, and thousands are listed in some milliseconds."""
    old = {change.name: change.old for change in moving}
    parts = context.kept.ids.emit(
        ((network.name, network) for network in networks),
        context.unchanged,
        lambda n: ((f"{n.ids.slot:#010x}", ids_comment(n.ids, old.get(n.name, n.ids.zone))),),
        scope=old,
    )
    # Not the mark itself: a low one could be the slot of a network.
    others = tuple(
        (f"{_EGRESS_KEYS + number:#010x}", ids_comment(NetworkIds(egress_name(name), fwmark)))
        for number, (name, fwmark) in enumerate(sorted(context.egress_marks.items()))
    )
    return NftMap(IDS, "mark", "", context.kept.all_ids.merge((*parts.values(), others)))


def _hook_chains(mask: int, *, follow: bool) -> list[NftChain]:
    ours = f"& {mask:#010x}"
    # Whether the connection has any mark comes first: most connections of a node have none.
    reply = NftRule("ct mark != 0 ct direction reply goto reply", "networks[*].return_path reply")
    unmarked = f"meta mark set meta mark & {FULL & ~mask:#010x}"
    ingress = [
        NftRule(
            f"ct direction reply {unmarked} goto reply", "networks[*].return_path reply that a VLAN brings"
        ),
        NftRule(
            f"ct mark {ours} == 0 jump save",
            "networks[*].return_path request: save the network it came in by, also for flows older than this",
        ),
    ]
    if follow:
        ingress.append(
            NftRule(
                f"ct mark {ours} != 0 meta mark {ours} vmap @{_FOLLOW}",
                "networks[*].track last: the connection moves to the network of its last request",
            )
        )
    ingress.append(NftRule(unmarked, "networks[*].return_path request: routed as without the policy"))
    return [
        NftChain(
            "prerouting",
            (NftRule(f"meta mark {ours} != 0 goto ingress", "networks[*] marked as it entered"), reply),
            BaseChain(ChainType.FILTER, Hook.PREROUTING, PRIORITY),
        ),
        NftChain("ingress", tuple(ingress)),
        # Only a chain of type route makes the kernel look the route up again when the mark changes.
        NftChain("output", (reply,), BaseChain(ChainType.ROUTE, Hook.OUTPUT, PRIORITY)),
    ]


def _copy_chains(mask: int) -> list[NftChain]:
    """Make target = (target & ~mask) | (source & mask), however many networks there are.

    nft before 1.1 and Linux before 6.14 cannot combine two variables. Where the target has no bit at all, which
    is the rule, there is nothing to combine: one masked write. Else bit by bit, beside those of others.
    """
    ours = f"& {mask:#010x}"
    save, restore = "networks[*].return_path save the mark", "networks[*].return_path restore the mark"
    return [
        # Nobody comes here whose connection has a bit of ours: there is nothing to clear.
        NftChain(
            "save",
            (
                NftRule(f"ct mark 0 ct mark set meta mark {ours} return", save),
                *_bit_by_bit("meta mark", "ct mark", mask, save),
            ),
        ),
        NftChain(
            "reply",
            (
                NftRule("meta mark != 0 goto restore", f"{restore} beside bits of others"),
                NftRule(f"meta mark set ct mark {ours}", restore),
            ),
        ),
        NftChain(
            "restore",
            (
                NftRule(f"ct mark {ours} == 0 return", f"{restore} if there is one"),
                # A local socket may have set its own mark (SO_MARK): the connection's network wins.
                NftRule(f"meta mark set meta mark & {FULL & ~mask:#010x}", f"{restore} and no other"),
                *_bit_by_bit("ct mark", "meta mark", mask, restore),
            ),
        ),
    ]


def _bit_by_bit(source: str, target: str, mask: int, origin: str) -> Iterator[NftRule]:
    rest = mask
    for position, bit in enumerate(_bits(mask)):
        if position and position % _BITS_AT_ONCE == 0:
            yield NftRule(f"{source} & {rest:#010x} == 0 return", f"{origin} until no bit is left")
        copy = f"{source} & {bit:#010x} != 0 {target} set {target} | {bit:#010x}"
        yield NftRule(copy, f"{origin} bit by bit")
        rest &= ~bit


def _bits(mask: int) -> Iterator[int]:
    """Single bits of the mask, the lowest first: small numbers of networks use only these."""
    while mask:
        yield mask & -mask
        mask &= mask - 1


def _follow_chain(network: NetworkContext, mask: int) -> NftChain:
    """A constant a network: a connection that others are looking at changes its network in one write."""
    write = f"& {FULL & ~mask:#010x} | {network.ids.fwmark:#010x}"
    rule = NftRule(f"ct mark set ct mark {write}", f"{network.origin}.track last: move the connection")
    return NftChain(f"{_FOLLOW}-{network.name}", (rule,))


def _follow_map(followers: list[NetworkContext]) -> tuple[NftMap, ...]:
    elements = sorted((f"{n.ids.fwmark:#010x}", f"jump {_FOLLOW}-{n.name}") for n in followers)
    return (NftMap(_FOLLOW, "mark", "verdict", tuple(elements)),) if elements else ()
