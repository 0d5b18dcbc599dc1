# SPDX-License-Identifier: Apache-2.0
"""The plan as text: the nft file that is reviewed, checked and applied, and the whole plan for people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from datapath.plan.ingress import IngressNetwork, SourceRule, VlanProtocol, prefix_text
from datapath.plan.model import NetworkIds, Plan
from datapath.plan.nft import NftChain, NftFlowtable, NftMap, NftTable
from datapath.plan.steering import SteeringProgram

#: Elements per `add element` command: long lines make nft's parser and reviewers slow.
ELEMENTS_PER_COMMAND = 64
#: Devices per command for a flowtable: the kernel takes 256 (NFT_NETDEVICE_MAX).
DEVICES_PER_COMMAND = 64


def declare_map(table: NftTable, item: NftMap) -> str:
    """The command that makes a map or set; a no-op where it exists with this type."""
    return f"add {item.noun} {table.spec} {item.name} {{ {item.render_type()} }}"


def declare_chain(table: NftTable, chain: NftChain) -> str:
    """The command that makes a chain; a no-op where it exists with this hook."""
    body = f" {{ {chain.base.render()} }}" if chain.base else ""
    return f"add chain {table.spec} {chain.name}{body}"


def declare_counter(table: NftTable, name: str) -> str:
    """The command that makes a counter; one that exists keeps counting."""
    return f"add counter {table.spec} {name}"


def flowtable_commands(
    verb: str, table: NftTable, item: NftFlowtable, devices: tuple[str, ...]
) -> Iterator[str]:
    """`add` or `delete` commands for these devices; without any, an `add` makes it all the same."""
    for start in range(0, max(len(devices), 1), DEVICES_PER_COMMAND):
        body = item.render(devices[start : start + DEVICES_PER_COMMAND])
        yield f"{verb} flowtable {table.spec} {item.name} {{ {body} }}"


def add_rules(table: NftTable, chain: NftChain) -> Iterator[str]:
    """One command a rule, in order."""
    for rule in chain.rules:
        yield f"add rule {table.spec} {chain.name} {rule.render()}"


def element_commands(
    verb: str, table: NftTable, item: NftMap, elements: Iterable[tuple[str, str]]
) -> Iterator[str]:
    """`add element` or `delete element` commands of bounded length."""
    texts = [item.render_element(key, value if verb == "add" else "") for key, value in elements]
    for start in range(0, len(texts), ELEMENTS_PER_COMMAND):
        chunk = ", ".join(texts[start : start + ELEMENTS_PER_COMMAND])
        yield f"{verb} element {table.spec} {item.name} {{ {chunk} }}"


def render_table(table: NftTable) -> str:
    """The table as one nft transaction that is right whether the table exists or not.

    Chains and maps are flushed and filled again, never deleted and added: deleting a map that a rule is
    looking at in the same moment misroutes single packets (measured on 6.18).
    """
    lines = [f"add table {table.spec}"]
    lines += [declare_counter(table, name) for name in table.counters]
    lines += [declare_map(table, item) for item in table.maps]
    for flowtable in table.flowtables:
        lines += flowtable_commands("add", table, flowtable, flowtable.devices)
    lines += [declare_chain(table, chain) for chain in table.chains]
    lines += [f"flush chain {table.spec} {chain.name}" for chain in table.chains]
    lines += [f"flush {item.noun} {table.spec} {item.name}" for item in table.maps]
    for chain in table.chains:
        lines += add_rules(table, chain)
    for item in table.maps:
        lines += element_commands("add", table, item, item.elements)
    return "\n".join(lines) + "\n"


def render_plan(plan: Plan) -> str:
    """The whole plan, one object a line, in the order in which it is put in place."""
    sections = [
        ("notes", [note.render() for note in plan.notes]),
        ("ids", [_render_ids(ids) for ids in plan.ids]),
        (
            "sysctl",
            [f"rp_filter off on {name}, elsewhere as effective now" for name in plan.rp_filter_exempt],
        ),
        ("", [f"sysctl {item.render()}" for item in plan.sysctls]),
        ("links", [link.render() for link in plan.vrfs] + [f"link {link.render()}" for link in plan.links]),
        ("", [slave.render() for slave in plan.slaves]),
        ("routes", [f"route {route.render()}" for route in plan.routes]),
        ("rules", [f"rule {rule.render()}" for rule in plan.rules]),
        ("nft", render_table(plan.table).splitlines() if plan.table else []),
        (
            f"ingress by {plan.backend}",
            [line for network in plan.ingress.networks for line in _render_ingress(network)],
        ),
        ("", [f"ingress * {_render_source(source)}" for source in plan.ingress.common_sources]),
        *([("steering", list(_render_steering(plan.steering)))] if plan.steering.networks else []),
        *([("gateways", [check.render() for check in plan.checks])] if plan.checks else []),
    ]
    lines: list[str] = []
    for title, body in sections:
        if title and (body or title == "nft"):
            lines.append(f"# {title}" if body else f"# {title}: none")
        lines += body
    return "\n".join(lines) + "\n"


def plan_digest(plan: Plan) -> str:
    """Identity of a plan: equal for equal text."""
    return hashlib.sha256(render_plan(plan).encode()).hexdigest()


def _render_ids(ids: NetworkIds) -> str:
    mark = f"{ids.fwmark:#010x}" if ids.fwmark else "none"
    zone = f" zone {ids.zone}" if ids.zone else ""
    return f"network {ids.name} fwmark {mark} table {ids.table or 'none'} slot {ids.slot or 'none'}{zone}"


def _render_ingress(network: IngressNetwork) -> Iterator[str]:
    point = network.point
    tag = "untagged"
    if point.vlan_protocol is not VlanProtocol.UNTAGGED:
        tag = f"tpid {point.vlan_protocol:#06x} vid {point.vlan_id}"
    mark = f"{network.fwmark:#010x}" if network.fwmark else "none"
    yield f"ingress {network.name} slot {network.slot} on {point.ifname} {tag} device {network.device} mark {mark}"
    checks = f"vips {network.vip_check} other {network.other_check}"
    martians, sources = ("on" if on else "off" for on in (network.check_martians, network.check_sources))
    yield f"ingress {network.name} check martians {martians} sources {sources} {checks}"
    for prefix in network.vips:
        yield f"ingress {network.name} vip {prefix_text(prefix)}"
    for source in network.sources:
        yield f"ingress {network.name} {_render_source(source)}"
    for prefix in network.feasible:
        yield f"ingress {network.name} feasible {prefix_text(prefix)}"


def _render_steering(program: SteeringProgram) -> Iterator[str]:
    yield f"steering at the egress of {', '.join(program.devices)}"
    for prefix in program.passed:
        yield f"steering never to {prefix}"
    for network in program.networks:
        for vip in network.vips:
            gateway = network.gateway(vip.version)
            yield f"steering {network.name} slot {network.slot} from {vip} via {gateway} dev {network.device}"
        for prefix in network.on_link:
            yield f"steering {network.name} on-link {prefix} dev {network.device}"


def _render_source(source: SourceRule) -> str:
    return f"source {source.action} {prefix_text(source.prefix)} ({source.origin})"
