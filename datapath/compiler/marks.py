# SPDX-License-Identifier: Apache-2.0
"""The nftables half: remember the network of a connection, and give it back to replies only.

The tc program marks a packet as it enters. After conntrack and before destination NAT, the mark moves
into the connection and leaves the packet: an original packet that kept it would be routed back out of
its VLAN once DNAT has changed its destination. A reply gets it back before it is routed.
"""

from __future__ import annotations

from dataclasses import dataclass

from datapath.compiler.context import Context, NetworkContext
from datapath.plan.nft import (
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
#: A chain that nothing enters: it holds the ids of each network where a restarted process finds them.
IDS_CHAIN = "ids"
FULL = 0xFFFFFFFF


def ids_comment(context: NetworkContext) -> str:
    """What `kernel/` reads back: `network=public fwmark=0x00010000 table=700001 slot=1`."""
    ids = context.ids
    return f"network={ids.name} fwmark={ids.fwmark:#010x} table={ids.table} slot={ids.slot}"


@dataclass(frozen=True, slots=True)
class Classification:
    """What nftables does in place of the tc program; empty where that program does it."""

    chains: tuple[NftChain, ...] = ()
    maps: tuple[NftMap, ...] = ()
    counters: tuple[str, ...] = ()


def emit_table(context: Context, classification: Classification, *, rule_bank: int) -> NftTable | None:
    """The whole table, or None where no network needs an id."""
    remembered = [network for network in context.networks if any(_numbers(network))]
    if not remembered:
        return None
    marked = [network for network in remembered if network.is_marked]
    chains = [_ids_chain(context, remembered, rule_bank), *classification.chains]
    maps: list[NftMap] = [*classification.maps]
    if marked:
        chains += _hook_chains(context.mask, follow=any(_follows(network) for network in marked))
        for network in marked:
            chains += _network_chains(network, context.mask)
        maps += _maps(marked)
    return NftTable(
        TABLE_FAMILY,
        TABLE_NAME,
        tuple(sorted(chains, key=lambda chain: chain.name)),
        tuple(sorted(maps, key=lambda item: item.name)),
        tuple(sorted(classification.counters)),
    )


def _numbers(network: NetworkContext) -> tuple[int, int, int]:
    return network.ids.fwmark, network.ids.table, network.ids.slot


def _follows(network: NetworkContext) -> bool:
    return network.network.track is Track.LAST


def _ids_chain(context: Context, networks: list[NetworkContext], rule_bank: int) -> NftChain:
    header = NftRule("continue", f"fwmark_mask={context.mask:#010x} rule_bank={rule_bank}")
    rules = [NftRule("continue", ids_comment(network)) for network in networks]
    return NftChain(IDS_CHAIN, (header, *sorted(rules, key=lambda rule: rule.origin)))


def _hook_chains(mask: int, *, follow: bool) -> list[NftChain]:
    ours = f"& {mask:#010x}"
    restore = NftRule(
        f"ct direction reply ct mark {ours} vmap @restore",
        "networks[*].return_path reply: restore the mark of its network",
    )
    ingress = [
        NftRule(
            f"ct direction original ct mark {ours} == 0 meta mark {ours} vmap @save",
            "networks[*].return_path request: save the network it came in by, also for flows older than this",
        )
    ]
    if follow:
        ingress.append(
            NftRule(
                f"ct direction original ct mark {ours} != 0 meta mark {ours} vmap @follow",
                "networks[*].track last: the connection moves to the network of its last request",
            )
        )
    ingress += [
        NftRule(
            f"meta mark set meta mark & {FULL & ~mask:#010x}",
            "networks[*].return_path request: routed as without the policy",
        ),
        restore,
    ]
    return [
        NftChain(
            "prerouting",
            (NftRule(f"meta mark {ours} != 0 goto ingress", "networks[*] marked as it entered"), restore),
            BaseChain(ChainType.FILTER, Hook.PREROUTING, PRIORITY),
        ),
        NftChain("ingress", tuple(ingress)),
        # Only a chain of type route makes the kernel look the route up again when the mark changes.
        NftChain("output", (restore,), BaseChain(ChainType.ROUTE, Hook.OUTPUT, PRIORITY)),
    ]


def _network_chains(network: NetworkContext, mask: int) -> list[NftChain]:
    """A constant rule a network: nft before 1.1 cannot combine two variables in a masked write."""
    write = f"& {FULL & ~mask:#010x} | {network.ids.fwmark:#010x}"
    return [
        NftChain(
            f"save-{network.name}",
            (NftRule(f"ct mark set ct mark {write}", f"{network.origin} save mark"),),
        ),
        NftChain(
            f"restore-{network.name}",
            (NftRule(f"meta mark set meta mark {write}", f"{network.origin} restore mark"),),
        ),
    ]


def _maps(marked: list[NetworkContext]) -> list[NftMap]:
    by_mark = sorted(marked, key=lambda network: network.ids.fwmark)

    def verdicts(verb: str, networks: list[NetworkContext]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{n.ids.fwmark:#010x}", f"jump {verb}-{n.name}") for n in networks)

    maps = [
        NftMap("save", "mark", "verdict", verdicts("save", by_mark)),
        NftMap("restore", "mark", "verdict", verdicts("restore", by_mark)),
    ]
    followers = [network for network in by_mark if _follows(network)]
    if followers:
        maps.append(NftMap("follow", "mark", "verdict", verdicts("save", followers)))
    return maps
