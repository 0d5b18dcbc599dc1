# SPDX-License-Identifier: Apache-2.0
"""Policies that differ in one thing each: every kind of change is a pair of them."""

from __future__ import annotations

import functools

from datapath.policy import LoadedPolicy, parse_policy

_A = '- {name: a, interface: eth1, vips: [10.1.0.0/24, "2001:db8:1::/64"], gateway: [10.1.0.1, "2001:db8:1::1"]}'
_B = "- {name: b, interface: eth2, vips: [10.2.0.0/24], gateway: 10.2.0.1, strict_arp: true}"
_VLAN = "- {name: v, vlan: {parent: eth3, id: 5}, vips: [10.3.0.0/24], gateway: 10.3.0.1}"

#: Networks and settings by name. `two` is what the others are compared with.
POLICIES: dict[str, tuple[str, ...]] = {
    "none": ("networks: []",),
    "one": ("networks:", _A),
    "two": ("networks:", _A, _B),
    "vlan": ("networks:", _A, _B, _VLAN),
    "other vlan": ("networks:", _A, _B, _VLAN.replace("id: 5", "id: 6")),
    "gateway": ("networks:", _A.replace("10.1.0.1", "10.1.0.9"), _B),
    "gateways": ("networks:", _A.replace("gateway: [10.1.0.1", "gateways: [10.1.0.1, 10.1.0.3"), _B),
    "more gateways": (
        "networks:",
        _A.replace('gateway: [10.1.0.1, "2', 'gateways: [10.1.0.1, 10.1.0.4, "2001:db8:1::4", "2'),
        _B,
    ),
    "vips": ("networks:", _A.replace("10.1.0.0/24", "10.1.0.0/24, 192.0.2.0/28"), _B),
    "one family": ("networks:", _A.replace(', "2001:db8:1::/64"', "").replace(', "2001:db8:1::1"', ""), _B),
    "no gateway": ("networks:", _A, _B.replace(" gateway: 10.2.0.1,", "")),
    "mode": ("networks:", _A.replace("{name", "{return_path: source, name"), _B),
    "track": ("networks:", _A, _B.replace("{name", "{track: last, name")),
    "mark": ("networks:", _A, _B.replace("{name", "{mark: 0x00070000, name")),
    "isolated": ("networks:", _A.replace("{name", "{isolate_clients: true, name"), _B),
    "zone": ("networks:", _A.replace("{name", "{isolate_clients: true, zone: 7, name"), _B),
    "table": ("networks:", _A, _B.replace("{name", "{table: 4242, name")),
    "arp": ("networks:", _A, _B.replace(", strict_arp: true", "")),
    "mask": ("marks: {mask: 0x00000f00}", "networks:", _A, _B),
    "egress": (
        "networks:",
        _A,
        _B,
        "egress:",
        "- {name: web, network: a, sources: [172.16.1.0/24], source_ip: 10.1.0.20}",
        "- {name: jobs, network: b, set: true, source_ip: [10.2.0.20-10.2.0.22]}",
    ),
    "accelerate": ("accelerate: true", "networks:", _A, _B),
    "accelerate vlan": ("accelerate: true", "networks:", _A, _VLAN),
    "priority": ("rules: {priority: 20000}", "networks:", _A, _B),
    "vrf": ("networks:", _A, _B.replace("{name", "{vrf: {name: red, table: 2, create: true}, name")),
    "other vrf": ("networks:", _A, _B.replace("{name", "{vrf: {name: blue, table: 3, create: true}, name")),
}


def text_of(name: str, backend: str) -> str:
    """The file."""
    return (
        "\n".join(("version: 1", f"backend: {backend}", "node: {internal: [172.16.0.0/12]}", *POLICIES[name]))
        + "\n"
    )


@functools.cache
def policy(name: str, backend: str) -> LoadedPolicy:
    """The file, read."""
    return parse_policy(text_of(name, backend).encode(), f"{name}.yaml")
