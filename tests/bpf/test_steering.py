# SPDX-License-Identifier: Apache-2.0
"""The egress program, packet by packet: which are taken, where to, and that nothing else is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from datapath.kernel.bpf import Capacities, abi, compiler, libbpf, source
from datapath.kernel.bpf.loaded import Counter
from datapath.kernel.bpf.steering import LoadedSteering
from datapath.kernel.bpf.steering_tables import SteeringTables, resolve_steering
from datapath.plan.steering import SteeredNetwork, SteeringProgram
from tests.bpf.packets import ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, Tag, frame, ipv4, ipv6, udp

pytestmark = [pytest.mark.root, pytest.mark.bpf]

UNSPEC, REDIRECT = -1, 7
OUT = 1  # the loopback device of the namespace: it exists, and is none of the networks' devices
_CONTEXT_SIZE, _MARK, _IFINDEX, _CB, _GSO_SEGS = 180, 8, 40, 48, 164

PUBLIC = SteeredNetwork(
    name="public",
    slot=1,
    device="vlan100",
    vips=tuple(map(ip_network, ("192.0.2.0/24", "2001:db8:100::/64"))),
    gateways=tuple(map(ip_address, ("192.0.2.1", "2001:db8:100::1"))),
    on_link=tuple(
        map(ip_network, ("192.0.2.0/24", "203.0.113.64/26", "2001:db8:100::/64", "2001:db8:7::/48"))
    ),
)
#: Inside the first one's prefix: the longest decides. Its IPv6 gateway is link-local.
INNER = SteeredNetwork(
    name="inner",
    slot=7,
    device="vlan200",
    vips=tuple(map(ip_network, ("192.0.2.128/25", "2001:db8:100::8000/113"))),
    gateways=tuple(map(ip_address, ("198.51.100.1", "fe80::1"))),
    on_link=(ip_network("198.51.100.0/24"),),
)
PROGRAM = SteeringProgram(
    devices=("eth0",),
    networks=(PUBLIC, INNER),
    passed=tuple(map(ip_network, ("10.96.0.0/12", "224.0.0.0/4", "fd00:10::/32", "ff00::/8"))),
)
IFINDEXES = {"vlan100": 100, "vlan200": 200}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Next hop and device that were asked for; None where the packet passed."""

    device: int
    next_hop: IPv4Address | IPv6Address


class Steering:
    """The loaded test program."""

    def __init__(self, loaded: LoadedSteering, asked: libbpf.Map) -> None:
        self.loaded = loaded
        self._asked = asked

    def run(self, data: bytes, *, ifindex: int = OUT, tag: Tag = (0, 0), gso_segs: int = 0) -> Outcome | None:
        """One packet on its way out of a device."""
        context = bytearray(_CONTEXT_SIZE)
        struct.pack_into("=I", context, _MARK, 0x12345678)
        struct.pack_into("=I", context, _IFINDEX, ifindex)
        struct.pack_into("=II", context, _CB, *tag)
        struct.pack_into("=I", context, _GSO_SEGS, gso_segs)
        result = self.loaded.test_run(data, context=bytes(context))
        (mark,) = struct.unpack_from("=I", result.context, _MARK)
        assert mark == 0x12345678
        if not tag[0]:
            assert result.data == data  # TTL, hop limit and all
        if result.return_value == UNSPEC:
            return None
        assert result.return_value == REDIRECT
        device, family, *words = struct.unpack("=II4I", self._asked.lookup(bytes(4)) or b"")
        raw = struct.pack("=4I", *words)
        if family == socket.AF_INET:
            return Outcome(device, IPv4Address(raw[:4]))
        assert family == socket.AF_INET6
        return Outcome(device, IPv6Address(raw))


@contextlib.contextmanager
def loaded(tables: SteeringTables) -> Iterator[Steering]:
    """Compile and load the test program with these tables."""
    text = source.render(0, Capacities(1, 16), entry=Path(__file__).with_name("steering_entry.bpf.c"))
    names = (*abi.STEERING_MAP_NAMES, "test_asked")
    programs, fds = compiler.compile_and_load(text, functions=["datapath_test"], maps=names)
    maps = {bpf_map.name: bpf_map for bpf_map in map(libbpf.Map, fds)}
    with LoadedSteering(programs[0], maps.values()) as program:
        program.write_tables(tables)
        yield Steering(program, maps["test_asked"])


@pytest.fixture(scope="module")
def steering(module_node: str) -> Iterator[Steering]:
    assert module_node
    with loaded(resolve_steering(PROGRAM, IFINDEXES)) as made:
        yield made


def packet(source_address: str, destination: str, **options: Any) -> bytes:
    """A datagram of the addresses' family."""
    if ":" in source_address:
        return frame(ETH_P_IPV6, ipv6(source_address, destination, **options))
    return frame(ETH_P_IP, ipv4(source_address, destination, **options))


