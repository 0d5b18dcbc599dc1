# SPDX-License-Identifier: Apache-2.0
"""Two VRFs with equal clients; pods open connections by the VRF of their service, with its load-balancer address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from datapath.controller import Controller
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.bpf.conftest import inside
from tests.netns.equals import ISOLATED, in_vrfs, overlapping
from tools.lab import Lab
from tools.lab.topology import FAMILIES, POD_A, POD_B, Pair, pair
from tools.lab.traffic import ask_line, connect, datagrams

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "vrf")),
]

#: By pod: whose connections, which network, with which address, and who answers there.
WEB, JOBS = pair("1.2.3.10", "2001:db8:100::10"), pair("1.2.3.11", "2001:db8:100::11")
ENTRIES = (("pod_a", POD_A, 0, WEB, "client"), ("pod_b", POD_B, 1, JOBS, "client2"))


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


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(networks=overlapping(), vlan="8021q") as built:
        for net in built.networks:
            built.serve(net.role("client"), net.client)
        controller = Controller(StateDirectory(tmp_path_factory.mktemp("state")))
        with inside(built.node.name):
            controller.apply(parse_policy(_policy(built).encode(), "vrfs.yaml"))
        for net, addresses in zip(built.networks, (WEB, JOBS), strict=True):
            built.announce(net, [*addresses])
        yield built
        with inside(built.node.name):
            controller.teardown()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=[entry[0] for entry in ENTRIES])
def test_the_client_of_its_vrf_sees_the_load_balancers_address(lab: Lab, number: int, family: int) -> None:
    pod, _, _, source, answers = ENTRIES[number]
    # The same address in both VRFs: only the way decides who answers.
    target = lab.networks[number].client.get(family)
    assert target == lab.networks[0].client.get(family)
    seen: list[dict[str, Any]] = []
    with connect(lab, pod, target, seconds=10) as sock:
        seen.append(json.loads(ask_line(sock, "who")))
    with datagrams(lab, pod, target) as sock:
        sock.send(b"who")
        seen.append(json.loads(sock.recv(200)))
    assert [(who["server"], who["source"]) for who in seen] == [(answers, str(source.get(family)))] * 2
    assert lab.by_gateway.wrong_way() == 0
