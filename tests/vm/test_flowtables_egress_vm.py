# SPDX-License-Identifier: Apache-2.0
"""`egress`, VRFs and equal clients beside a flowtable, of others or our own: established flows keep their way.

Left out on 6.12: that flowtables take over what a policy marks, and where it goes then, is shown there without egress
(tests/vm/test_flowtables_vm.py, tests/vm/test_accelerate_vm.py), and egress without flowtables
(tests/vm/test_egress_vm.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from datapath.controller import Controller
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.bpf.conftest import inside
from tests.netns.equals import ISOLATED, overlapping
from tests.vm.flows import KINDS, Flow, conversations
from tools.lab import Lab
from tools.lab.topology import FAMILIES, POD_A, POD_B, Pair, pair

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.timeout(600),
    pytest.mark.one_kernel("6.1"),
    *(pytest.mark.kernel_feature(name) for name in ("nf_flow_table", "8021q", "vrf")),
]

WEB, JOBS = pair("1.2.3.10", "2001:db8:100::10"), pair("1.2.3.11", "2001:db8:100::11")
#: By pod: its address, the number of its network, the address that it leaves with, and who answers there.
ENTRIES = (("pod_a", POD_A, 0, WEB, "client"), ("pod_b", POD_B, 1, JOBS, "client2"))
FOREIGN = """
table inet firewall {{
  flowtable quick {{
    hook ingress priority 0
    devices = {{ eth0, to-pod_a, to-pod_b, {devices} }}
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    ct state established flow add @quick
  }}
}}
"""


def _listed(addresses: Pair) -> str:
    return f'["{addresses.v4}", "{addresses.v6}"]'


@dataclass
class Both:
    """A lab with two networks and equal clients, and who serves it."""

    lab: Lab
    controller: Controller
    is_announced: bool = False

    def apply(self, *, in_vrf: bool, accelerate: bool) -> None:
        egress = "".join(
            f"  - {{name: {pod.replace('_', '-')}, network: {self.lab.networks[number].name},"
            f" sources: {_listed(address)}, source_ip: {_listed(source)}}}\n"
            for pod, address, number, source, _ in ENTRIES
        )
        extra = f"backend: nft\negress:\n{egress}" + ("accelerate: true\n" if accelerate else "")
        text = self.lab.policy(extra=extra, network_extra=ISOLATED)
        first, second, rest = text.split(ISOLATED)
        red, blue = (
            f"    vrf: {{name: {name}, table: {table}, create: true}}\n" if in_vrf else ""
            for name, table in (("red", 1001), ("blue", 1002))
        )
        text = f"{first}{ISOLATED}{red}{second}{ISOLATED}{blue}{rest}"
        with inside(self.lab.node.name):
            self.controller.apply(parse_policy(text.encode(), "both.yaml"))
        if not self.is_announced:
            for net, addresses in zip(self.lab.networks, (WEB, JOBS), strict=True):
                vips = {address for pair_ in net.vips.values() for address in pair_}
                self.lab.announce(net, [*{*addresses, *vips}])
            self.is_announced = True


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with Lab(networks=overlapping(), vlan="8021q") as lab:
        for net in lab.networks:
            lab.serve(net.role("client"), net.client)
        made = Both(lab, Controller(StateDirectory(tmp_path_factory.mktemp("state"))))
        yield made
        with inside(lab.node.name):
            made.controller.teardown()


@pytest.fixture(scope="module", params=["plain", "vrf"])
def place(request: pytest.FixtureRequest) -> bool:
    """Whether the networks are in VRFs."""
    return bool(request.param == "vrf")


@pytest.fixture(scope="module", params=["others", "ours"])
def carried(both: Both, place: bool, request: pytest.FixtureRequest) -> Iterator[Both]:
    node = both.lab.node
    both.apply(in_vrf=place, accelerate=request.param == "ours")
    if request.param == "others":
        node.nft(FOREIGN.format(devices=", ".join(net.device for net in both.lab.networks)))
        both.apply(in_vrf=place, accelerate=False)
    yield both
    if request.param == "others":
        node.run("nft", "delete", "table", "inet", "firewall")


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=[entry[0] for entry in ENTRIES])
def test_pods_keep_the_way_out_and_their_address(carried: Both, number: int) -> None:
    lab = carried.lab
    pod, _, _, source, answers = ENTRIES[number]
    wrong = []
    for family in FAMILIES:
        # The same address behind both networks: only the way decides who answers.
        target = lab.networks[number].client.get(family)
        for kind in KINDS:
            flow = Flow(lab, kind, target, pod)
            with flow.sock:
                try:
                    seen = [(who["server"], who["source"]) for who in (flow.ask() for _ in range(5))]
                    if set(seen) != {(answers, str(source.get(family)))}:
                        wrong.append(f"{kind} {target}: {seen}")
                except OSError as error:
                    wrong.append(f"{kind} {target}: {error!r}")
                if not flow.offloaded(lab.node):
                    wrong.append(f"{kind} {target}: not taken over: {flow.tracked(lab.node)}")
    assert wrong == []
    assert lab.by_gateway.wrong_way() == 0


@pytest.mark.parametrize("number", [0, 1])
def test_clients_are_answered_by_their_network(carried: Both, number: int) -> None:
    role = carried.lab.networks[number].role("client")
    assert conversations(carried.lab, number=number, role=role) == []
    assert carried.lab.by_gateway.wrong_way() == 0
