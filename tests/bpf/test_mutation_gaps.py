# SPDX-License-Identifier: Apache-2.0
"""What only a changed program (`python -m tools.mutate`) showed to be untested."""

from __future__ import annotations

import os
import socket
import struct
import time
from ipaddress import ip_network
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from datapath.kernel import bpf
from datapath.kernel.bpf import IngressTables, NetworkEntry, PointKey, tables
from datapath.kernel.bpf.abi import SourceCheck
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    Verdict,
)
from tests.bpf.conftest import run
from tests.bpf.harness import TC_ACT_UNSPEC, Outcome, harness
from tests.bpf.packets import ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.conftest import Wire
    from tests.bpf.harness import Harness

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MASK = 0x0A5F0000
LO = 1


@pytest.fixture(scope="module")
def program(module_node: str) -> Iterator[Harness]:
    """With two devices; the mask has gaps."""
    assert module_node
    for number, device in enumerate(("vlan0", "mgmt0"), start=1):
        run("ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}-peer")
        run("ip", "link", "set", f"{device}-peer", "up")
        run("ip", "link", "set", device, "up")
        run("ip", "address", "add", f"10.0.{number}.1/24", "dev", device)
        run("ip", "address", "add", f"fd01:0:{number}::1/64", "dev", device, "nodad")
        for version in (4, 6):
            run("sysctl", "-qw", f"net.ipv{version}.conf.{device}.forwarding=1")
    with harness(MASK, IngressTables()) as loaded:
        yield loaded


def _verdict(program: Harness, entry: NetworkEntry, data: bytes, gso_segs: int = 0) -> Verdict:
    point = PointKey(entry.device_ifindex, 0, 0)
    prefixes = {
        tables.PrefixTable.COMMON: {
            (0, ip_network("10.112.0.0/12")): SourceAction.DENY,
            (0, ip_network("fd00:10::/32")): SourceAction.DENY,
        },
        tables.PrefixTable.SOURCES: {},
        tables.PrefixTable.VIPS: {},
        tables.PrefixTable.FEASIBLE: {},
    }
    program.loaded.write_tables(IngressTables(networks={point: entry}, prefixes=prefixes))
    before = program.counts(entry.slot)
    program.run(data, ifindex=entry.device_ifindex, gso_segs=gso_segs)
    after = program.counts(entry.slot)
    (changed,) = (verdict for verdict in Verdict if before[verdict] != after[verdict])
    return changed


def _checked(other_check: OtherCheck = OtherCheck.OFF) -> NetworkEntry:
    ifindex = socket.if_nametoindex("vlan0")
    return NetworkEntry(
        slot=1,
        fwmark=0,
        device_ifindex=ifindex,
        check_martians=True,
        source_check=SourceCheck.COMMON,
        other_check=other_check,
    )


