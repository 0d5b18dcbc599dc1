# SPDX-License-Identifier: Apache-2.0
"""The benchmark's addresses, policies and frames are what they claim to be."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from itertools import combinations

import pytest

from datapath.observe.packet import FrameProblem, parse_frame, parse_ip
from datapath.policy import parse_policy
from tools.bench import frames, plan
from tools.lab.topology import FAMILIES

ETHER = (bytes(6), bytes(6))


@pytest.mark.parametrize("count", [1, 2, 300, plan.NETWORKS_MAX])
def test_the_policy_is_one_that_the_product_takes(count: int) -> None:
    loaded = parse_policy(plan.policy(range(1, count + 1)).encode(), "bench.yaml")
    assert len(loaded.policy.networks) == count
    last = loaded.policy.networks[-1]
    assert last.device == plan.network(count).device
    assert [str(prefix) for prefix in last.vip_prefixes] == list(plan.prefixes(plan.network(count)).values())


def test_networks_do_not_overlap() -> None:
    for family in FAMILIES:
        prefixes = [plan.prefixes(plan.network(number))[family] for number in range(1, plan.NETWORKS_MAX + 1)]
        assert len(set(prefixes)) == plan.NETWORKS_MAX
        others = [plan.INTERNAL, plan.NODE, plan.FOREIGN, plan.ROUTED, plan.CLIENTS]
        assert not any(ip_address(str(o.get(family))) in ip_network(p) for o in others for p in prefixes)


def test_there_are_no_more_networks_than_vlan_ids() -> None:
    with pytest.raises(ValueError, match="4095"):
        plan.network(4095)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("letter", frames.PROFILES)
def test_frames_are_read_by_the_reference_parser(letter: str, family: int) -> None:
    profile, network = frames.PROFILES[letter], plan.network(4094)
    data = frames.frame(profile, network, family, ETHER)
    assert len(data) == {4: 60, 6: 70}[family]
    parsed = parse_frame(data)
    assert not isinstance(parsed, FrameProblem)
    packet = parse_ip(parsed)
    assert packet is not None
    assert packet.source == profile.sources.get(family) + 16
    assert packet.destination == profile.destination(network, family)
    if family == 4:
        assert frames.checksum(data[14:34]) == 0


def test_only_spoofed_profiles_come_from_inside() -> None:
    inside = {4: ip_network(f"{plan.INTERNAL.v4}/12"), 6: ip_network(f"{plan.INTERNAL.v6}/48")}
    for profile in frames.PROFILES.values():
        for family in FAMILIES:
            assert (profile.sources.get(family) in inside[family]) is profile.is_spoofed


def test_profiles_are_known_by_different_letters() -> None:
    assert all(a.title != b.title for a, b in combinations(frames.PROFILES.values(), 2))
    assert all(letter == profile.letter for letter, profile in frames.PROFILES.items())
