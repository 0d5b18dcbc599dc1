# SPDX-License-Identifier: Apache-2.0
"""Which packets belong to which network, and what their mark becomes; on the real kernel, packet by packet."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.kernel.bpf import Counter, IngressTables, NetworkEntry, PointKey
from datapath.plan.ingress import Verdict
from tests.bpf import packets
from tests.bpf.harness import TC_ACT_UNSPEC, Outcome, harness
from tests.bpf.packets import ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.harness import Harness

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MASK = 0x00FF0000
LO = 1
UNTAGGED, VLAN_100, VLAN_100_AD, VLAN_200 = 0x10000, 0x20000, 0x30000, 0x40000

TABLES = IngressTables(
    networks={
        PointKey(LO, 0, 0): NetworkEntry(slot=1, fwmark=UNTAGGED, device_ifindex=LO),
        PointKey(LO, ETH_P_8021Q, 100): NetworkEntry(slot=2, fwmark=VLAN_100, device_ifindex=LO),
        PointKey(LO, ETH_P_8021AD, 100): NetworkEntry(slot=3, fwmark=VLAN_100_AD, device_ifindex=LO),
        PointKey(LO, ETH_P_8021Q, 200): NetworkEntry(slot=4, fwmark=VLAN_200, device_ifindex=LO),
        PointKey(LO, ETH_P_8021Q, 300): NetworkEntry(slot=5, fwmark=0, device_ifindex=LO),
    }
)

V4 = ipv4("192.0.2.1", "198.51.100.1")
V6 = ipv6("2001:db8::1", "2001:db8:1::1")


@pytest.fixture(scope="module")
def program(module_node: str) -> Iterator[Harness]:
    assert module_node
    with harness(MASK, TABLES) as loaded:
        yield loaded


IP_PACKETS = [
    pytest.param((ETH_P_IP, V4), id="ipv4"),
    pytest.param((ETH_P_IPV6, V6), id="ipv6"),
    pytest.param((ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1", fragment=0x2000)), id="ipv4-first-fragment"),
    pytest.param((ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1", fragment=0x00B9)), id="ipv4-later-fragment"),
    pytest.param(
        (ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1", options=b"\x07\x04\x04\x00")), id="ipv4-options"
    ),
    pytest.param(
        (
            ETH_P_IPV6,
            ipv6(
                "2001:db8::1", "2001:db8:1::1", next_header=44, extensions=struct.pack("!BBHI", 17, 0, 8, 1)
            ),
        ),
        id="ipv6-later-fragment",
    ),
    pytest.param(
        (
            ETH_P_IPV6,
            ipv6("2001:db8::1", "2001:db8:1::1", next_header=0, extensions=b"\x11\x00\x01\x04\0\0\0\0"),
        ),
        id="ipv6-hop-by-hop",
    ),
]


@pytest.mark.parametrize("packet", IP_PACKETS)
@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        pytest.param((), UNTAGGED, id="untagged"),
        pytest.param(((ETH_P_8021Q, 100),), VLAN_100, id="802.1Q"),
        pytest.param(((ETH_P_8021AD, 100),), VLAN_100_AD, id="802.1ad"),
        pytest.param(((ETH_P_8021Q, 0xF064),), VLAN_100, id="priority-and-dei-bits"),
        pytest.param(((ETH_P_8021Q, 0xE000),), UNTAGGED, id="priority-tag"),
        pytest.param(((ETH_P_8021Q, 0), (ETH_P_8021Q, 100)), VLAN_100, id="priority-tag-before-the-tag"),
        pytest.param(((ETH_P_8021AD, 0), (ETH_P_8021Q, 0), (ETH_P_8021Q, 200)), VLAN_200, id="two-of-them"),
        pytest.param(((ETH_P_8021Q, 101),), 0, id="another-vlan"),
        pytest.param(((ETH_P_8021AD, 200),), 0, id="right-id-wrong-tpid"),
        pytest.param(((ETH_P_8021AD, 100), (ETH_P_8021Q, 200)), 0, id="qinq-belongs-to-the-inner-device"),
        pytest.param(((ETH_P_8021Q, 100), (ETH_P_8021Q, 200)), 0, id="q-in-q-same-tpid"),
    ],
)
@pytest.mark.parametrize("in_metadata", [True, False], ids=["metadata", "in-band"])
def test_network_is_chosen_by_the_tag_that_counts(
    program: Harness,
    packet: tuple[int, bytes],
    tags: tuple[packets.Tag, ...],
    expected: int,
    *,
    in_metadata: bool,
) -> None:
    ethertype, payload = packet
    metadata = tags[0] if tags and in_metadata else None
    data = frame(ethertype, payload, tags[1:] if metadata else tags)
    outcome = program.run(data, mark=0xA5000B0C, metadata_tag=metadata)
    assert outcome == Outcome(TC_ACT_UNSPEC, 0xA5000B0C | expected)


@pytest.mark.parametrize(
    ("ethertype", "payload"),
    [
        pytest.param(packets.ETH_P_ARP, b"\0\1\x08\0\6\4\0\1" + bytes(20), id="arp"),
        pytest.param(0x8847, b"\0\0\x11\xff" + V4, id="mpls"),
        pytest.param(0x0026, b"\x42\x42\x03" + bytes(35), id="802.3-length"),
        pytest.param(0x88CC, bytes(46), id="lldp"),
    ],
)
@pytest.mark.parametrize("metadata_tag", [None, (ETH_P_8021Q, 100)])
def test_other_ethertypes_pass_untouched(
    program: Harness, ethertype: int, payload: bytes, metadata_tag: packets.Tag | None
) -> None:
    before = program.loaded.read_counters()
    outcome = program.run(frame(ethertype, payload), mark=0x00FF00FF, metadata_tag=metadata_tag)
    assert outcome == Outcome(TC_ACT_UNSPEC, 0x00FF00FF)
    assert program.loaded.read_counters() == before


def test_endless_priority_tags_end(program: Harness) -> None:
    tags = ((ETH_P_8021Q, 0),) * 300 + ((ETH_P_8021Q, 100),)
    assert program.run(frame(ETH_P_IP, V4, tags)) == Outcome(TC_ACT_UNSPEC, 0)


@pytest.mark.parametrize("tail", range(6))
def test_frame_that_ends_inside_a_tag_passes(program: Harness, tail: int) -> None:
    data = frame(ETH_P_8021Q, bytes(tail))
    assert program.run(data) == Outcome(TC_ACT_UNSPEC, 0)


def test_network_without_mark_leaves_the_mark_alone_but_counts(program: Harness) -> None:
    before = program.loaded.read_counters().get(5, {Verdict.PASS: Counter()})
    outcome = program.run(frame(ETH_P_IP, V4), mark=0xFFFFFFFF, metadata_tag=(ETH_P_8021Q, 300))
    assert outcome == Outcome(TC_ACT_UNSPEC, 0xFFFFFFFF)
    after = program.loaded.read_counters()[5][Verdict.PASS]
    assert after.packets == before[Verdict.PASS].packets + 1


def test_counters_count_packets_bytes_and_merged_segments(program: Harness) -> None:
    data = frame(ETH_P_IP, V4)
    before = program.loaded.read_counters().get(4, dict.fromkeys(Verdict, Counter()))
    program.run(data, metadata_tag=(ETH_P_8021Q, 200))
    program.run(data, metadata_tag=(ETH_P_8021Q, 200), gso_segs=7)
    after = program.loaded.read_counters()[4]
    assert after[Verdict.PASS] == before[Verdict.PASS] + Counter(packets=8, bytes=2 * len(data))
    assert {verdict: after[verdict] for verdict in Verdict if verdict is not Verdict.PASS} == dict.fromkeys(
        [verdict for verdict in Verdict if verdict is not Verdict.PASS], Counter()
    )


@pytest.mark.usefixtures("node")
def test_another_device_is_not_ours() -> None:
    tables = IngressTables(
        networks={PointKey(999, 0, 0): NetworkEntry(slot=1, fwmark=0x10000, device_ifindex=999)}
    )
    with harness(MASK, tables) as program:
        assert program.run(frame(ETH_P_IP, V4), mark=5) == Outcome(TC_ACT_UNSPEC, 5)


@pytest.mark.parametrize(
    "mask", [0x1, 0x80000000, 0xFF, 0x0000FF00, 0x00FF0000, 0x0FF0, 0xA5A5A5A5, 0xFFFFFFFF]
)
@pytest.mark.usefixtures("node")
def test_only_bits_inside_the_mask_are_written(mask: int) -> None:
    """P' = (P & ~M) | V for any previous mark, any value, several masks."""
    with harness(mask, IngressTables()) as program:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(previous=st.integers(0, 0xFFFFFFFF), value=st.integers(1, 0xFFFFFFFF))
        def property_holds(previous: int, value: int) -> None:
            # Not masked here: the program itself must not trust what is in its map.
            entry = NetworkEntry(slot=1, fwmark=value, device_ifindex=LO)
            program.loaded.write_tables(IngressTables(networks={PointKey(LO, 0, 0): entry}))
            outcome = program.run(frame(ETH_P_IPV6, V6), mark=previous)
            assert outcome == Outcome(TC_ACT_UNSPEC, (previous & ~mask & 0xFFFFFFFF) | (value & mask))

        property_holds()
