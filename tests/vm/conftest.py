# SPDX-License-Identifier: Apache-2.0
"""One lab for the whole boot, and one eBPF program in it: emulated, each new one costs most of a minute.

The `keeper` network is in every policy, so the program stays and later policies change its maps in place. It has IPv6
VIPs only: nothing of it concerns IPv4, rules, or rp_filter.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path as FilePath

import pytest

from datapath.controller import Applied, Controller, Drift
from datapath.kernel import ingress
from datapath.plan.ingress import Verdict
from datapath.policy import parse_policy
from datapath.service.healer import Healer, Look
from datapath.state import StateDirectory
from tests.bpf.conftest import inside
from tests.netns.nodes import quick_dump
from tests.vm.devices import build_paths
from tests.vm.paths import Path
from tools.lab import Lab
from tools.lab.dump import difference
from tools.lab.topology import POD_CIDRS, SERVICE_CIDRS, IpAddress

KEEPER = """\
  - name: keeper
    interface: keep0
    vips: ["2001:db8:feed::/64"]
    reverse_path: {other: "off"}
"""


@dataclass
class Ground:
    """The node under test.

    Attributes:
        before: its state before the first apply.
        paths: further ways in, by name.
        slots: counter slots of the policy in force, by network.
    """

    lab: Lab
    directory: StateDirectory
    paths: dict[str, Path]
    before: dict[str, str]
    slots: dict[str, int] = field(default_factory=dict)

    @property
    def controller(self) -> Controller:
        return Controller(self.directory)

    def heal(self) -> Look:
        """What the daemon does when it hears of something."""
        healer = Healer(self.directory)
        try:
            with inside(self.lab.node.name):
                return healer.look()
        finally:
            healer.close()

    def policy(self, *elements: str, top: str = "") -> str:
        internal = ", ".join(f'"{c}"' for c in (*POD_CIDRS.values(), *SERVICE_CIDRS.values()))
        return f"version: 1\n{top}node:\n  internal: [{internal}]\nnetworks:\n{KEEPER}{''.join(elements)}"

    def apply(self, *elements: str, top: str = "") -> Applied:
        """Apply the keeper and these networks, and more at the top level."""
        with inside(self.lab.node.name):
            applied = self.controller.apply(parse_policy(self.policy(*elements, top=top).encode(), "vm.yaml"))
        self.slots = {item.name: item.slot for item in applied.plan.ids}
        return applied

    def public(self) -> str:
        """The lab's own network: a VLAN on eth0, made by the policy."""
        (network,) = self.lab.networks
        vips = ", ".join(f'"{p}"' for p in network.prefixes.values())
        return (
            f"  - name: {network.name}\n    vlan: {{parent: eth0, id: {network.vlan_id}}}\n    vips: [{vips}]\n"
            f'    gateway: ["{network.gateway.v4}", "{network.gateway.v6}"]\n'
        )

    def status(self) -> Drift:
        """The policy in force against the kernel."""
        with inside(self.lab.node.name):
            drift = self.controller.status()
        assert drift is not None
        return drift

    def teardown(self) -> None:
        with inside(self.lab.node.name):
            self.controller.teardown()

    def dump(self) -> dict[str, str]:
        with inside(self.lab.node.name):
            return quick_dump([name for _, name in socket.if_nameindex()])

    def changed(self) -> str:
        """What is not as before the first apply."""
        return difference(self.before, self.dump())

    def dropped(self, network: str) -> dict[Verdict, int]:
        """Packets of a network that were dropped so far, by reason."""
        with inside(self.lab.node.name):
            counters = ingress.read_counters().get(self.slots[network], {})
        return {
            verdict: c.packets for verdict, c in counters.items() if verdict is not Verdict.PASS and c.packets
        }


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """The node with all its devices, without a policy."""
    with Lab(vlan="8021q") as lab:
        lab.node.ip(["link add keep0 type dummy", "link set keep0 up"])
        with build_paths(lab) as paths:
            state: FilePath = tmp_path_factory.mktemp("state")
            ground = Ground(lab, StateDirectory(state), paths, {})
            # The kernel's rule for VRFs comes with the first one, and stays.
            lab.node.ip(["link add first type vrf table 9", "link del first"])
            ground.before = ground.dump()
            yield ground


@pytest.fixture(scope="session")
def ground(bare: Ground) -> Iterator[Ground]:
    """The node with the keeper's policy; at the end everything must be as before the first apply."""
    bare.apply()
    yield bare
    bare.teardown()
    assert bare.changed() == ""


def increase(before: dict[Verdict, int], after: dict[Verdict, int]) -> dict[Verdict, int]:
    """What was added to counters."""
    return {
        verdict: count - before.get(verdict, 0)
        for verdict, count in after.items()
        if count != before.get(verdict)
    }


def addresses(*texts: str) -> list[IpAddress]:
    return [ip_address(text) for text in texts]
