# SPDX-License-Identifier: Apache-2.0
"""The policy and the routes that every fuzzed packet meets, for both sides: as C tables and as a reference `Fib`.

An input is seven bytes of circumstances (flags with the device, TCI of the metadata tag, mark) and a frame; `run.h`
reads the same.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from datapath.kernel.bpf import resolve
from datapath.kernel.bpf.encoding import encode_networks, encode_prefixes
from datapath.observe.packet import IpAddress
from datapath.observe.reference import Arrival, ReversePath
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

CONTROL_BYTES: Final = 7
_FLAG_TAG, _FLAG_DOT1AD, _FLAG_MERGED = 1, 2, 4
#: Packets come in on one of the first four; the last of them carries no network.
_ARRIVALS: Final = ("trunk", "flat", "open", "foreign")
_FIRST_IFINDEX: Final = 2
IFINDEXES: Final = {name: _FIRST_IFINDEX + number for number, name in enumerate((*_ARRIVALS, "net0", "net1"))}

#: With a gap: a mask that is one run of bits would hide mistakes.
MASK: Final = 0x0A5F0000


def _prefixes(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(text) for text in texts)


def _rules(action: SourceAction, *texts: str) -> tuple[SourceRule, ...]:
    return tuple(SourceRule(prefix, action) for prefix in _prefixes(*texts))


_VIPS: Final = _prefixes(
    "192.0.2.0/25", "192.0.2.200/32", "2001:db8:1::/64", "2001:db8:1:1::80/121", "fe80::/64"
)
_FEASIBLE: Final = _prefixes("198.51.100.0/25", "2001:db8:2::/48", "10.96.1.0/24")
_COMMON: Final = (
    *_rules(SourceAction.DENY, "10.96.0.0/12", "192.0.2.0/24", "2001:db8:1::/48", "fd00:10:96::/112"),
    *_rules(SourceAction.ALLOW, "10.96.2.0/24", "2001:db8:1:8000::/49"),
)
_OWN: Final = (
    *_rules(SourceAction.ALLOW, "192.0.2.0/24", "2001:db8:1:1::/64", "10.96.0.0/11"),
    *_rules(SourceAction.DENY, "10.96.2.0/25", "2001:db8:1:8000::/49", "198.51.100.77/32"),
)
_EVERYTHING: Final = _rules(SourceAction.DENY, "0.0.0.0/0", "::/0")


def _vlan(vlan_id: int, protocol: VlanProtocol = VlanProtocol.DOT1Q) -> IngressPoint:
    return IngressPoint("trunk", protocol, vlan_id)


def _network(slot: int, point: IngressPoint, device: str, **knobs: Any) -> IngressNetwork:
    """Everything is checked but what `knobs` say."""
    everything = IngressNetwork(
        name=f"net{slot}",
        slot=slot,
        fwmark=[0x00010000, 0x0A5F0000, 0x02000000][slot % 3],
        point=point,
        device=device,
        vips=_VIPS,
        feasible=_FEASIBLE,
        vip_check=VipCheck.FEASIBLE,
        other_check=OtherCheck.STRICT,
        check_martians=True,
        check_sources=True,
    )
    return dataclasses.replace(everything, **knobs)


_UNCHECKED: Final[dict[str, Any]] = {
    "vip_check": VipCheck.OFF,
    "other_check": OtherCheck.OFF,
    "check_martians": False,
    "check_sources": False,
}
#: Each combination of knobs that takes another way through the program, and no two networks alike.
PROGRAM: Final = IngressProgram(
    MASK,
    (
        _network(1, IngressPoint("trunk"), "trunk"),
        _network(2, _vlan(1), "net0", sources=_OWN),
        _network(3, _vlan(2), "net0", vip_check=VipCheck.STRICT, other_check=OtherCheck.LOOSE),
        _network(4, _vlan(1, VlanProtocol.DOT1AD), "net1", vip_check=VipCheck.OFF, fwmark=0),
        _network(5, _vlan(3), "net0", **_UNCHECKED),
        _network(6, _vlan(4), "net1", sources=_EVERYTHING, check_martians=False),
        _network(7, _vlan(5), "net1", **_UNCHECKED | {"other_check": OtherCheck.LOOSE}),
        _network(8, _vlan(6), "net0", **_UNCHECKED | {"vip_check": VipCheck.FEASIBLE}),
        _network(9, _vlan(7), "net0", **_UNCHECKED | {"check_martians": True}),
        _network(10, _vlan(4094), "net1", **_UNCHECKED | {"check_sources": True}, sources=_OWN),
        _network(11, IngressPoint("flat"), "flat", sources=_EVERYTHING),
        # No checks on the whole device, so no guard either.
        _network(12, IngressPoint("open"), "open", **_UNCHECKED),
    ),
    common_sources=_COMMON,
)


@dataclass(frozen=True, slots=True)
class Route:
    """What bpf_fib_lookup answers for a prefix.

    Attributes:
        result: BPF_FIB_LKUP_RET_* of linux/bpf.h, or a negative errno.
        device: None: it stays the one that was asked for.
    """

    prefix: IPv4Network | IPv6Network
    result: int
    device: str | None = None

    def path(self, asked: str) -> ReversePath:
        """The meaning of the answer to a network on the device `asked`."""
        if self.result in {0, 7, 8}:  # SUCCESS, NO_NEIGH, FRAG_NEEDED
            return ReversePath.DEVICE if self.device in {None, asked} else ReversePath.OTHER
        # UNSUPP_LWT, FWD_DISABLED
        return {6: ReversePath.OTHER, 5: ReversePath.UNKNOWN}.get(self.result, ReversePath.NONE)


def _routes() -> tuple[Route, ...]:
    """Every answer in both families, and one prefix inside another."""
    answers: list[tuple[int, str | None]] = [
        (0, "net0"), (7, "net1"), (8, "net0"), (0, "trunk"), (1, None), (2, None), (3, None), (4, "net0"),
        (5, None), (6, None), (7, None), (-22, None), (9, "net0"),
    ]  # fmt: skip
    routes = [Route(prefix, 7, "net0") for prefix in _prefixes("192.0.2.128/25", "2001:db8:1:1::/64")]
    routes += [Route(prefix, 0, "net1") for prefix in _prefixes("198.51.100.64/26", "2001:db8:2:8000::/49")]
    for number, (result, device) in enumerate(answers):
        routes.append(Route(ip_network(f"203.0.113.{number * 16}/28"), result, device))
        routes.append(Route(ip_network(f"2001:db8:3:{number:x}::/64"), result, device))
    return tuple(routes)


ROUTES: Final = _routes()


class FakeFib:
    """`reference.Fib` over `ROUTES`."""

    def reverse_path(self, device: str, source: IpAddress, destination: IpAddress) -> ReversePath:
        """See `reference.Fib`."""
        del destination
        if source.version == 6 and (source.is_multicast or source.is_link_local or source.is_loopback):
            return ReversePath.NONE
        found = [route for route in ROUTES if source in route.prefix]
        if not found:
            return ReversePath.NONE
        return max(found, key=lambda route: route.prefix.prefixlen).path(device)


def to_arrival(data: bytes) -> Arrival:
    """An input as the reference model takes it."""
    flags, tci, mark = struct.unpack_from("=B2sI", data)
    tpid = VlanProtocol.DOT1AD if flags & _FLAG_DOT1AD else VlanProtocol.DOT1Q
    return Arrival(
        ifname=_ARRIVALS[(flags >> 3) % len(_ARRIVALS)],
        data=data[CONTROL_BYTES:],
        metadata_tag=(int(tpid), int.from_bytes(tci, "big")) if flags & _FLAG_TAG else None,
        mark=mark,
        is_merged=bool(flags & _FLAG_MERGED),
    )


def _c_bytes(data: bytes) -> str:
    return ",".join(map(str, data))


def _c_rows(name: str, rows: list[bytes]) -> str:
    body = _c_bytes(b"".join(rows))
    return f"static const unsigned char _Alignas(8) rows_{name}[] = {{{body}}};\n"


def _c_route(route: Route) -> str:
    address = _c_bytes(route.prefix.network_address.packed)
    family = {4: 2, 6: 10}[route.prefix.version]
    ifindex = IFINDEXES[route.device] if route.device else 0
    return f"\t{{ {family}, {route.prefix.prefixlen}, {ifindex}, {route.result}, {{{address}}} }},\n"


def header() -> str:
    """`world.h`: constants, the rows of every map, and the routes."""
    tables = resolve(PROGRAM, IFINDEXES)
    maps = {"dp_networks": [key + value for key, value in encode_networks(tables.networks).items()]}
    for question, prefixes in tables.prefixes.items():
        for version, elements in encode_prefixes(prefixes).items():
            maps[f"dp_{question.value}{version}"] = [key + value for key, value in elements.items()]
    constants = {
        "FWMARK_MASK": f"{MASK:#010x}u",
        "NETWORKS_CAPACITY": str(tables.need.networks),
        "COUNTERS_CAPACITY": str(tables.need.counters),
        "FIRST_IFINDEX": str(_FIRST_IFINDEX),
        "IFINDEXES": str(len(_ARRIVALS)),
    }
    text = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    text += "struct shim_rows { const char *map; const unsigned char *bytes; unsigned int count; };\n"
    text += "struct shim_route { int family; unsigned int length, ifindex; int result; unsigned char address[16]; };\n"
    text += "".join(_c_rows(name, rows) for name, rows in maps.items())
    text += "static const struct shim_rows shim_all_rows[] = {\n"
    text += "".join(f'\t{{ "{name}", rows_{name}, {len(rows)} }},\n' for name, rows in maps.items())
    text += "};\nstatic const struct shim_route shim_routes[] = {\n"
    return text + "".join(_c_route(route) for route in ROUTES) + "};\n"
