# SPDX-License-Identifier: Apache-2.0
"""A node with so many devices that filters serve them at first: two with clients, the others beside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from datapath.kernel import tc
from datapath.kernel.bpf import tcx
from datapath.plan.tc import MANY_DEVICES, Direction
from tests.service.daemon import Node
from tools.lab.lab import Lab
from tools.lab.netns import Namespace


@dataclass(frozen=True, slots=True)
class Ways:
    """How devices are served at this moment, by name.

    Attributes:
        filters: those with a filter of ours.
        programs: those with a tcx program.
        clsact: those with a clsact qdisc.
    """

    filters: frozenset[str]
    programs: frozenset[str]
    clsact: frozenset[str]


def ways(namespace: Namespace) -> Ways:
    """As the kernel says; a device that moves between two questions is in both sets, never in none."""

    def read() -> Ways:
        by_index = {index: name for name, index in tc.ifindexes().items()}
        state = tc.observe_our_place(Direction.INGRESS)
        return Ways(
            frozenset(by_index[found.ifindex] for found in state.filters if found.is_ours),
            frozenset(name for index, name in by_index.items() if tcx.programs(index, Direction.INGRESS)),
            frozenset(by_index[index] for index in state.clsact),
        )

    return namespace.call(read)


def add_devices(namespace: Namespace, names: list[str]) -> None:
    """Devices that nothing is connected to: cheap to make, and removed with the namespace."""
    namespace.ip(["link add crowd type veth peer name crowdfar", "link set crowd up", "link set crowdfar up"])
    namespace.ip([f"link add link crowd name {name} type macvlan mode private" for name in names])
    namespace.ip([f"link set {name} up" for name in names])


def networks(names: list[str]) -> str:
    """Of a policy, one on each of these devices."""
    return "".join(
        f"  - {{name: {name}, interface: {name}, vips: [198.18.{number}.0/24], gateway: 198.18.{number}.1}}\n"
        for number, name in enumerate(names)
    )


class Crowd(Node):
    """The node of a lab, with devices before and behind those that clients are served by."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        self.folder = folder
        self.policy = folder / "policy.yaml"
        self.state = folder / "state"
        self.ns = lab.node
        own = [network.device for network in lab.networks]
        beside = [f"a{number}" for number in range(20)] + [f"z{number}" for number in range(MANY_DEVICES)]
        add_devices(self.ns, beside)
        self.devices = frozenset((*own, *beside))
        self.text = lab.policy() + networks(beside)

    def record(self) -> frozenset[str]:
        """Devices whose clsact qdisc the state says is ours."""
        document = json.loads((self.state / "state.json").read_text())
        return frozenset(_found(document, "clsact"))

    def ways(self) -> Ways:
        return ways(self.ns)


def _found(document: object, key: str) -> list[str]:
    if isinstance(document, dict):
        if key in document:
            return list(document[key])
        for value in document.values():
            if found := _found(value, key):
                return found
    return []