def test_mark_of_a_network_never_leaves_the_mask(program: Harness) -> None:
    """The plan refuses such a value; the program does not rely on it."""
    entry = NetworkEntry(slot=1, fwmark=0xFFFFFFFF, device_ifindex=LO)
    program.loaded.write_tables(IngressTables(networks={PointKey(LO, 0, 0): entry}))
    outcome = program.run(frame(ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1")), mark=0x00000001)
    assert outcome == Outcome(TC_ACT_UNSPEC, 0x00000001 | MASK)


@pytest.mark.parametrize(("length", "expected"), [(4, Verdict.PASS), (3, Verdict.MARTIAN)])
def test_ports_may_be_the_last_bytes_of_the_packet(program: Harness, length: int, expected: Verdict) -> None:
    dhcp = ipv4("0.0.0.0", "255.255.255.255", struct.pack("!HH", 68, 67)[:length])  # noqa: S104 - no socket
    assert _verdict(program, _checked(), frame(ETH_P_IP, dhcp)) is expected


@pytest.mark.parametrize(("length", "expected"), [(1, Verdict.PASS), (0, Verdict.MARTIAN)])
def test_the_type_may_be_the_last_byte_of_an_icmpv6_message(
    program: Harness, length: int, expected: Verdict
) -> None:
    solicitation = ipv6("::", "ff02::1:ff00:1", b"\x87"[:length], next_header=58, hop_limit=255)
    assert _verdict(program, _checked(), frame(ETH_P_IPV6, solicitation)) is expected


@pytest.mark.parametrize(("offset", "expected"), [(0, Verdict.PASS), (8, Verdict.RPF_STRICT)])
def test_later_fragment_has_no_ports(program: Harness, offset: int, expected: Verdict) -> None:
    """Its first bytes are not those of a DHCPv6 server."""
    header = struct.pack("!BBHI", 17, 0, offset, 7)
    body = struct.pack("!HHHH", 547, 546, 8, 0)
    data = frame(
        ETH_P_IPV6, ipv6("2001:db8:99::1", "fe80::1", body, next_header=44, extensions=header, hop_limit=64)
    )
    assert _verdict(program, _checked(OtherCheck.STRICT), data) is expected


@pytest.mark.parametrize(("segments", "expected"), [(1, Verdict.MALFORMED), (2, Verdict.PASS)])
def test_only_a_merged_packet_may_be_without_a_length(
    program: Harness, segments: int, expected: Verdict
) -> None:
    data = frame(ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1", total_length=0))
    assert _verdict(program, _checked(), data, gso_segs=segments) is expected


def test_samples_have_the_ports_of_every_protocol_with_ports(wire: Wire) -> None:
    network = IngressNetwork("a", 1, 0, IngressPoint("trunk0"), "trunk0", check_martians=True)
    protocols = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite
    ports = struct.pack("!HH", 1025, 443)
    with bpf.load_ingress(IngressProgram(MASK, (network,))) as loaded:
        bpf.attach(loaded, "trunk0")
        with bpf.DropReader(loaded.program_id) as reader:
            for protocol in (*protocols, 47):
                wire.send(frame(ETH_P_IP, ipv4("127.0.0.1", "198.51.100.1", ports, protocol=protocol)))
            drops = reader.poll(5.0)
    seen = [(drop.protocol, drop.source_port, drop.destination_port) for drop in drops]
    assert seen == [*((protocol, 1025, 443) for protocol in protocols), (47, 0, 0)]


def test_reader_that_died_is_forgotten(wire: Wire) -> None:
    """Its control entry is still there; only the time in it says that nobody renews it."""
    network = IngressNetwork("a", 1, 0, IngressPoint("trunk0"), "trunk0", check_martians=True)
    martian = frame(ETH_P_IP, ipv4("127.0.0.1", "198.51.100.1"))
    with bpf.load_ingress(IngressProgram(MASK, (network,))) as loaded:
        bpf.attach(loaded, "trunk0")
        with bpf.DropReader(loaded.program_id) as reader:
            wire.send(martian)
            assert len(reader.poll(5.0)) == 1
            reader._write_control(until_ns=1, reader=1)
            wire.send(martian)
            assert reader.poll(0) == []


def test_each_window_of_a_second_has_as_many_samples_as_asked_for(wire: Wire) -> None:
    """On one CPU: each has a window of its own."""
    network = IngressNetwork("a", 1, 0, IngressPoint("trunk0"), "trunk0", check_martians=True)
    martian = frame(ETH_P_IP, ipv4("127.0.0.1", "198.51.100.1"))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with bpf.load_ingress(IngressProgram(MASK, (network,))) as loaded:
            bpf.attach(loaded, "trunk0")
            with bpf.DropReader(loaded.program_id, per_second=3) as reader:
                wire.send(martian, times=50)
                times = [drop.time_ns for drop in reader.poll(5.0)]
                while time.monotonic_ns() < times[0] + 1_000_000_000:
                    time.sleep(0.05)
                wire.send(martian, times=50)
                times += [drop.time_ns for drop in reader.poll(5.0)]
    finally:
        os.sched_setaffinity(0, before)
    # A window begins with its first sample, and every fourth sample begins one.
    windows = times[::3]
    assert len(windows) >= 2
    assert all(later - earlier >= 1_000_000_000 for earlier, later in pairwise(windows))


@pytest.mark.parametrize(
    ("kind", "hop_limit", "source", "expected"),
    [
        *((kind, 255, "::", Verdict.PASS) for kind in (133, 134, 135, 136, 137)),
        *((kind, 255, "::", Verdict.MARTIAN) for kind in (130, 132, 138, 143)),
        *((kind, 254, "::", Verdict.MARTIAN) for kind in (133, 137)),
        *((kind, 1, "::", Verdict.PASS) for kind in (130, 131, 132, 143)),
        *((kind, 1, "::", Verdict.MARTIAN) for kind in (129, 133, 142, 144)),
        *((kind, 2, "::", Verdict.MARTIAN) for kind in (130, 132, 143)),
        *((kind, 1, "::1", Verdict.MARTIAN) for kind in (130, 132, 143)),
        *((kind, 1, "fd00:10::1", Verdict.SPOOFED) for kind in (130, 143)),
    ],
)
def test_icmpv6_that_keeps_the_link_going(
    program: Harness, kind: int, hop_limit: int, source: str, expected: Verdict
) -> None:
    message = ipv6(source, "ff02::16", bytes([kind, 0, 0, 0]), next_header=58, hop_limit=hop_limit)
    assert _verdict(program, _checked(), frame(ETH_P_IPV6, message)) is expected


@pytest.mark.parametrize(
    ("protocol", "ports", "destination", "expected"),
    [
        (17, (68, 67), "255.255.255.255", Verdict.PASS),
        (17, (69, 67), "255.255.255.255", Verdict.MARTIAN),
        (17, (68, 66), "255.255.255.255", Verdict.MARTIAN),
        (17, (68, 67), "255.255.255.254", Verdict.MARTIAN),
        (6, (68, 67), "255.255.255.255", Verdict.MARTIAN),
        (2, (0, 0), "224.0.0.22", Verdict.PASS),
        (2, (0, 0), "239.255.255.255", Verdict.PASS),
        (2, (0, 0), "240.0.0.0", Verdict.MARTIAN),
        (2, (0, 0), "223.255.255.255", Verdict.MARTIAN),
    ],
)
def test_host_without_an_address(
    program: Harness, protocol: int, ports: tuple[int, int], destination: str, expected: Verdict
) -> None:
    data = ipv4("0.0.0.0", destination, struct.pack("!HHI", *ports, 0), protocol=protocol)  # noqa: S104 - no socket
    assert _verdict(program, _checked(), frame(ETH_P_IP, data)) is expected


@pytest.mark.parametrize(
    ("destination", "ports", "expected"),
    [
        ("255.255.255.255", (9, 9), Verdict.PASS),
        ("255.255.255.254", (9, 9), Verdict.RPF_STRICT),
        ("224.0.0.255", (9, 9), Verdict.PASS),
        ("224.0.1.0", (9, 9), Verdict.RPF_STRICT),
        ("10.0.1.9", (67, 68), Verdict.PASS),
        ("10.0.1.9", (66, 68), Verdict.RPF_STRICT),
        ("10.0.1.9", (67, 67), Verdict.RPF_STRICT),
        ("ff01::1", (9, 9), Verdict.PASS),
        ("ff02::1", (9, 9), Verdict.PASS),
        ("ff12::1", (9, 9), Verdict.PASS),
        ("ff11::1", (9, 9), Verdict.PASS),
        ("ff05::1", (9, 9), Verdict.RPF_STRICT),
        ("fe80::9", (547, 546), Verdict.PASS),
        ("fe80::9", (545, 546), Verdict.RPF_STRICT),
        ("fe80::9", (547, 547), Verdict.RPF_STRICT),
        ("fd01:0:1::9", (547, 546), Verdict.RPF_STRICT),
    ],
)
def test_what_needs_no_way_back(
    program: Harness, destination: str, ports: tuple[int, int], expected: Verdict
) -> None:
    """From a source that no route leads to."""
    body = struct.pack("!HHHH", *ports, 8, 0)
    if ":" in destination:
        data = frame(ETH_P_IPV6, ipv6("2001:db8:99::1", destination, body))
    else:
        data = frame(ETH_P_IP, ipv4("192.0.2.99", destination, body))
    assert _verdict(program, _checked(OtherCheck.STRICT), data) is expected


@pytest.mark.parametrize("version", [4, 6])
def test_packet_longer_than_the_mtu_of_the_way_back_has_a_way_back(program: Harness, version: int) -> None:
    """The helper compares this packet with that MTU, once the neighbour is known."""
    source = {4: "10.0.1.77", 6: "fd01:0:1::77"}[version]
    run("ip", "neighbour", "replace", source, "dev", "vlan0", "lladdr", "02:00:00:00:00:77")
    run("ip", "link", "set", "vlan0", "mtu", "1280")
    body = bytes(1400)
    data = {
        4: lambda: frame(ETH_P_IP, ipv4(source, "198.51.100.1", body, protocol=47)),
        6: lambda: frame(ETH_P_IPV6, ipv6(source, "2001:db8::1", body, next_header=47)),
    }[version]()
    try:
        assert _verdict(program, _checked(other_check=OtherCheck.STRICT), data) is Verdict.PASS
    finally:
        run("ip", "link", "set", "vlan0", "mtu", "1500")


@pytest.mark.parametrize(
    ("source", "data"),
    [
        pytest.param("203.0.113.0/24", frame(ETH_P_IP, ipv4("203.0.113.9", "198.51.100.1")), id="ipv4"),
        pytest.param("2001:db8:9::/48", frame(ETH_P_IPV6, ipv6("2001:db8:9::9", "2001:db8::1")), id="ipv6"),
    ],
)
def test_route_chosen_by_the_address_of_the_reply_is_found(
    program: Harness, source: str, data: bytes
) -> None:
    """An ip rule that asks for the reply's source, which is this packet's destination."""
    family = "-6" if ":" in source else "-4"
    reply_from = "2001:db8::1" if ":" in source else "198.51.100.1"
    run("ip", family, "route", "add", source, "dev", "vlan0", "table", "77")
    run("ip", family, "route", "add", source, "dev", "mgmt0")
    try:
        assert _verdict(program, _checked(other_check=OtherCheck.STRICT), data) is Verdict.RPF_STRICT
        run("ip", family, "rule", "add", "from", reply_from, "lookup", "77", "priority", "100")
        assert _verdict(program, _checked(other_check=OtherCheck.STRICT), data) is Verdict.PASS
    finally:
        run("ip", family, "route", "delete", source, "dev", "mgmt0")
    run("ip", family, "rule", "delete", "priority", "100")


def test_encapsulating_route_is_a_route_but_not_by_the_device(program: Harness) -> None:
    encapsulation = ["encap", "ip", "id", "7", "dst", "10.0.1.9"]
    run("ip", "route", "add", "100.64.0.0/10", *encapsulation, "dev", "vlan0")
    data = frame(ETH_P_IP, ipv4("100.64.0.9", "198.51.100.1"))
    try:
        assert _verdict(program, _checked(other_check=OtherCheck.LOOSE), data) is Verdict.PASS
        assert _verdict(program, _checked(other_check=OtherCheck.STRICT), data) is Verdict.RPF_STRICT
    finally:
        run("ip", "route", "delete", "100.64.0.0/10")
