# SPDX-License-Identifier: Apache-2.0
"""The nftables half of `egress`: who is recognised, which address he gets, and who is not let out.

Before routing, for source NAT and behind it the same connections are meant, so all three are made of the same matches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import NamedTuple

from datapath.compiler.context import Context, NetworkContext
from datapath.compiler.egress import EgressContext, source_addresses
from datapath.compiler.marks import Classification
from datapath.compiler.prefixes import ranges_of
from datapath.plan.egress import (
    ENTRY_DROPS,
    LOG_GROUP,
    NETWORK_DROPS,
    NETWORKS_MAP,
    OPENED,
    EgressDrop,
    counter_name,
    member_elements,
    members_set,
)
from datapath.plan.ingress import IpNetwork
from datapath.plan.nft import FULL, BaseChain, ChainType, Hook, NftChain, NftMap, NftRule
from datapath.plan.rtnl import Family

#: After everybody's destination NAT (-100; the AWS VPC CNI uses -90).
CLASSIFY_PRIORITY = -80
#: Before everybody's source NAT (100; the CNI plug-ins use 99): the first that translates a connection decides.
SNAT_PRIORITY = 90
#: After all source NAT, before connection tracking confirms a new connection: one that is dropped here never was.
GUARD_PRIORITY = 300
#: IPS_CONFIRMED of linux/netfilter/nf_conntrack_common.h: the first packet has left the node.
_CONFIRMED = "0x00000008"
#: So that a source keeps its address over every apply and reboot.
_SEED = "0x64703101"
_TYPE = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}
_WORD = {Family.IPV4: "ip", Family.IPV6: "ip6"}
#: Never forwarded; that it is multicast or our own, the kernel's local table tells.
_LINK_LOCAL: tuple[IpNetwork, ...] = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
_FIRST = f"ct status & {_CONFIRMED} == 0"
_OWN = "fib daddr type { local, broadcast, anycast, multicast }"


def emit_egress(context: Context, entries: tuple[EgressContext, ...]) -> Classification:
    """Chains, sets and counters; nothing without entries."""
    if not entries:
        return Classification()
    networks = sorted({item.network.name: item.network for item in entries}.values(), key=lambda n: n.name)
    inside = _inside_sets(context, entries)
    passed = tuple(_inside_rules(inside))
    meant = [_Meant(item, {family: _sets(item, family) for family in item.plan.families}) for item in entries]
    chains = [*_classify_chains(context, meant, passed), *_snat_chains(context, meant, networks)]
    chains += _guard_chains(context, meant, passed)
    addresses = source_addresses(entries)
    for network in networks:
        chains += _mark_chains(context, network)
        rules = tuple(_check_rules(addresses[network.name], network))
        chains.append(NftChain(f"egress-check.{network.name}", rules))
    maps = [*_verdict_maps(context, networks)]
    for item in inside:
        maps += [item.prefixes, item.services]
    for one in meant:
        maps += one.maps
    return Classification(tuple(chains), tuple(maps), tuple(_counters(entries, networks)))


def _counters(entries: tuple[EgressContext, ...], networks: list[NetworkContext]) -> Iterator[str]:
    for network in networks:
        yield from (counter_name(network.name, drop) for drop in NETWORK_DROPS)
    for item in entries:
        yield counter_name(item.entry.name, OPENED)
        yield from (counter_name(item.entry.name, drop) for drop in ENTRY_DROPS)
        if any(item.plan.lacks_address(family) for family in item.plan.families):
            yield counter_name(item.entry.name, EgressDrop.NO_ADDRESS)


# -- who is meant ---------------------------------------------------------------------------------


def _families(entries: tuple[EgressContext, ...]) -> list[Family]:
    return sorted({family for item in entries for family in item.plan.families})


def _static(name: str, family: Family, prefixes: Iterable[IpNetwork]) -> NftMap | None:
    """A set that never changes: its name says what it holds. None where it would be empty.

    Some kernels show the new elements of an interval set a moment after the rules of the same transaction. So a
    set is there and filled before any rule asks for it (`reconcile.egress`), and goes with the last one.
    """
    elements = tuple((item.render(), "") for item in ranges_of(prefixes, family))
    if not elements:
        return None
    digest = hashlib.sha256(",".join(key for key, _ in elements).encode()).hexdigest()[:8]
    return NftMap(f"{name}.{digest}", _TYPE[family], "", elements, ("interval",))


@dataclass(frozen=True)
class _Inside:
    """What is not outside, in one family: pods and services, and what is asked for by the address of a service."""

    family: Family
    prefixes: NftMap
    services: NftMap


def _inside_sets(context: Context, entries: tuple[EgressContext, ...]) -> tuple[_Inside, ...]:
    internal = context.policy.node.internal
    vips = [prefix for network in context.networks for prefix in network.network.vip_prefixes]
    found = []
    for family in _families(entries):
        prefixes = _static(f"egress-inside{family}", family, [*internal, *_LINK_LOCAL])
        services = _static(f"egress-services{family}", family, [*internal, *vips])
        if prefixes and services:
            found.append(_Inside(family, prefixes, services))
    return tuple(found)


def _members(item: EgressContext, family: Family) -> NftMap | None:
    if item.plan.members is None:
        return None
    elements = member_elements(item.plan.members, family)
    return NftMap(members_set(item.entry.name, family), _TYPE[family], "", elements, ("interval",))


class _Sets(NamedTuple):
    """What one entry looks at in one family; None where it would be empty."""

    sources: NftMap | None
    members: NftMap | None
    destinations: NftMap | None
    excluded: NftMap | None


def _sets(item: EgressContext, family: Family) -> _Sets:
    entry = item.entry
    return _Sets(
        _static(f"sources{family}.{entry.name}", family, entry.sources),
        _members(item, family),
        _static(f"to{family}.{entry.name}", family, entry.destinations),
        _static(f"except{family}.{entry.name}", family, entry.exclude),
    )


@dataclass(frozen=True)
class _Meant:
    """One entry, and the packets that it means."""

    item: EgressContext
    sets: Mapping[Family, _Sets]

    @property
    def maps(self) -> Iterator[NftMap]:
        """All of its sets."""
        for sets in self.sets.values():
            yield from filter(None, sets)

    def matches(self, source: str) -> Iterator[tuple[Family, str]]:
        """Its packets as nft expressions; `source` is where their first source address stands."""
        for family, sets in self.sets.items():
            word, to, excluded = _WORD[family], sets.destinations, sets.excluded
            if self.item.entry.destinations and to is None:
                continue
            narrowed = f" {word} daddr @{to.name}" if to else ""
            narrowed += f" {word} daddr != @{excluded.name}" if excluded else ""
            for found in filter(None, (sets.sources, sets.members)):
                yield family, f"{source.format(word=word)} @{found.name}{narrowed}"


#: The connection's own, whatever anybody has made of the packet since.
_ORIGINAL = "ct original {word} saddr"
_PACKET = "{word} saddr"


def _inside_rules(sets: tuple[_Inside, ...]) -> Iterator[NftRule]:
    """What is not meant, whoever sends it; the same before routing and after."""
    yield NftRule(f"{_OWN} return", "egress[*] but what the node itself gets")
    for inside in sets:
        word = _WORD[inside.family]
        yield NftRule(f"{word} daddr @{inside.prefixes.name} return", "egress[*] but node.internal")
        yield NftRule(
            f"ct status dnat ct original {word} daddr @{inside.services.name} return",
            "egress[*] but services, wherever they are served",
        )


# -- before routing -------------------------------------------------------------------------------


def _classify_chains(
    context: Context, meant: Iterable[_Meant], passed: tuple[NftRule, ...]
) -> list[NftChain]:
    ours = f"& {context.mask:#010x}"
    rules = (
        NftRule(
            f"ct mark != 0 ct direction original ct mark {ours} vmap @{NETWORKS_MAP}",
            "egress[*] a connection that has its network",
        ),
        NftRule(f"{_FIRST} ct mark {ours} == 0 goto egress-new", "egress[*] first packet of a connection"),
    )
    new = [*passed]
    for one in meant:
        item = one.item
        for family, match in one.matches(_ORIGINAL):
            if item.plan.lacks_address(family):
                text = f"{match} {_dropped(item.entry.name, EgressDrop.NO_ADDRESS)}"
                new.append(NftRule(text, f"{item.origin}.source_ip: the device has no IPv{family} address"))
            else:
                new.append(NftRule(f"{match} goto egress-open.{item.network.name}", f"{item.origin}.sources"))
    return [
        NftChain("egress-forward", rules, BaseChain(ChainType.FILTER, Hook.PREROUTING, CLASSIFY_PRIORITY)),
        # Only a chain of type route makes the kernel look the route up again when the mark changes.
        NftChain("egress-output", rules, BaseChain(ChainType.ROUTE, Hook.OUTPUT, CLASSIFY_PRIORITY)),
        NftChain("egress-new", tuple(new)),
    ]


def _mark_chains(context: Context, network: NetworkContext) -> list[NftChain]:
    keep = f"& {FULL & ~context.mask:#010x}"
    fwmark, own = f"{network.ids.fwmark:#010x}", f"{context.egress_marks[network.name]:#010x}"
    origin = f"{network.origin} egress"
    by_network = NftRule(f"meta mark set meta mark {keep} | {fwmark}", f"{origin}: routed by the network")
    expected = NftRule(
        f'iifname "{network.device}" ct mark set ct mark {keep} | {fwmark} return',
        f"{origin}: one that a helper expects from outside (FTP, SIP) is answered like any request",
    )
    opened = NftRule(f"ct mark set ct mark {keep} | {own}", f"{origin}: a connection that leaves by it")
    return [
        NftChain(f"egress-open.{network.name}", (opened, by_network)),
        NftChain(f"egress-by.{network.name}", (expected, by_network)),
    ]


def _verdict_maps(context: Context, networks: list[NetworkContext]) -> Iterator[NftMap]:
    for name, target in (
        (NETWORKS_MAP, "egress-by"),
        ("egress-addresses", "egress-snat"),
        ("egress-checks", "egress-check"),
    ):
        elements = sorted(
            (f"{context.egress_marks[network.name]:#010x}", f"goto {target}.{network.name}")
            for network in networks
        )
        yield NftMap(name, "mark", "verdict", tuple(elements))


# -- source NAT -----------------------------------------------------------------------------------


def _snat_chains(context: Context, meant: list[_Meant], networks: list[NetworkContext]) -> Iterator[NftChain]:
    start = NftRule(
        f"ct mark & {context.mask:#010x} vmap @egress-addresses",
        "egress[*] connections that leave by a network",
    )
    yield NftChain("egress-snat", (start,), BaseChain(ChainType.NAT, Hook.POSTROUTING, SNAT_PRIORITY))
    rules: dict[str, list[NftRule]] = {network.name: [] for network in networks}
    for one in meant:
        rules[one.item.network.name] += _snat_rules(one)
    for network in networks:
        last = _drop("", network.name, EgressDrop.UNTRANSLATED, f"{network.origin} egress")
        yield NftChain(f"egress-snat.{network.name}", (*rules[network.name], last))


def _snat_rules(one: _Meant) -> Iterator[NftRule]:
    item = one.item
    counter = f'counter name "{counter_name(item.entry.name, OPENED)}"'
    for family, match in one.matches(_ORIGINAL):
        addresses = [str(address) for address in item.plan.addresses if address.version == family]
        if addresses:
            choice = _choice(addresses, _WORD[family])
            yield NftRule(f"{match} {counter} snat {_WORD[family]} to {choice}", f"{item.origin}.source_ip")


def _choice(addresses: list[str], word: str) -> str:
    """One address, or one of several by the source: it keeps its own as long as the pool stays the same."""
    if len(addresses) == 1:
        return addresses[0]
    numbered = ", ".join(f"{number} : {address}" for number, address in enumerate(addresses))
    return f"jhash {word} saddr mod {len(addresses)} seed {_SEED} map {{ {numbered} }}"


# -- the last look --------------------------------------------------------------------------------


def _guard_chains(context: Context, meant: list[_Meant], passed: tuple[NftRule, ...]) -> Iterator[NftChain]:
    ours = f"& {context.mask:#010x}"
    guard = (
        NftRule(
            f"ct mark != 0 ct direction original ct mark {ours} vmap @egress-checks",
            "egress[*] leaves by its network, with its address",
        ),
        NftRule(
            f"ct status & {_CONFIRMED} != 0 accept", "egress[*] not of a connection that was there before"
        ),
        NftRule("ct state invalid,untracked goto egress-untracked", "egress[*] packet without a connection"),
        # Whatever its mark: one of a mask that has just changed says nothing.
        NftRule("goto egress-late", "egress[*] first packet, not recognised"),
    )
    yield NftChain("egress-guard", guard, BaseChain(ChainType.FILTER, Hook.POSTROUTING, GUARD_PRIORITY))
    yield NftChain("egress-late", (*passed, *_drops(meant, EgressDrop.LATE, _ORIGINAL)))
    neighbours = NftRule(
        "ip6 hoplimit 255 icmpv6 type { 133-137 } return", "egress[*] but neighbour discovery"
    )
    has_ipv6 = any(Family.IPV6 in one.sets for one in meant)
    untracked = (*passed, *_drops(meant, EgressDrop.UNTRACKED, _PACKET))
    yield NftChain("egress-untracked", (neighbours, *untracked) if has_ipv6 else untracked)


def _drops(meant: Iterable[_Meant], drop: EgressDrop, source: str) -> Iterator[NftRule]:
    for one in meant:
        for _, match in one.matches(source):
            yield _drop(match, one.item.entry.name, drop, one.item.origin)


def _check_rules(addresses: Iterable[IpNetwork], network: NetworkContext) -> Iterator[NftRule]:
    origin = f"{network.origin} egress"
    devices = [network.device, *([network.network.vrf.name] if network.network.vrf else [])]
    elsewhere = f"oifname != {_anonymous(devices)}"
    yield _drop(elsewhere, network.name, EgressDrop.WRONG_DEVICE, origin)
    # Its first packet had an address of ours, and a connection keeps its address.
    yield NftRule(f"ct status & {_CONFIRMED} != 0 accept", f"{origin}: a known connection")
    for family in Family:
        ranges = ranges_of(addresses, family)
        if ranges:
            allowed = ", ".join(item.render() for item in ranges)
            yield NftRule(f"{_WORD[family]} saddr {{ {allowed} }} accept", f"{origin}: has an address of it")
    yield _drop("", network.name, EgressDrop.UNTRANSLATED, origin)


def _anonymous(names: list[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"{{ {', '.join(quoted)} }}"


def _drop(match: str, owner: str, drop: EgressDrop, origin: str) -> NftRule:
    return NftRule(f"{match} {_dropped(owner, drop)}".strip(), f"{origin} {drop}")


def _dropped(owner: str, drop: EgressDrop) -> str:
    """Counted, and shown to who watches: a log group without a reader costs a look at whether there is one."""
    name = counter_name(owner, drop)
    return f'counter name "{name}" log prefix "{name}" group {LOG_GROUP} drop'
