# SPDX-License-Identifier: Apache-2.0
"""One disagreement as text, so that it can be pasted into `regressions.json` and stays when the generator changes."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from datapath.observe.reference import Arrival
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    SourceRule,
    VipCheck,
    VlanProtocol,
)

Json = dict[str, Any]


def _rules(rules: tuple[SourceRule, ...]) -> list[list[str]]:
    return [[str(rule.prefix), rule.action.value] for rule in rules]


def _network(network: IngressNetwork) -> Json:
    return {
        "slot": network.slot,
        "fwmark": network.fwmark,
        "point": [network.point.ifname, int(network.point.vlan_protocol), network.point.vlan_id],
        "device": network.device,
        "vips": [str(prefix) for prefix in network.vips],
        "vip_check": network.vip_check.value,
        "other_check": network.other_check.value,
        "sources": _rules(network.sources),
        "feasible": [str(prefix) for prefix in network.feasible],
        "check_martians": network.check_martians,
        "check_sources": network.check_sources,
    }


def to_json(variant: str, program: IngressProgram, arrival: Arrival) -> Json:
    """Everything that decides the verdict; `variant` names the routing table of the lab."""
    return {
        "routes": variant,
        "mask": program.fwmark_mask,
        "common_sources": _rules(program.common_sources),
        "networks": [_network(network) for network in program.networks],
        "ifname": arrival.ifname,
        "data": arrival.data.hex(),
        "metadata_tag": arrival.metadata_tag,
        "mark": arrival.mark,
        "is_merged": arrival.is_merged,
    }


def _read_rules(rules: list[list[str]]) -> tuple[SourceRule, ...]:
    return tuple(SourceRule(ip_network(prefix), SourceAction(action)) for prefix, action in rules)


def _read_network(entry: Json) -> IngressNetwork:
    ifname, protocol, vlan_id = entry["point"]
    return IngressNetwork(
        name=f"net{entry['slot']}",
        slot=entry["slot"],
        fwmark=entry["fwmark"],
        point=IngressPoint(ifname, VlanProtocol(protocol), vlan_id),
        device=entry["device"],
        vips=tuple(ip_network(prefix) for prefix in entry["vips"]),
        vip_check=VipCheck(entry["vip_check"]),
        other_check=OtherCheck(entry["other_check"]),
        sources=_read_rules(entry["sources"]),
        feasible=tuple(ip_network(prefix) for prefix in entry["feasible"]),
        check_martians=entry["check_martians"],
        check_sources=entry["check_sources"],
    )


def from_json(case: Json) -> tuple[str, IngressProgram, Arrival]:
    """The reverse of `to_json`."""
    program = IngressProgram(
        case["mask"],
        tuple(_read_network(entry) for entry in case["networks"]),
        common_sources=_read_rules(case["common_sources"]),
    )
    tag = case["metadata_tag"]
    arrival = Arrival(
        ifname=case["ifname"],
        data=bytes.fromhex(case["data"]),
        metadata_tag=(tag[0], tag[1]) if tag else None,
        mark=case["mark"],
        is_merged=case["is_merged"],
    )
    return case["routes"], program, arrival
