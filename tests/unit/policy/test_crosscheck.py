# SPDX-License-Identifier: Apache-2.0
"""Rules between places of the file; the texts are in the corpus, here is what is refused and what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.errors import PolicyPath, Problem
from datapath.policy import Policy, check_addresses, check_devices, check_ids, check_policy
from datapath.policy.model import NETWORKS_MAX, RULE_PRIORITY_MAX
from datapath.policy.readable import Readable


def policy(*networks: dict[str, Any], **top: Any) -> Policy:
    """A policy; names, devices and VIPs are filled in where the test does not care."""
    filled = [
        {"name": f"n{i}", "interface": f"eth{i}", "vips": [f"198.51.{i >> 8}.{i & 255}"]} | network
        for i, network in enumerate(networks)
    ]
    for network in filled:
        if "vlan" in network:
            del network["interface"]
    return Policy.model_validate({"version": 1, "networks": filled} | top)


def paths(subject: Policy) -> list[PolicyPath]:
    return [problem.path for problem in check_policy(subject)]


#: Addresses 10.0.0.0 to 10.0.0.31, cut into ranges: small enough for a brute-force answer.
SMALL_RANGES = st.tuples(st.integers(0, 31), st.integers(0, 4)).map(lambda t: (t[0], min(31, t[0] + t[1])))
NETWORKS = st.lists(
    st.tuples(st.booleans(), st.lists(SMALL_RANGES, min_size=1, max_size=4)), min_size=1, max_size=5
)


@given(NETWORKS, st.sampled_from(["10.0.0.", "2001:db8::"]))
def test_overlapping_vips_are_found_exactly(
    networks: list[tuple[bool, list[tuple[int, int]]]], stem: str
) -> None:
    subject = policy(
        *(
            {"vips": [f"{stem}{a}-{stem}{b}" for a, b in vips], "isolate_clients": iso}
            for iso, vips in networks
        )
    )
    entries = [(i, j, iso, r) for i, (iso, rs) in enumerate(networks) for j, r in enumerate(rs)]
    if stem.endswith(":"):
        # The digits are hexadecimal there.
        entries = [(i, j, iso, (int(str(a), 16), int(str(b), 16))) for i, j, iso, (a, b) in entries]
    clashing = [
        (one, two)
        for n, one in enumerate(entries)
        for two in entries[n + 1 :]
        if one[3][0] <= two[3][1] and two[3][0] <= one[3][1] and (one[0] == two[0] or not (one[2] and two[2]))
    ]
    problems = list(check_addresses.vips_apart(Readable.of(subject)))
    reported = {p.path for p in problems}
    # One problem for each entry, each true, and none that clashes goes without a mention in the file.
    assert len(reported) == len(problems)
    assert reported <= {("networks", e[0], "vips", e[1]) for pair in clashing for e in pair}
    assert bool(reported) == bool(clashing)


def test_every_network_that_overlaps_a_wide_one_is_named() -> None:
    wide = {"vips": ["10.0.0.0/8"]}
    subject = policy(wide, *({"vips": [f"10.{i}.0.0/16"]} for i in range(1, 40)))
    assert {p[1] for p in paths(subject)} == set(range(1, 40))


@pytest.mark.parametrize(
    ("one", "two", "refused"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, True)],
)
def test_same_vip_on_two_networks_needs_isolation_on_both(one: bool, two: bool, refused: bool) -> None:
    subject = policy(
        {"vips": ["192.0.2.0/24"], "isolate_clients": one}, {"vips": ["192.0.2.7"], "isolate_clients": two}
    )
    assert bool(list(check_addresses.vips_apart(Readable.of(subject)))) is refused


@pytest.mark.parametrize("vip", ["192.0.2.0/31", "10.255.255.255", "11.0.0.0", "2001:db8::1", "100.64.0.1"])
def test_servable_vips(vip: str) -> None:
    assert paths(policy({"vips": [vip]}, node={"internal": ["10.0.0.0/9", "fd00::/8"]})) == []


@pytest.mark.parametrize(
    "vip",
    ["10.0.0.0/7", "10.0.0.1", "fd00::1", "9.0.0.0-10.0.0.0", "10.127.255.255-10.128.0.0", "f::-fd00::"],
)
def test_vips_that_touch_the_inside(vip: str) -> None:
    assert ("networks", 0, "vips", 0) in paths(
        policy({"vips": [vip]}, node={"internal": ["10.64.0.0/10", "10.0.0.0/9", "fd00::/8"]})
    )


@pytest.mark.parametrize(
    "vip",
    [
        "0.1.2.3",
        "127.1.1.1",
        "169.254.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:192.0.2.1",
        "fe80::1",
        "ff02::1",
        "::/0",
        "223.255.255.255-224.0.0.0",
    ],
)
def test_addresses_that_nobody_serves(vip: str) -> None:
    assert paths(policy({"vips": [vip]})) == [("networks", 0, "vips", 0)]


@pytest.mark.parametrize(
    "network",
    [
        {"vips": ["192.0.2.0/24"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.0/31"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.0-192.0.2.255"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.7"], "gateway": "192.0.2.1", "on_link": ["192.0.2.0/28"]},
        {"vips": ["192.0.2.7"], "gateway": "192.0.2.1", "on_link": ["192.0.2.1"]},
        {"vips": ["192.0.2.7"], "gateway": "169.254.1.1", "on_link": ["169.254.1.1/32"]},
        {"vips": ["2001:db8::7"], "gateway": "fe80::1"},
        {"vips": ["2001:db8::/64"], "gateway": "2001:db8::"},
        {"vips": ["192.0.2.0/24", "2001:db8::/64"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.0/24", "2001:db8::/64"], "gateway": ["2001:db8::1", "192.0.2.1"]},
    ],
)
def test_right_gateways(network: dict[str, Any]) -> None:
    assert paths(policy(network)) == []


@pytest.mark.parametrize(
    "network",
    [
        {"vips": ["192.0.2.7"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.1"], "gateway": "192.0.2.1"},
        {"vips": ["192.0.2.0/24"], "gateway": "192.0.3.1"},
        {"vips": ["192.0.2.0/24"], "gateway": "192.0.2.255"},
        {"vips": ["192.0.2.7"], "gateway": "192.0.2.0", "on_link": ["192.0.2.0/28"]},
        {"vips": ["192.0.2.0/24"], "gateway": "2001:db8::1"},
        {"vips": ["2001:db8::/64"], "gateway": "192.0.2.1"},
        {"vips": ["2001:db8::7"], "gateway": "2001:db8::1"},
        {"vips": ["2001:db8::1", "2001:db8::/65"], "gateway": "::1"},
        {"vips": ["192.0.2.1-192.0.2.9"], "gateway": "192.0.2.1", "on_link": ["192.0.2.0/24"]},
        {"vips": ["192.0.2.0/24"], "gateway": "240.0.0.1", "on_link": ["240.0.0.0/24"]},
    ],
)
def test_wrong_gateways(network: dict[str, Any]) -> None:
    assert ("networks", 0, "gateway", 0) in paths(policy(network))


def test_mask_capacity_counts_networks_that_need_a_mark() -> None:
    marked = [{"vips": [f"10.0.{i}.0/24"], "gateway": f"10.0.{i}.1"} for i in range(4)]
    assert paths(policy(*marked[:3], marks={"mask": 0x300})) == []
    assert paths(policy(*marked, marks={"mask": 0x300})) == [("marks",)]
    others = [{"vips": ["10.1.0.0/24"], "gateway": "10.1.0.1", "return_path": "none"}, {}]
    assert paths(policy(*marked[:3], *others, marks={"mask": 0x300})) == []


def test_marks_inside_the_mask_and_distinct() -> None:
    assert paths(policy({"mark": 0x10000}, {"mark": 0x20000})) == []
    assert paths(policy({"mark": 0x10001})) == [("networks", 0, "mark")]
    assert paths(policy({"mark": 0x10000}, {"mark": 0x10000})) == [("networks", 1, "mark")]
    assert paths(policy({"mark": 0x10000}, marks={"profile": "calico-ebpf"})) == [("networks", 0, "mark")]


def test_tables() -> None:
    assert paths(policy({"table": 100}, {"table": 101})) == []
    assert paths(policy({"table": 100}, {"table": 100})) == [("networks", 1, "table")]
    red = {"name": "red", "table": 100}
    ids = check_ids.tables
    assert list(ids(Readable.of(policy({"vrf": red}, {"vrf": red})))) == []
    assert [p.path for p in ids(Readable.of(policy({"table": 100}, {"vrf": red})))] == [
        ("networks", 0, "table")
    ]
    blue = {"name": "blue", "table": 100}
    assert [p.path for p in ids(Readable.of(policy({"vrf": red}, {"vrf": blue})))] == [
        ("networks", 1, "vrf", "table")
    ]


def test_networks_of_one_vrf() -> None:
    red, blue = {"name": "red", "table": 7}, {"name": "blue", "table": 8}
    one = {"vips": ["192.0.2.0/24"], "gateway": "192.0.2.1"}
    two = {"vips": ["198.51.100.0/24"], "gateway": "198.51.100.1"}
    six = {"vips": ["2001:db8::/64"], "gateway": "2001:db8::1"}
    link = {"vips": ["203.0.113.0/24"]}
    assert (
        paths(policy(one | {"vrf": red}, two | {"vrf": blue}, six | {"vrf": red}, link | {"vrf": red})) == []
    )
    assert paths(policy(one | {"vrf": red}, two | {"vrf": red})) == [("networks", 1, "gateway")]
    shared = {"vips": ["203.0.113.9"], "gateway": "192.0.2.1", "on_link": ["192.0.2.0/24"]}
    assert paths(policy({"vips": ["192.0.2.0/24"], "vrf": red}, shared | {"vrf": red})) == [
        ("networks", 1, "on_link")
    ]
    assert paths(policy({"vips": ["192.0.2.0/24"], "vrf": red}, shared | {"vrf": blue})) == []


def test_devices() -> None:
    dot1q = {"vlan": {"parent": "eth0", "id": 5}}
    dot1ad = {"vlan": {"parent": "eth0", "id": 5, "protocol": "802.1ad", "name": "outer"}}
    assert paths(policy(dot1q, dot1ad, {"interface": "eth0"})) == []
    assert paths(policy(dot1q, dot1q)) == [("networks", 1, "vlan")]
    assert paths(policy(dot1q, {"interface": "eth0.5"})) == [("networks", 1, "interface")]
    assert paths(policy({"interface": "x"}, {"vlan": {"parent": "e", "id": 1, "name": "x"}})) == [
        ("networks", 1, "vlan", "name")
    ]
    assert paths(policy({"vlan": {"parent": "x", "id": 1, "name": "x"}})) == [
        ("networks", 0, "vlan", "parent")
    ]
    vrf = policy({"interface": "red", "vrf": {"name": "red", "table": 7}})
    assert [p.path for p in check_devices.devices(Readable.of(vrf))] == [("networks", 0, "vrf", "name")]


def test_stacked_vlan_devices_are_no_loop() -> None:
    chain = [{"vlan": {"parent": f"v{i + 1}", "id": 7, "name": f"v{i}"}} for i in range(300)]
    assert paths(policy(*chain)) == []


@pytest.mark.parametrize("priority", [1, 999, 10000, RULE_PRIORITY_MAX])
def test_rule_priorities(priority: int) -> None:
    assert paths(policy({}, rules={"priority": priority})) == []
    assert priority + 4095 < 32766


GATEWAY = {"vips": ["192.0.2.0/24"], "gateway": "192.0.2.1"}


@pytest.mark.parametrize(
    ("network", "top", "path"),
    [
        ({"track": "last"}, {"steering": "direct"}, ("networks", 0, "track")),
        ({"steering": "direct", "mark": 0x10000}, {}, ("networks", 0, "mark")),
        ({"steering": "direct", "table": 100}, {}, ("networks", 0, "table")),
        ({"steering": "direct", "vrf": {"name": "red", "table": 7}}, {}, ("networks", 0, "vrf")),
        ({"steering": "direct", "return_path": "none"}, {}, ("networks", 0, "return_path")),
        ({"steering": "direct"}, {"backend": "nft"}, ("backend",)),
    ],
)
def test_what_direct_steering_cannot_do(
    network: dict[str, Any], top: dict[str, Any], path: PolicyPath
) -> None:
    (problem,) = check_policy(policy(GATEWAY | network, **top))
    assert problem.path == path
    assert "direct" in problem.message
    assert problem.hint
    by_rules = {"steering": "rules"} if "return_path" not in network else {"steering": None}
    assert paths(policy(GATEWAY | network | by_rules, **top)) == []


@pytest.mark.parametrize("wish", ["conntrack", "source", None])
def test_direct_steering_serves_every_return_path(wish: str | None) -> None:
    network = GATEWAY | {"steering": "direct"} | ({"return_path": wish} if wish else {})
    assert paths(policy(network)) == []
    assert paths(policy({"return_path": "none"} | GATEWAY, steering="direct")) == []


def test_direct_networks_take_no_room_of_the_mask() -> None:
    networks = [{"vips": [f"10.0.{i}.0/24"], "gateway": f"10.0.{i}.1"} for i in range(9)]
    assert paths(policy(*networks, marks={"mask": 0x300})) == [("marks",)]
    assert paths(policy(*networks, marks={"mask": 0x300}, steering="direct")) == []


def test_largest_policy_has_no_problems() -> None:
    networks = [
        {"vips": [f"10.{i >> 8}.{i & 255}.0/24"], "gateway": f"10.{i >> 8}.{i & 255}.1"}
        for i in range(NETWORKS_MAX)
    ]
    assert paths(policy(*networks)) == []


def test_problems_have_hints() -> None:
    subject = policy({"mark": 1, "vips": ["127.0.0.1"]}, {"name": "n0", "gateway": "192.0.2.1"})
    problems: list[Problem] = check_policy(subject)
    assert len(problems) == 4
    assert all(p.hint and p.message for p in problems)


def test_an_overlap_is_found_behind_a_wider_range_of_the_own_network() -> None:
    subject = policy({"vips": ["10.0.0.0-10.0.0.10"]}, {"vips": ["10.0.0.5-10.0.0.6", "10.0.0.0-10.0.0.20"]})
    assert set(paths(subject)) == {("networks", 1, "vips", 0), ("networks", 1, "vips", 1)}
