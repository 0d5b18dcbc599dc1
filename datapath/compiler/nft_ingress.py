# SPDX-License-Identifier: Apache-2.0
"""The same marks and the same verdicts without eBPF: `backend: nft`.

The chain runs before connection tracking, so that a spoofed packet costs no entry. Sources are looked up
with nft's own `fib` expression; longest-prefix lists become disjoint ranges (`prefixes`).
"""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.context import Context
from datapath.compiler.marks import Classification
from datapath.compiler.prefixes import AddressRange, CommonSources, flatten, ranges_of
from datapath.plan.ingress import (
    MARTIANS,
    IngressNetwork,
    IngressProgram,
    OtherCheck,
    Verdict,
    VipCheck,
)
from datapath.plan.nft import CLASSIFY_CHAIN, BaseChain, ChainType, Hook, NftChain, NftMap, NftRule
from datapath.plan.rtnl import Family

#: After the reassembly of fragments (-400) and everybody's raw chains (-300), before conntrack (-200).
PRIORITY = -250
_FULL = 0xFFFFFFFF
_ADDRESS_TYPE = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}
_WORD = {Family.IPV4: "ip", Family.IPV6: "ip6"}
#: Never checked: what keeps the link going, whatever its source. The reasons are with the reference model.
_LINK_TRAFFIC = (
    ("ip6 saddr fe80::/10", "link-local"),
    ("ip6 hoplimit 255 icmpv6 type { 133-137 }", "neighbour discovery"),
    ("ip6 hoplimit 1 ip6 saddr :: icmpv6 type { 130-132, 143 }", "multicast listeners"),
    ("ip saddr 0.0.0.0 ip daddr 224.0.0.0/4 meta l4proto igmp", "IGMP without an address"),
    ("ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67", "DHCP"),
)
#: The source must be acceptable, but need not be routed by this device.
_NO_REVERSE_PATH = (
    ("ip daddr { 224.0.0.0/24, 255.255.255.255 }", "to everybody on the link"),
    ("ip6 daddr & ff0f:: == { ff01::, ff02:: }", "to everybody on the link"),
    ("meta nfproto ipv4 udp sport 67 udp dport 68", "answer of a DHCP server"),
    ("ip6 daddr fe80::/10 udp sport 547 udp dport 546", "answer of a DHCPv6 server"),
)


def emit_classification(context: Context, program: IngressProgram) -> Classification:
    """Chains, maps and counters that stand for the tc program."""
    chains = [
        NftChain(
            CLASSIFY_CHAIN,
            (NftRule("iifname vmap @networks", "networks[*] by the device they enter on"),),
            BaseChain(ChainType.FILTER, Hook.PREROUTING, PRIORITY),
        )
    ]
    entries: list[tuple[str, str]] = []
    counters: list[str] = []
    common = CommonSources(program.common_sources)
    for network in program.networks:
        entries.append((f'"{network.device}"', f"goto check-{network.name}"))
        chains += _network_chains(network, common, context.mask)
        counters += [counter_name(network.name, verdict) for verdict in _verdicts(network)]
    maps = [NftMap("networks", "ifname", "verdict", tuple(sorted(entries)))]
    maps += _common_sets(program)
    return Classification(tuple(chains), tuple(maps), tuple(counters))


def counter_name(network: str, verdict: Verdict) -> str:
    """Name of the counter object of one network and verdict."""
    return f"{network}.{verdict.label}"


def _common_sets(program: IngressProgram) -> Iterator[NftMap]:
    for family in Family:
        common = ranges_of((rule.prefix for rule in program.common_sources), family)
        if common:
            yield _interval_set(f"denied{family}", family, common)
        if any(network.check_martians for network in program.networks):
            yield _interval_set(f"martians{family}", family, ranges_of(MARTIANS, family))


def _interval_set(name: str, family: Family, ranges: tuple[AddressRange, ...]) -> NftMap:
    elements = tuple((item.render(), "") for item in ranges)
    return NftMap(name, _ADDRESS_TYPE[family], "", elements, ("interval",))


def _verdicts(network: IngressNetwork) -> Iterator[Verdict]:
    yield Verdict.PASS
    if network.check_martians:
        yield Verdict.MARTIAN
    if network.check_sources:
        yield Verdict.SPOOFED
    if network.vip_check is VipCheck.FEASIBLE:
        yield Verdict.VIP_UNREACHABLE
    elif network.vip_check is VipCheck.STRICT:
        yield Verdict.VIP_STRICT
    if network.other_check is OtherCheck.STRICT:
        yield Verdict.RPF_STRICT
    elif network.other_check is OtherCheck.LOOSE:
        yield Verdict.RPF_LOOSE