@pytest.mark.parametrize(
    ("source_address", "destination", "device", "next_hop"),
    [
        ("192.0.2.10", "203.0.113.9", 100, "192.0.2.1"),
        ("192.0.2.10", "192.0.2.77", 100, "192.0.2.77"),
        ("192.0.2.10", "192.0.3.0", 100, "192.0.2.1"),
        ("192.0.2.10", "203.0.113.64", 100, "203.0.113.64"),
        ("192.0.2.10", "203.0.113.128", 100, "192.0.2.1"),
        ("2001:db8:100::10", "2001:db8:7:ffff::1", 100, "2001:db8:7:ffff::1"),
        ("2001:db8:100::10", "2001:db8:8::1", 100, "2001:db8:100::1"),
        ("2001:db8:100::10", "2001:db8:100:1::", 100, "2001:db8:100::1"),
        ("192.0.2.127", "198.51.100.9", 100, "192.0.2.1"),
        ("192.0.2.128", "203.0.113.9", 200, "198.51.100.1"),
        ("192.0.2.255", "198.51.100.9", 200, "198.51.100.9"),
        ("192.0.2.255", "192.0.2.77", 200, "198.51.100.1"),
        ("2001:db8:100::10", "2001:db8:ffff::9", 100, "2001:db8:100::1"),
        ("2001:db8:100::10", "2001:db8:100::77", 100, "2001:db8:100::77"),
        ("2001:db8:100::8000", "2001:db8:ffff::9", 200, "fe80::1"),
        ("2001:db8:100::8000", "2001:db8:100::77", 200, "fe80::1"),
        ("2001:db8:100:0:ffff::", "2001:db8:ffff::9", 100, "2001:db8:100::1"),
    ],
)
def test_answers_go_to_the_network_of_their_source(
    steering: Steering, source_address: str, destination: str, device: int, next_hop: str
) -> None:
    assert steering.run(packet(source_address, destination)) == Outcome(device, ip_address(next_hop))


@pytest.mark.parametrize(
    ("source_address", "destination"),
    [
        ("192.0.1.255", "203.0.113.9"),
        ("192.0.3.0", "203.0.113.9"),
        ("203.0.113.9", "192.0.2.10"),  # a VIP as destination says nothing
        ("192.0.2.10", "10.97.1.1"),
        ("192.0.2.10", "10.111.255.255"),
        ("192.0.2.10", "224.0.0.251"),
        ("2001:db8:101::", "2001:db8:ffff::9"),
        ("2001:db8:ff:ffff::", "2001:db8:ffff::9"),
        ("2001:db8:100::10", "fd00:10:96::1"),
        ("2001:db8:100::10", "ff02::1"),
        ("::ffff:192.0.2.10", "2001:db8:ffff::9"),
    ],
)
def test_everything_else_passes(steering: Steering, source_address: str, destination: str) -> None:
    assert steering.run(packet(source_address, destination)) is None


def test_neighbours_of_the_excepted_prefixes_are_steered(steering: Steering) -> None:
    for destination in ("10.95.255.255", "10.112.0.0", "223.255.255.255", "240.0.0.1"):
        assert steering.run(packet("192.0.2.10", destination)) is not None
    for destination in ("fd00:f:ffff::", "fd00:11::", "feff::1"):
        assert steering.run(packet("2001:db8:100::10", destination)) is not None


def test_packet_that_is_on_its_network_already_passes(steering: Steering) -> None:
    one = dataclasses.replace(PUBLIC, on_link=())
    with loaded(resolve_steering(dataclasses.replace(PROGRAM, networks=(one,)), {"vlan100": OUT})) as there:
        assert there.run(packet("192.0.2.10", "203.0.113.9")) is None
        assert there.run(packet("2001:db8:100::10", "2001:db8:ffff::9")) is None
    assert steering.run(packet("192.0.2.10", "203.0.113.9")) is not None


def test_single_addresses_are_told_from_their_neighbours(steering: Steering) -> None:
    """As VIPs, as clients on the link, and as destinations that are left alone."""
    single = SteeredNetwork(
        "single",
        1,
        "vlan100",
        tuple(map(ip_network, ("192.0.2.10", "2001:db8:100::10"))),
        PUBLIC.gateways,
        tuple(map(ip_network, ("198.51.100.2", "2001:db8:5::2"))),
    )
    passed = tuple(map(ip_network, ("203.0.113.2", "2001:db8:6::2")))
    assert steering.loaded.program_id
    with loaded(resolve_steering(SteeringProgram(("eth0",), (single,), passed), IFINDEXES)) as alone:
        for vip, neighbour, client, other, left_alone, beside in (
            ("192.0.2.10", "192.0.2.11", "198.51.100.2", "198.51.100.3", "203.0.113.2", "203.0.113.3"),
            (*(f"2001:db8:{text}" for text in ("100::10", "100::11", "5::2", "5::3", "6::2", "6::3")),),
        ):
            gateway = next(g for g in PUBLIC.gateways if g.version == ip_address(vip).version)
            assert alone.run(packet(neighbour, other)) is None
            assert alone.run(packet(vip, client)) == Outcome(100, ip_address(client))
            assert alone.run(packet(vip, other)) == Outcome(100, gateway)
            assert alone.run(packet(vip, left_alone)) is None
            assert alone.run(packet(vip, beside)) == Outcome(100, gateway)


