# SPDX-License-Identifier: Apache-2.0
"""Two VRFs with equal clients; pods open connections by the VRF of their service, with its load-balancer address.

The case of OpenShift's pages (NMState VRFs, MetalLB, EgressService), and the check they give: tcpdump at the client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from datapath.controller import Controller, Drift
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.bpf.conftest import inside
from tests.netns.equals import ISOLATED, in_vrfs, overlapping
from tests.service.daemon import Daemon, Node, wait_until
from tests.vm.paths import hardware_address
from tests.vm.tcpdump import Tcpdump
from tools.lab import Lab, dnat
from tools.lab.topology import FAMILIES, NODE, POD_A, POD_B, POD_REMOTE, SERVICE_PORT, Pair, pair
from tools.lab.traffic import ask_line, connect, datagrams

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "vrf")),
]

#: By pod: whose connections, which network, with which address, and who answers there.
WEB, JOBS = pair("1.2.3.10", "2001:db8:100::10"), pair("1.2.3.11", "2001:db8:100::11")
ENTRIES = (("pod_a", POD_A, 0, WEB, "client"), ("pod_b", POD_B, 1, JOBS, "client2"))
VRFS = ("red", "blue")
#: By entry: who serves its load-balancer address, and which pods what enters by its VRF is for.
SERVERS = ("pod_a", "pod_remote")
PODS = ({POD_A}, {POD_B, POD_REMOTE})


def _listed(addresses: Pair) -> str:
    return f'["{addresses.v4}", "{addresses.v6}"]'


def _policy(lab: Lab) -> str:
    egress = "".join(
        f"  - {{name: {pod.replace('_', '-')}, network: {lab.networks[number].name},"
        f" sources: {_listed(address)}, source_ip: {_listed(source)}}}\n"
        for pod, address, number, source, _ in ENTRIES
    )
    # Emulated, one more eBPF program costs most of a minute; it has no part in this.
    return in_vrfs(lab.policy(extra=f"backend: nft\negress:\n{egress}", network_extra=ISOLATED))


@dataclass(frozen=True)
class Case:
    """The lab with the policy in force, and its state directory."""

    lab: Lab
    state: Path

    def status(self) -> Drift | None:
        with inside(self.lab.node.name):
            return Controller(StateDirectory(self.state)).status()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with Lab(networks=overlapping(), vlan="8021q") as built:
        for net in built.networks:
            built.serve(net.role("client"), net.client)
        case = Case(built, tmp_path_factory.mktemp("state"))
        controller = Controller(StateDirectory(case.state))
        with inside(built.node.name):
            controller.apply(parse_policy(_policy(built).encode(), "vrfs.yaml"))
        for net, addresses in zip(built.networks, (WEB, JOBS), strict=True):
            built.announce(net, [*addresses])
        yield case
        with inside(built.node.name):
            controller.teardown()


def _asked(lab: Lab, number: int) -> list[tuple[str, str]]:
    """The client asks the service, and the service's pod the client: who answered each, and which source it saw."""
    pod, _, _, vip, client = ENTRIES[number]
    found: list[tuple[str, str]] = []
    for family in FAMILIES:
        # The same address in both VRFs: only the way decides who answers.
        target = lab.networks[number].client.get(family)
        assert target == lab.networks[0].client.get(family)
        for role, to in ((client, vip.get(family)), (pod, target)):
            with connect(lab, role, to, seconds=10) as sock:
                found.append(_who(ask_line(sock, "who")))
            with datagrams(lab, role, to, seconds=10) as sock:
                sock.send(b"who")
                found.append(_who(sock.recv(200)))
    return found


def _who(answer: str | bytes) -> tuple[str, str]:
    who: dict[str, Any] = json.loads(answer)
    return who["server"], who["source"]


def _answers(lab: Lab, number: int) -> list[tuple[str, str]]:
    """What `_asked` finds where all is well."""
    _, _, _, vip, client = ENTRIES[number]
    found: list[tuple[str, str]] = []
    for family in FAMILIES:
        # Kube-proxy hides the client from a pod of another node.
        seen = lab.networks[number].client if SERVERS[number] == "pod_a" else NODE
        found += [(SERVERS[number], str(seen.get(family)))] * 2 + [(client, str(vip.get(family)))] * 2
    return found


