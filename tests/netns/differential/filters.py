# SPDX-License-Identifier: Apache-2.0
"""The same packets through filters of different makers; each on ground of its own, where nobody else filters.

What counts is whether a packet is routed: it is looked for behind the kernel's routing decision, which may
drop it, too, with each of the filters alike.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from datapath.controller import Controller
from datapath.observe.packet import IpAddress
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.bpf import packets
from tests.bpf.generator import ADDRESSES, borders
from tests.netns.differential.ground import ROUTED, Ground, Nft, Number, ground, rp_filter, until
from tests.netns.differential.policies import DEVICES
from tests.netns.differential.traffic import arrives, numbered4, numbered6
from tools.lab import classic
from tools.lab.topology import Network

#: The device with the filter.
FILTERED: Final = "net0"
#: Of all devices; net2 has no filter and tells when all earlier packets are through.
LINES: Final = (
    "addr add 172.31.0.1/24 dev net0",
    "addr add 2001:db8:ff:0::1/64 dev net0",
    "addr add 172.31.1.1/24 dev net1",
    "addr add 2001:db8:ff:1::1/64 dev net1",
    "addr add 172.31.2.1/24 dev net2",
    "addr add 198.51.100.10/32 dev lo",
    "addr add 2001:db8:2::10/128 dev lo",
    "route add 192.0.2.0/24 via 172.31.0.254",
    "route add 192.0.2.0/25 via 172.31.1.254",
    "route add 203.0.113.0/24 dev net1",
    "route add 203.0.113.255/32 dev net0",
    "route add 198.51.100.77/32 via 172.31.1.254",
    "route add blackhole 100.64.0.0/10",
    "route add unreachable 10.96.0.0/12",
    "-6 route add 2001:db8:1::/48 via 2001:db8:ff:0::fe",
    "-6 route add 2001:db8:1:1::/64 via 2001:db8:ff:1::fe",
    "-6 route add fd00:10:112:3::/64 dev net0",
    "-6 route add 2001:db8:2::77/128 via 2001:db8:ff:1::fe",
    "-6 route add blackhole 64:ff9b::/96",
)
#: Where everything else would be routed to.
DEFAULTS: Final = {
    "default-by-it": ("route add default via 172.31.0.254", "-6 route add default via 2001:db8:ff:0::fe"),
    "default-by-another": ("route add default via 172.31.1.254", "-6 route add default dev net1"),
    "no-default": (),
}
_MORE: Final = ("172.31.0.0/24", "172.31.1.1/32", "172.31.0.1/32", "198.51.100.10/32", "198.51.100.0/24")
_MORE6: Final = ("2001:db8:ff::/64", "2001:db8:ff:1::1/128", "2001:db8:2::10/128", "2001:db8:2::/64")
#: The node itself, and hosts behind each device.
_DESTINATIONS: Final = {
    4: ("172.31.0.1", "172.31.1.1", "192.0.2.200", "192.0.2.20", "203.0.113.9"),
    6: ("2001:db8:ff:0::1", "2001:db8:ff:1::1", "2001:db8:1:2::9", "2001:db8:1:1::9"),
}
#: What the network serves: on the node, and behind another device.
VIPS: Final = {4: ("198.51.100.10", "198.51.100.77"), 6: ("2001:db8:2::10", "2001:db8:2::77")}

_CHUNK: Final = 200
_LAST: Final = Number(4, 0xFFFF)
_PORT: Final = 40000

Install = Callable[[Ground], None]


@dataclass(frozen=True, slots=True)
class Probe:
    """A plain UDP packet into the filtered device; what has rules of its own (DHCP, discovery) is none."""

    number: Number
    source: IpAddress
    destination: IpAddress

    @property
    def frame(self) -> bytes:
        body = packets.udp(sport=_PORT, dport=_PORT)
        if self.number.version == 4:
            packet = numbered4(packets.ipv4(str(self.source), str(self.destination), body), self.number.value)
            return packets.frame(packets.ETH_P_IP, packet)
        packet = numbered6(packets.ipv6(str(self.source), str(self.destination), body), self.number.value)
        return packets.frame(packets.ETH_P_IPV6, packet)


def probes(rng: random.Random, count: int, *, to_vips: float) -> list[Probe]:
    """Probes from addresses near the borders of all prefixes; this share of them goes to VIPs."""
    sources = {
        version: [
            *ADDRESSES[version],
            *(address for text in more for address in borders(ip_network(text)) for _ in range(3)),
        ]
        for version, more in ((4, _MORE), (6, _MORE6))
    }
    found: list[Probe] = []
    while len(found) < count:
        version = rng.choice([4, 6])
        pool = VIPS[version] if rng.random() < to_vips else _DESTINATIONS[version]
        source, destination = rng.choice(sources[version]), ip_address(rng.choice(pool))
        if arrives(source, destination):
            found.append(Probe(Number(version, len(found) + 1), source, destination))
    return found


def passed(routes: Sequence[str], install: Install, sent: Sequence[Probe]) -> frozenset[Number]:
    """The probes that are routed with this filter in place."""
    with ground(DEVICES, (*LINES, *routes)) as built, _one_cpu():
        install(built)
        built.observe(ROUTED)
        nft, seen = Nft(), set[Number]()
        last = packets.frame(
            packets.ETH_P_IP,
            numbered4(packets.ipv4("172.31.2.2", "172.31.2.1", packets.udp()), _LAST.value),
        )

        def look() -> bool:
            seen.update(nft.seen())
            return _LAST in seen

        for start in range(0, len(sent), _CHUNK):
            seen.discard(_LAST)
            for probe in sent[start : start + _CHUNK]:
                built.send(FILTERED, probe.frame)
            built.send("net2", last)
            assert until(look), "the last packet never arrived"
        return frozenset(seen - {_LAST})


@contextlib.contextmanager
def _one_cpu() -> Iterator[None]:
    """Packets of one CPU are worked on in the order in which they were sent."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def nothing() -> Install:
    """No filter at all."""
    return lambda _: None


def kernel(value: int) -> Install:
    """The kernel's own `rp_filter`: 1 strict, 2 loose; IPv4 only."""
    return lambda _: rp_filter({FILTERED: value})


def iptables(tool: str, *options: str) -> Install:
    """The `rpfilter` match of iptables, both families."""

    def install(built: Ground) -> None:
        for program in (tool, tool.replace("iptables", "ip6tables")):
            rule = ("-A", "PREROUTING", "-i", FILTERED, "-m", "rpfilter", *options, "--invert", "-j", "DROP")
            built.node.run(program, "-t", "raw", *rule)

    return install


def recipe(tool: classic.Tool, network: Network) -> Install:
    """The whole classic recipe."""
    return lambda built: classic.apply_to(built.node, [network], tool)


def policy(text: str, backend: str, state: Path) -> Install:
    """Ours."""

    def install(_: Ground) -> None:
        plan = Controller(StateDirectory(state)).apply(parse_policy(text.encode(), "policy.yaml")).plan
        assert str(plan.backend) == backend

    return install


def differences(sent: Iterable[Probe], one: frozenset[Number], two: frozenset[Number]) -> list[Probe]:
    """Probes that only one of the two let through."""
    return [probe for probe in sent if (probe.number in one) != (probe.number in two)]
