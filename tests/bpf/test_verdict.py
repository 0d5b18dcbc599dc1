# SPDX-License-Identifier: Apache-2.0
"""The verdict, case by case: the table is the specification, and the model and the loaded program both keep it."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv4Address, ip_network
from typing import TYPE_CHECKING

import pytest

from datapath.kernel import tc
from datapath.kernel.bpf import IngressTables, resolve
from datapath.observe.reference import Arrival, judge
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    SourceRule,
    Verdict,
    VipCheck,
)
from tests.bpf.conftest import run
from tests.bpf.harness import TC_ACT_SHOT, TC_ACT_UNSPEC, harness
from tests.bpf.packets import ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6, udp
from tests.bpf.routes import RouteFib, read_fib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.harness import Harness

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MASK = 0xFF00
FORWARDING = (("vlan0", 4), ("vlan0", 6), ("mgmt0", 4), ("mgmt0", 6))


def _rules(allow: str = "", deny: str = "") -> tuple[SourceRule, ...]:
    allowed = [SourceRule(ip_network(text), SourceAction.ALLOW) for text in allow.split()]
    return (*allowed, *(SourceRule(ip_network(text), SourceAction.DENY) for text in deny.split()))


UNSPECIFIED4 = str(IPv4Address(0))

# The usual node: VIPs and their subnet on the VLAN, pods and services inside.
NETWORK = IngressNetwork(
    name="public",
    slot=1,
    fwmark=0x100,
    point=IngressPoint("vlan0"),
    device="vlan0",
    vips=(ip_network("198.51.100.0/24"), ip_network("2001:db8:100::/64")),
    vip_check=VipCheck.FEASIBLE,
    other_check=OtherCheck.STRICT,
    sources=_rules(allow="198.51.100.0/24 2001:db8:100::/64", deny="198.51.100.66/32 2001:db8:100::66/128"),
    feasible=(ip_network("0.0.0.0/0"), ip_network("::/0")),
    check_martians=True,
    check_sources=True,
)
COMMON = _rules(
    deny="10.96.0.0/12 10.112.0.0/12 198.51.100.0/24 203.0.113.0/24 fd00:10::/32 2001:db8:100::/64 2001:db8:200::/64",
    allow="10.112.9.0/24 fd00:10:9::/48",
)
PROGRAM = IngressProgram(MASK, (NETWORK,), common_sources=COMMON)
NARROW = replace(NETWORK, feasible=(ip_network("192.0.2.0/25"), ip_network("2001:db8:1::/65")))
STRICT_VIPS = replace(NETWORK, vip_check=VipCheck.STRICT, feasible=())
LOOSE = replace(NETWORK, other_check=OtherCheck.LOOSE)
ALL_OFF = IngressNetwork(name="off", slot=1, fwmark=0x100, point=IngressPoint("vlan0"), device="vlan0")

VIP4, VIP6 = "198.51.100.10", "2001:db8:100::10"
ELSEWHERE4, ELSEWHERE6 = "10.112.0.5", "fd00:10:112::5"

PASS, SPOOFED, MARTIAN = Verdict.PASS, Verdict.SPOOFED, Verdict.MARTIAN
MALFORMED, UNREACHABLE = Verdict.MALFORMED, Verdict.VIP_UNREACHABLE


@pytest.fixture(scope="module")
def fib(module_node: str) -> RouteFib:
    assert module_node
    for device in ("vlan0", "mgmt0"):
        run("ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}-peer")
        run("ip", "link", "set", f"{device}-peer", "up")
        run("ip", "link", "set", device, "up")
    for device, number in (("vlan0", 1), ("mgmt0", 2)):
        run("ip", "address", "add", f"10.0.{number}.1/24", "dev", device)
        run("ip", "address", "add", f"fd01:0:{number}::1/64", "dev", device, "nodad")
    run("ip", "-4", "route", "add", "172.16.0.0/16", "via", "10.0.1.254")
    run("ip", "-6", "route", "add", "2001:db8:16::/48", "via", "fd01:0:1::fe")
    run("ip", "-4", "route", "add", "192.0.2.0/24", "via", "10.0.2.254")
    run("ip", "-6", "route", "add", "2001:db8:1::/48", "via", "fd01:0:2::fe")
    return read_fib(("vlan0", "mgmt0"), forwarding=FORWARDING)


@pytest.fixture(scope="module")
def program(fib: RouteFib) -> Iterator[Harness]:
    assert fib.tables
    with harness(MASK, IngressTables()) as loaded:
        yield loaded


def _decide(program: Harness, fib: RouteFib, networks: IngressProgram, data: bytes) -> Verdict:
    """Verdict of model and program, which must be one."""
    expected = judge(networks, Arrival("vlan0", data, mark=0xA0000), fib)
    ifindexes = tc.ifindexes()
    program.loaded.write_tables(resolve(networks, ifindexes))
    before = program.counts(expected.slot or 0)
    outcome = program.run(data, ifindex=ifindexes["vlan0"], mark=0xA0000)
    after = program.counts(expected.slot or 0)
    counted = [verdict for verdict in Verdict if before[verdict] != after[verdict]]
    assert counted == ([] if expected.slot is None else [expected.verdict])
    assert outcome.action == (TC_ACT_UNSPEC if expected.passes else TC_ACT_SHOT)
    assert outcome.mark == expected.mark
    return expected.verdict


SOURCES = [
    # what, IPv4 source, IPv6 source, verdict towards the VIP
    ("client somewhere", "192.0.2.1", "2001:db8:1::1", PASS),
    ("client on the VLAN itself", "198.51.100.77", "2001:db8:100::77", PASS),
    ("denied address inside an allowed subnet", "198.51.100.66", "2001:db8:100::66", SPOOFED),
    ("pod", "10.112.0.9", "fd00:10:112::9", SPOOFED),
    ("just below the pods", "10.95.255.255", "fd00:f:ffff:ffff:ffff:ffff:ffff:ffff", PASS),
    ("just above the pods", "10.128.0.0", "fd00:11::", PASS),
    ("allowed hole in the pods", "10.112.9.1", "fd00:10:9::1", PASS),
    ("VIP of another network", "203.0.113.1", "2001:db8:200::1", SPOOFED),
    ("unspecified", UNSPECIFIED4, "::", MARTIAN),
    ("loopback", "127.0.0.1", "::1", MARTIAN),
    ("multicast", "224.0.0.251", "ff02::fb", MARTIAN),
    ("reserved", "240.0.0.1", "::ffff:192.0.2.1", MARTIAN),
    ("broadcast or IPv4-compatible", "255.255.255.255", "::192.0.2.1", MARTIAN),
    ("highest unicast, NAT64", "223.255.255.255", "64:ff9b::c000:201", PASS),
]


@pytest.mark.vm
@pytest.mark.parametrize(
    ("source4", "source6", "expected"), [pytest.param(*row[1:], id=row[0]) for row in SOURCES]
)
def test_sources(program: Harness, fib: RouteFib, source4: str, source6: str, expected: Verdict) -> None:
    assert _decide(program, fib, PROGRAM, frame(ETH_P_IP, ipv4(source4, VIP4))) is expected
    assert _decide(program, fib, PROGRAM, frame(ETH_P_IPV6, ipv6(source6, VIP6))) is expected


PATHS = [
    # what, network, IPv4 source, IPv6 source, to the VIP, to anything else
    ("by the VLAN device", NETWORK, "172.16.0.1", "2001:db8:16::1", PASS, PASS),
    ("by the other device", NETWORK, "192.0.2.1", "2001:db8:1::1", PASS, Verdict.RPF_STRICT),
    ("no route", NETWORK, "100.64.0.1", "2001:db8:99::1", PASS, Verdict.RPF_STRICT),
    ("the node's own address", NETWORK, "10.0.1.1", "fd01:0:1::1", PASS, Verdict.RPF_STRICT),
    ("first of the feasible", NARROW, "192.0.2.0", "2001:db8:1::", PASS, Verdict.RPF_STRICT),
    ("last of the feasible", NARROW, "192.0.2.127", "2001:db8:1:0:7fff::", PASS, Verdict.RPF_STRICT),
    ("first not feasible", NARROW, "192.0.2.128", "2001:db8:1:0:8000::", UNREACHABLE, Verdict.RPF_STRICT),
    ("strict, by the VLAN", STRICT_VIPS, "172.16.0.1", "2001:db8:16::1", PASS, PASS),
    ("strict, elsewhere", STRICT_VIPS, "192.0.2.1", "2001:db8:1::1", Verdict.VIP_STRICT, Verdict.RPF_STRICT),
    ("loose, elsewhere", LOOSE, "192.0.2.1", "2001:db8:1::1", PASS, PASS),
    ("loose, no route", LOOSE, "100.64.0.1", "2001:db8:99::1", PASS, Verdict.RPF_LOOSE),
    ("all off", ALL_OFF, "127.0.0.1", "::1", PASS, PASS),
]


@pytest.mark.vm
@pytest.mark.parametrize(
    ("network", "sources", "verdicts"),
    [pytest.param(row[1], row[2:4], row[4:6], id=row[0]) for row in PATHS],
)
def test_reverse_paths(
    program: Harness,
    fib: RouteFib,
    network: IngressNetwork,
    sources: tuple[str, str],
    verdicts: tuple[Verdict, Verdict],
) -> None:
    networks = IngressProgram(MASK, (network,), common_sources=COMMON)
    for destinations, expected in zip(((VIP4, VIP6), (ELSEWHERE4, ELSEWHERE6)), verdicts, strict=True):
        assert _decide(program, fib, networks, frame(ETH_P_IP, ipv4(sources[0], destinations[0]))) is expected
        assert (
            _decide(program, fib, networks, frame(ETH_P_IPV6, ipv6(sources[1], destinations[1]))) is expected
        )


def _icmp6(kind: int) -> bytes:
    return bytes([kind, 0, 0, 0]) + bytes(20)


LINK = [
    ("ARP", frame(ETH_P_ARP, bytes(28)), PASS),
    (
        "DAD",
        frame(ETH_P_IPV6, ipv6("::", "ff02::1:ff00:1", _icmp6(135), next_header=58, hop_limit=255)),
        PASS,
    ),
    (
        "solicitation from a VIP",
        frame(ETH_P_IPV6, ipv6(VIP6, VIP6, _icmp6(135), next_header=58, hop_limit=255)),
        PASS,
    ),
    (
        "the same, forwarded",
        frame(ETH_P_IPV6, ipv6("::1", VIP6, _icmp6(135), next_header=58, hop_limit=254)),
        MARTIAN,
    ),
    (
        "router advertisement",
        frame(ETH_P_IPV6, ipv6("fe80::1", "ff02::1", _icmp6(134), next_header=58)),
        PASS,
    ),
    (
        "MLD of a new host",
        frame(ETH_P_IPV6, ipv6("::", "ff02::16", _icmp6(143), next_header=58, hop_limit=1)),
        PASS,
    ),
    (
        "the same behind router alert",
        frame(
            ETH_P_IPV6,
            ipv6(
                "::",
                "ff02::16",
                _icmp6(143),
                next_header=0,
                extensions=bytes([58, 0, 5, 2, 0, 0, 1, 0]),
                hop_limit=1,
            ),
        ),
        PASS,
    ),
    (
        "echo from nowhere",
        frame(ETH_P_IPV6, ipv6("::", VIP6, _icmp6(128), next_header=58, hop_limit=255)),
        MARTIAN,
    ),
    (
        "discovery in a fragment",
        frame(
            ETH_P_IPV6,
            ipv6(
                "::",
                "ff02::1",
                _icmp6(135),
                next_header=44,
                extensions=bytes([58, 0, 0, 1]) + bytes(4),
                hop_limit=255,
            ),
        ),
        MARTIAN,
    ),
    ("DHCP discover", frame(ETH_P_IP, ipv4(UNSPECIFIED4, "255.255.255.255", udp(sport=68, dport=67))), PASS),
    ("DHCP to a VIP", frame(ETH_P_IP, ipv4(UNSPECIFIED4, VIP4, udp(sport=68, dport=67))), MARTIAN),
    (
        "DHCP offer, no route back",
        frame(ETH_P_IP, ipv4("100.64.0.1", "10.0.1.9", udp(sport=67, dport=68))),
        PASS,
    ),
    (
        "DHCP ports in the padding only",
        frame(ETH_P_IP, ipv4("100.64.0.1", "10.0.1.9", b"") + udp(sport=67, dport=68)),
        Verdict.RPF_STRICT,
    ),
    (
        "DHCP from another port",
        frame(ETH_P_IP, ipv4(UNSPECIFIED4, "255.255.255.255", udp(sport=69, dport=67))),
        MARTIAN,
    ),
    (
        "DHCP offer of a pod",
        frame(ETH_P_IP, ipv4("10.112.0.9", "10.0.1.9", udp(sport=67, dport=68))),
        SPOOFED,
    ),
    ("DHCPv6 answer", frame(ETH_P_IPV6, ipv6("2001:db8:99::1", "fe80::9", udp(sport=547, dport=546))), PASS),
    ("IGMP of a new host", frame(ETH_P_IP, ipv4(UNSPECIFIED4, "224.0.0.22", bytes(8), protocol=2)), PASS),
    ("VRRP", frame(ETH_P_IP, ipv4("100.64.0.1", "224.0.0.18", bytes(8), protocol=112)), PASS),
    (
        "VRRP over IPv6",
        frame(ETH_P_IPV6, ipv6("2001:db8:99::1", "ff02::12", bytes(8), next_header=112)),
        PASS,
    ),
    ("wider multicast", frame(ETH_P_IP, ipv4("100.64.0.1", "239.0.0.1")), Verdict.RPF_STRICT),
    ("wider multicast, IPv6", frame(ETH_P_IPV6, ipv6("2001:db8:99::1", "ff05::1")), Verdict.RPF_STRICT),
]


@pytest.mark.parametrize(("data", "expected"), [pytest.param(*row[1:], id=row[0]) for row in LINK])
def test_traffic_of_the_link(program: Harness, fib: RouteFib, data: bytes, expected: Verdict) -> None:
    assert _decide(program, fib, PROGRAM, data) is expected


GOOD4, GOOD6 = "192.0.2.1", "2001:db8:1::1"
HEADERS = [
    ("IPv4 options", ETH_P_IP, ipv4(GOOD4, VIP4, options=b"\x01" * 40), PASS),
    ("IPv4 later fragment", ETH_P_IP, ipv4(GOOD4, VIP4, fragment=0x00B9), PASS),
    ("spoofed later fragment", ETH_P_IP, ipv4("10.112.0.9", VIP4, fragment=0x00B9), SPOOFED),
    ("IPv4 cut in its header", ETH_P_IP, ipv4(GOOD4, VIP4)[:19], MALFORMED),
    ("IPv4 cut in its options", ETH_P_IP, ipv4(GOOD4, VIP4, options=b"\x01" * 40)[:59], MALFORMED),
    ("IPv4 cut in its payload", ETH_P_IP, ipv4(GOOD4, VIP4)[:-1], MALFORMED),
    ("IPv4 with padding", ETH_P_IP, ipv4(GOOD4, VIP4) + bytes(18), PASS),
    ("IPv4 without transport header", ETH_P_IP, ipv4(GOOD4, VIP4, b""), PASS),
    ("IPv4 header of 16 bytes", ETH_P_IP, ipv4(GOOD4, VIP4, header_words=4), MALFORMED),
    ("IPv4 length below its header", ETH_P_IP, ipv4(GOOD4, VIP4, total_length=19), MALFORMED),
    ("IPv4 says version 6", ETH_P_IP, ipv4(GOOD4, VIP4, version=6), MALFORMED),
    ("IPv6 cut in its header", ETH_P_IPV6, ipv6(GOOD6, VIP6)[:39], MALFORMED),
    ("IPv6 cut in its payload", ETH_P_IPV6, ipv6(GOOD6, VIP6)[:-1], MALFORMED),
    ("IPv6 says version 4", ETH_P_IPV6, ipv6(GOOD6, VIP6, version=4), MALFORMED),
    (
        "IPv6 eight extension headers",
        ETH_P_IPV6,
        ipv6(
            GOOD6,
            VIP6,
            next_header=60,
            extensions=(bytes([60, 0]) + bytes(6)) * 7 + bytes([17, 0]) + bytes(6),
        ),
        PASS,
    ),
    (
        "IPv6 nine extension headers",
        ETH_P_IPV6,
        ipv6(
            GOOD6,
            VIP6,
            next_header=60,
            extensions=(bytes([60, 0]) + bytes(6)) * 8 + bytes([17, 0]) + bytes(6),
        ),
        MALFORMED,
    ),
    (
        "IPv6 extension longer than the packet",
        ETH_P_IPV6,
        ipv6(GOOD6, VIP6, next_header=43, extensions=bytes([17, 255]) + bytes(6)),
        MALFORMED,
    ),
    (
        "IPv6 authentication header, then TCP",
        ETH_P_IPV6,
        ipv6(GOOD6, VIP6, next_header=51, extensions=bytes([6, 4]) + bytes(22)),
        PASS,
    ),
    (
        "spoofed behind a fragment header",
        ETH_P_IPV6,
        ipv6("fd00:10:112::9", VIP6, next_header=44, extensions=struct.pack("!BBHI", 17, 0, 8, 1)),
        SPOOFED,
    ),
]


@pytest.mark.parametrize(
    ("ethertype", "payload", "expected"), [pytest.param(*row[1:], id=row[0]) for row in HEADERS]
)
def test_headers(program: Harness, fib: RouteFib, ethertype: int, payload: bytes, expected: Verdict) -> None:
    assert _decide(program, fib, PROGRAM, frame(ethertype, payload)) is expected


def test_unchecked_network_drops_nothing_even_malformed(program: Harness, fib: RouteFib) -> None:
    networks = IngressProgram(MASK, (ALL_OFF,), common_sources=COMMON)
    assert _decide(program, fib, networks, frame(ETH_P_IP, ipv4(GOOD4, VIP4)[:19])) is PASS
    hidden = frame(ETH_P_IP, ipv4(GOOD4, VIP4), ((ETH_P_8021Q, 0),) * 9 + ((ETH_P_8021Q, 100),))
    assert _decide(program, fib, networks, hidden) is PASS


def test_tag_behind_too_many_priority_tags_does_not_slip_past_a_check(
    program: Harness, fib: RouteFib
) -> None:
    for count, expected in ((8, PASS), (9, MALFORMED)):
        data = frame(ETH_P_IP, ipv4(GOOD4, VIP4), ((ETH_P_8021Q, 0),) * count + ((ETH_P_8021Q, 100),))
        assert _decide(program, fib, PROGRAM, data) is expected
