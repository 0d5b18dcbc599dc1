# SPDX-License-Identifier: Apache-2.0
"""Every kind of device that a network may lie on, between the lab's node and namespaces of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.vm.paths import Path, both
from tools.lab import Lab
from tools.lab.netns import Namespace, remove

#: name -> (number, the policy's line, device on the node, device at the far end)
_PATHS = {
    "bond": (1, "vlan: {parent: bond0, id: 300}", "bond0.300", "bond0.300"),
    "given": (2, "interface: trunk1.400", "trunk1.400", "trunk1.400"),
    "bridge": (3, "interface: br0", "br0", "port0"),
    "bridge-vlan": (4, "vlan: {parent: br1, id: 500}", "br1.500", "port1.500"),
    "macvlan": (5, "interface: mac0", "mac0", "lower0"),
    "qinq": (6, "vlan: {parent: prov0.600, id: 200, name: inner}", "inner", "inner"),
}

_BOND = "link add bond0 type bond mode active-backup miimon 50"


def _bond(node: Namespace, far: Namespace) -> None:
    for end in (node, far):
        end.ip([_BOND])
    for slave in ("slave0", "slave1"):
        node.ip([f"link add {slave} type veth peer name {slave} netns {far.name}"])
        for end in (node, far):
            end.ip([f"link set {slave} master bond0", f"link set {slave} up"])
    # Both ends must agree on the active one.
    for end in (node, far):
        end.ip(["link set bond0 type bond primary slave0", "link set bond0 up"])
    far.ip(["link add link bond0 name bond0.300 type vlan id 300", "link set bond0.300 up"])


def _given(node: Namespace, far: Namespace) -> None:
    _pair(node, far, "trunk1")
    for end in (node, far):
        end.ip(["link add link trunk1 name trunk1.400 type vlan id 400", "link set trunk1.400 up"])


def _bridge(node: Namespace, far: Namespace) -> None:
    _pair(node, far, "port0")
    node.ip(["link add br0 type bridge forward_delay 0", "link set port0 master br0", "link set br0 up"])


def _bridge_vlan(node: Namespace, far: Namespace) -> None:
    _pair(node, far, "port1")
    node.ip(["link add br1 type bridge forward_delay 0", "link set port1 master br1", "link set br1 up"])
    far.ip(["link add link port1 name port1.500 type vlan id 500", "link set port1.500 up"])


def _macvlan(node: Namespace, far: Namespace) -> None:
    _pair(node, far, "lower0")
    node.ip(["link add link lower0 name mac0 type macvlan mode bridge", "link set mac0 up"])


def _qinq(node: Namespace, far: Namespace) -> None:
    _pair(node, far, "prov0")
    for end in (node, far):
        end.ip(["link add link prov0 name prov0.600 type vlan proto 802.1ad id 600", "link set prov0.600 up"])
    far.ip(["link add link prov0.600 name inner type vlan id 200", "link set inner up"])


def _pair(node: Namespace, far: Namespace, device: str) -> None:
    node.ip([f"link add {device} type veth peer name {device} netns {far.name}", f"link set {device} up"])
    far.ip([f"link set {device} up"])


_BUILDERS = {
    "bond": _bond,
    "given": _given,
    "bridge": _bridge,
    "bridge-vlan": _bridge_vlan,
    "macvlan": _macvlan,
    "qinq": _qinq,
}


@contextlib.contextmanager
def build_paths(lab: Lab) -> Iterator[dict[str, Path]]:
    """All kinds at once, by name; devices that the policy makes are missing still."""
    with contextlib.ExitStack() as stack:
        paths = {}
        for name, (number, place, device, far_device) in _PATHS.items():
            far = Namespace(f"{lab.prefix}{name}")
            stack.callback(remove, far.name)
            far.create()
            both(far)
            _BUILDERS[name](lab.node, far)
            paths[name] = Path(name, number, place, device, far_device, lab.node, far)
            paths[name].address()
        yield paths