def _network_chains(network: IngressNetwork, common: CommonSources, mask: int) -> list[NftChain]:
    passed = f"goto pass-{network.name}"
    origin = f"networks[{network.name}]"
    rules: list[NftRule] = []
    if network.is_checked:
        rules += _passes(network, _LINK_TRAFFIC)
        rules += _source_checks(network, common)
        rules += _passes(network, _NO_REVERSE_PATH)
        rules += _vip_jumps(network)
        rules += _other_rules(network)
    rules.append(NftRule(passed, f"{origin} passed"))
    chains = [
        NftChain(f"check-{network.name}", tuple(rules)),
        NftChain(f"pass-{network.name}", (_pass_rule(network, mask),)),
    ]
    if network.is_checked:
        vip_rules = (*_vip_rules(network), NftRule(passed, f"{origin} passed"))
        chains.append(NftChain(f"vips-{network.name}", vip_rules))
    return chains


def _passes(network: IngressNetwork, matches: tuple[tuple[str, str], ...]) -> Iterator[NftRule]:
    for text, what in matches:
        yield NftRule(f"{text} goto pass-{network.name}", f"networks[{network.name}] passes: {what}")


def _source_checks(network: IngressNetwork, common: CommonSources) -> Iterator[NftRule]:
    if network.check_martians:
        for family in Family:
            yield _drop(network, Verdict.MARTIAN, f"{_WORD[family]} saddr @martians{family}")
    for family in Family:
        yield from _source_rules(network, common, family)


def _vip_jumps(network: IngressNetwork) -> Iterator[NftRule]:
    for family in Family:
        vips = ranges_of(network.vips, family)
        if vips:
            text = f"{_WORD[family]} daddr {_anonymous(vips)} goto vips-{network.name}"
            yield NftRule(text, f"networks[{network.name}].vips")


def _pass_rule(network: IngressNetwork, mask: int) -> NftRule:
    text = f'counter name "{counter_name(network.name, Verdict.PASS)}"'
    if network.fwmark:
        text += f" meta mark set meta mark & {_FULL & ~mask:#010x} | {network.fwmark:#010x}"
    return NftRule(text, f"networks[{network.name}] mark")


def _drop(network: IngressNetwork, verdict: Verdict, match: str) -> NftRule:
    return NftRule(
        f'{match} counter name "{counter_name(network.name, verdict)}" drop',
        f"networks[{network.name}].reverse_path {verdict.label}",
    )


def _anonymous(ranges: tuple[AddressRange, ...]) -> str:
    return "{ " + ", ".join(item.render() for item in ranges) + " }"


def _source_rules(network: IngressNetwork, common: CommonSources, family: Family) -> Iterator[NftRule]:
    """The own list where it decides, else the common one."""
    if not network.check_sources:
        return
    word = _WORD[family]
    denied, allowed = flatten(network.sources, common, family)
    if denied:
        yield _drop(network, Verdict.SPOOFED, f"{word} saddr {_anonymous(denied)}")
    if family in common.families:
        exception = f"{word} saddr != {_anonymous(allowed)} " if allowed else ""
        yield _drop(network, Verdict.SPOOFED, f"{exception}{word} saddr @denied{family}")


def _vip_rules(network: IngressNetwork) -> Iterator[NftRule]:
    """The reply follows the network's own table first, then the main one."""
    if network.vip_check is VipCheck.OFF:
        return
    strict = network.vip_check is VipCheck.STRICT
    verdict = Verdict.VIP_STRICT if strict else Verdict.VIP_UNREACHABLE
    for family in Family:
        if any(prefix.version == family and prefix.prefixlen == 0 for prefix in network.feasible):
            continue
        reachable = ranges_of(network.feasible, family)
        match = (
            f"{_WORD[family]} saddr != {_anonymous(reachable)}" if reachable else f"meta nfproto ipv{family}"
        )
        yield _drop(network, verdict, f"{match} fib saddr . iif oif missing" if strict else match)


def _other_rules(network: IngressNetwork) -> Iterator[NftRule]:
    if network.other_check is OtherCheck.STRICT:
        yield _drop(network, Verdict.RPF_STRICT, "fib saddr . iif oif missing")
    elif network.other_check is OtherCheck.LOOSE:
        yield _drop(network, Verdict.RPF_LOOSE, "fib saddr oif missing")