def test_tcpdump_at_the_clients_shows_the_load_balancers_address_and_nothing_else(case: Case) -> None:
    """What the article has its reader verify, in both VRFs at once; and the trunk and the VRFs, which it does not."""
    lab = case.lab
    with ExitStack() as stack:
        # All start at the same time: emulated, each takes a while.
        dumps = [Tcpdump(lab[client], "eth0") for *_, client in ENTRIES]
        vrfs = [Tcpdump(lab.node, vrf) for vrf in VRFS]
        trunk = Tcpdump(lab["gw"], "node", "vlan and (ip or ip6)", "-e")
        for dump in (*dumps, *vrfs, trunk):
            stack.enter_context(dump)
        asked = [_asked(lab, number) for number in range(len(ENTRIES))]

    for number, (_, _, _, vip, _) in enumerate(ENTRIES):
        network = lab.networks[number]
        assert asked[number] == _answers(lab, number)
        both_ways = {
            pair
            for family in FAMILIES
            for pair in (
                (network.client.get(family), vip.get(family)),
                (vip.get(family), network.client.get(family)),
            )
        }
        # At the client: the two know nobody else, and each opens connections to the other's port.
        seen = dumps[number].packets
        assert {(packet.source, packet.target) for packet in seen} == both_ways
        opened = {(packet.source, packet.target, packet.port) for packet in seen if packet.opens}
        assert opened == {(*way, SERVICE_PORT) for way in both_ways}
        assert {packet.vlan for packet in seen} == {0}
        # On the trunk: the same, and under this network's tag.
        tagged = [packet for packet in trunk.packets if packet.vlan == network.vlan_id]
        assert {(packet.source, packet.target) for packet in tagged} == both_ways
        # In the VRF: what enters, on its way to the pods of this network (the first pass has undone the translation).
        assert {(packet.source, packet.target) for packet in vrfs[number].packets} == {
            (network.client.get(family), pod.get(family)) for pod in PODS[number] for family in FAMILIES
        }
    assert {packet.vlan for packet in trunk.packets} == {network.vlan_id for network in lab.networks}
    assert lab.by_gateway.wrong_way() == 0


class LabNode(Node):
    """The lab's node, for a daemon."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.ns, self.folder, self.state = case.lab.node, folder, case.state
        self.policy = folder / "policy.yaml"


@contextmanager
def _second_gateway(lab: Lab) -> Iterator[str]:
    """Another router on the first network, by its link address; each answers for its own address only."""
    router, gateway = lab["router"], lab.networks[0].gateway
    router.ip(["link add gw2 link br-vlan type macvlan mode bridge", "link set gw2 up"])
    router.sysctl({f"net/ipv4/conf/{device}/arp_ignore": 1 for device in ("br-vlan", "gw2")})
    router.ip([f"addr add {gateway.v4 + 1}/24 dev gw2", f"addr add {gateway.v6 + 1}/64 dev gw2"])
    try:
        yield hardware_address(router, "gw2").hex(":")
    finally:
        router.ip(["link del gw2"])


@pytest.mark.timeout(900)
@pytest.mark.one_kernel("6.12")
@pytest.mark.kernel_feature("macvlan")
def test_a_daemon_heals_all_of_it_at_once_and_egress_leaves_by_a_gateway_that_lives(
    case: Case, tmp_path: Path
) -> None:
    """Left out on 6.1: the same healer heals there without a daemon around it (tests/vm/test_random_vm.py)."""
    lab, node = case.lab, LabNode(case, tmp_path)
    first = lab.networks[0]
    one, two = (f'"{first.gateway.v4 + n}", "{first.gateway.v6 + n}"' for n in (0, 1))
    gateways = (
        f"    gateways: [{one}, {two}]\n    gateway_mode: active_standby\n"
        "    gateway_check: {interval_ms: 500, multiplier: 4, hold_s: 1}\n"
    )
    single = f"    gateway: [{one}]\n"
    assert single in _policy(lab)
    node.policy.write_text(_policy(lab).replace(single, gateways))
    with _second_gateway(lab) as link_address, Daemon(node).started() as daemon:
        # Somebody takes everything at once: rules, the table (and kube-proxy's), a VRF with its routes, a device.
        lab.node.ip(["link del red", f"link set {lab.networks[1].device} nomaster"])
        for family in FAMILIES:
            lab.node.ip([f"-{family} rule flush protocol 78"])
        lab.node.nft("flush ruleset")
        dnat.install(lab.node, lab.dnat, lab.networks)

        def is_healed() -> bool:
            drift = case.status()
            return drift is not None and not drift.steps and not drift.waiting

        wait_until(is_healed, "everything is back")
        assert [_asked(lab, number) for number in (0, 1)] == [_answers(lab, number) for number in (0, 1)]
        assert not daemon.events("gateway_down")

        lab["router"].ip(
            [f"addr del {first.gateway.v4}/24 dev br-vlan", f"addr del {first.gateway.v6}/64 dev br-vlan"]
        )
        daemon.wait_for("gateway_down", 2)
        wait_until(is_healed, "nothing is left to be done")
        lab.reset_counters()
        assert _asked(lab, 0) == _answers(lab, 0)
        clients = {str(address) for address in first.client}
        seen = [item for item in lab.by_vlan[first.name].read() if item.destination in clients]
        assert {item.mac for item in seen} == {link_address}
        assert {item.protocol for item in seen} == {"tcp", "udp"}
        assert lab.by_gateway.wrong_way() == 0
        assert daemon.stop() == 0