def test_tagged_packet_passes(steering: Steering) -> None:
    """It leaves by a VLAN device on top of this one: perhaps because we sent it there."""
    data = packet("192.0.2.10", "203.0.113.9")
    for tci in (100, 0, 0x6064):
        assert steering.run(data, tag=(ETH_P_8021Q, tci)) is None
    in_band = frame(ETH_P_IP, ipv4("192.0.2.10", "203.0.113.9"), ((ETH_P_8021Q, 100),))
    assert steering.run(in_band) is None


@pytest.mark.parametrize("fragment", [0x2000, 0x2001, 0x0080, 0x4000])
def test_fragments_go_the_same_way(steering: Steering, fragment: int) -> None:
    assert steering.run(packet("192.0.2.10", "203.0.113.9", fragment=fragment)) is not None


def test_headers_behind_the_addresses_do_not_matter(steering: Steering) -> None:
    body = ipv4("192.0.2.10", "203.0.113.9", udp(), options=b"\x94\x04\x00\x00")
    assert steering.run(frame(ETH_P_IP, body)) is not None
    fragment6 = struct.pack("!BBHI", 17, 0, 1, 99)
    body6 = ipv6("2001:db8:100::10", "2001:db8:ffff::9", next_header=44, extensions=fragment6)
    assert steering.run(frame(ETH_P_IPV6, body6)) is not None
    bare = ipv6("2001:db8:100::10", "2001:db8:ffff::9", b"", next_header=59)
    assert steering.run(frame(ETH_P_IPV6, bare)) is not None


@pytest.mark.parametrize("ttl", [1, 2, 255])
def test_ttl_stays(steering: Steering, ttl: int) -> None:
    """`run` compares every byte."""
    assert steering.run(packet("192.0.2.10", "203.0.113.9", ttl=ttl)) is not None
    assert steering.run(packet("2001:db8:100::10", "2001:db8:ffff::9", hop_limit=ttl)) is not None


def test_other_protocols_and_short_packets_pass(steering: Steering) -> None:
    arp = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 1) + bytes(6) + bytes([192, 0, 2, 10]) + bytes(10)
    assert steering.run(frame(ETH_P_ARP, arp)) is None
    as_ip = ipv4("192.0.2.10", "203.0.113.9")
    assert steering.run(frame(0x88B5, as_ip)) is None
    assert steering.run(frame(0x88B5, ipv6("2001:db8:100::10", "2001:db8:ffff::9"))) is None
    assert steering.run(frame(0x88B5, as_ip[:4])) is None


def test_steered_packets_are_counted_by_network_and_segment(steering: Steering) -> None:
    before = steering.loaded.read_counters()
    data = packet("192.0.2.200", "203.0.113.9")
    for segments in (0, 1, 5):
        steering.run(data, gso_segs=segments)
    steering.run(packet("192.0.2.200", "10.97.1.1"))
    after = steering.loaded.read_counters()
    counted = Counter(7, 3 * len(data))
    assert after[INNER.slot] == before.get(INNER.slot, Counter()) + counted
    assert {slot: c for slot, c in after.items() if slot != INNER.slot} == {
        slot: c for slot, c in before.items() if slot != INNER.slot
    }


def test_tables_are_read_back_as_they_were_written(steering: Steering) -> None:
    assert steering.loaded.read_tables() == resolve_steering(PROGRAM, IFINDEXES)


def test_first_half_of_a_change_keeps_what_was_and_the_second_does_not(steering: Steering) -> None:
    old = resolve_steering(dataclasses.replace(PROGRAM, networks=(PUBLIC,)), IFINDEXES)
    new = resolve_steering(dataclasses.replace(PROGRAM, networks=(INNER,), passed=()), IFINDEXES)
    assert steering.loaded.program_id
    with loaded(old) as changing:
        changing.loaded.write_tables(new, only_add=True)
        assert changing.run(packet("192.0.2.10", "203.0.113.9")) == Outcome(100, ip_address("192.0.2.1"))
        assert changing.run(packet("192.0.2.200", "203.0.113.9")) == Outcome(200, ip_address("198.51.100.1"))
        assert changing.loaded.read_tables() == new.joined(old)
        changing.loaded.write_tables(new)
        assert changing.run(packet("192.0.2.10", "203.0.113.9")) is None
        assert changing.run(packet("192.0.2.200", "10.97.1.1")) is not None
        assert changing.loaded.read_tables() == new


def test_same_vip_of_two_networks_is_a_bug_of_the_compiler() -> None:
    with pytest.raises(ValueError, match="another network has the VIP"):
        resolve_steering(SteeringProgram(("eth0",), (PUBLIC, PUBLIC)), IFINDEXES)
