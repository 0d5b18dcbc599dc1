# SPDX-License-Identifier: Apache-2.0
"""Seeded policies whose prefixes are those that the generated packets lie next to."""

from __future__ import annotations

import random
from typing import Any, Final

import yaml

from datapath.policy import LoadedPolicy, parse_policy
from tests.bpf.generator import PREFIXES

DEVICES: Final = ("net0", "net1", "net2")

#: What the devices have, whatever the policy. The metrics differ from those of routes that policies make.
LINES: Final = (
    "addr add 172.31.0.1/24 dev net0",
    "addr add 2001:db8:ff:0::1/64 dev net0",
    "addr add 172.31.1.1/24 dev net1",
    "addr add 2001:db8:ff:1::1/64 dev net1",
    "route add 192.0.2.0/24 dev net0 metric 50",
    "route add 198.51.100.0/24 via 172.31.0.254 dev net0 metric 50",
    "route add 198.51.100.128/25 via 172.31.1.254 dev net1 metric 50",
    "route add 203.0.113.0/24 dev net2 metric 50",
    "route add blackhole 100.64.0.0/10",
    "route add unreachable 10.96.0.0/12",
    "route add 10.112.3.0/24 dev net1",
    "-6 route add 2001:db8:1:1::/64 dev net0 metric 50",
    "-6 route add 2001:db8:2::/48 via 2001:db8:ff:0::fe dev net0 metric 50",
    "-6 route add 2001:db8:2:8000::/49 via 2001:db8:ff:1::fe dev net1 metric 50",
    "-6 route add fd00:10:96::/112 dev net2",
    "-6 route add fd00:10:112:3::/64 dev net1",
    "-6 route add blackhole 64:ff9b::/96",
)
#: Default routes, by turns.
VARIANTS: Final = (
    ("-4 route {} default via 172.31.0.254", "-6 route {} default via 2001:db8:ff:0::fe"),
    ("-4 route {} default dev net1", "-6 route {} default dev net1"),
    ("-4 route {} default dev net2 metric 77", "-6 route {} default via 2001:db8:ff:1::fe"),
    (),
)

_VIPS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "net0": (
        ("192.0.2.0/24", "192.0.2.0/25", "192.0.2.77", "192.0.2.65-192.0.2.90"),
        ("2001:db8:1:1::/64", "2001:db8:1:1::80/121", "2001:db8:1:1::77"),
    ),
    "net1": (
        ("198.51.100.0/24", "198.51.100.128/25", "198.51.100.255"),
        ("2001:db8:2::/48", "2001:db8:2:8000::/49"),
    ),
    "net2": (
        ("203.0.113.0/24", "203.0.113.255", "203.0.113.0-203.0.113.3"),
        ("2001:db8:1:0::/64", "2001:db8:1:0::1-2001:db8:1:0::9"),
    ),
}
_GATEWAYS: Final = {
    "net0": ("192.0.2.254", "2001:db8:1:1::fe"),
    "net1": ("198.51.100.254", "fe80::1"),
    "net2": ("203.0.113.254", "fe80::2"),
}
_ON_LINK: Final = {
    "net0": ["192.0.2.0/24", "2001:db8:1:1::/64"],
    "net1": ["198.51.100.0/24", "2001:db8:2::/48"],
    "net2": ["203.0.113.0/24", "2001:db8:1::/64"],
}
_INTERNAL: Final = ("10.96.0.0/12", "10.112.0.0/12", "fd00:10:96::/112", "fd00:10:112::/48")


def random_policy(rng: random.Random, backend: str) -> LoadedPolicy:
    """One network to three; nothing that the node would refuse."""
    body: dict[str, Any] = {"version": 1, "backend": backend}
    if rng.random() < 0.7:
        body["node"] = {"internal": sorted(rng.sample(_INTERNAL, rng.randint(1, 4)))}
    devices = rng.sample(DEVICES, rng.choice([1, 2, 3, 3]))
    body["networks"] = [_network(rng, device) for device in devices]
    return parse_policy(yaml.safe_dump(body, sort_keys=False).encode(), "generated.yaml")


def _network(rng: random.Random, device: str) -> dict[str, Any]:
    families = rng.choice([(4,), (6,), (4, 6), (4, 6), (4, 6)])
    index = {4: 0, 6: 1}
    network: dict[str, Any] = {
        "name": f"on-{device}",
        "interface": device,
        "vips": [rng.choice(_VIPS[device][index[family]]) for family in families],
    }
    gateways = [
        gateway
        for family in families
        if rng.random() < 0.6 and (gateway := _GATEWAYS[device][index[family]]) not in network["vips"]
    ]
    if gateways:
        network["gateway"] = gateways
        network["on_link"] = _ON_LINK[device]
    network["return_path"] = rng.choice(["conntrack", "conntrack", "source", "none"])
    if rng.random() < 0.9:
        chosen = [str(prefix) for prefix in rng.sample(PREFIXES, rng.randint(0, 6)) if prefix.prefixlen]
        middle = rng.randint(0, len(chosen))
        network["reverse_path"] = {
            "vips": rng.choice(["feasible", "strict", "strict", "off"]),
            "other": rng.choice(["strict", "loose", "loose", "off"]),
            "allow": chosen[:middle],
            "deny": chosen[middle:],
        }
    return network
