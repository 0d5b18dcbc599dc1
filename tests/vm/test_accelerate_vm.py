# SPDX-License-Identifier: Apache-2.0
"""`accelerate`: our own flowtable carries established flows past the hooks, by their way, as long as it may."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from datapath.reconcile.steps import NftTransaction
from tests.vm.conftest import Ground
from tests.vm.flows import KINDS, TURNS, Flow, conversations, has_chains, ways
from tests.vm.paths import hardware_address
from tools.lab import Backend
from tools.lab.netns import Namespace
from tools.lab.topology import FAMILIES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.timeout(600),
    *(pytest.mark.kernel_feature(name) for name in ("nf_flow_table", "8021q", "bridge")),
]

#: Counts what of our connections still passes the hooks.
WATCH = """
table inet watch {
  chain forward {
    type filter hook forward priority 400; policy accept;
    ct mark & 0x0fff0000 != 0 counter
  }
}
"""


def policy(ground: Ground, extra: str = "") -> str:
    return f"{ground.public()}    accelerate: true\n{extra}"


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[Ground]:
    ground.apply(policy(ground))
    ground.lab.announce(ground.lab.networks[0])
    yield ground
    ground.apply()


def flowtables(node: Namespace) -> dict[str, set[str]]:
    """Devices of our flowtables, by name."""
    listed = node.run("nft", "list", "flowtables", "inet")
    ours = listed[listed.find("table inet datapath {") :] if "table inet datapath {" in listed else ""
    return {
        name: set(re.findall(r'[^\s,"]+', devices))
        for name, devices in re.findall(r"flowtable (\S+) \{.*?devices = \{ ([^}]*) \}", ours, re.DOTALL)
    }


def open_flows(ground: Ground, backend: Backend = Backend.REMOTE_POD) -> list[Flow]:
    (network,) = ground.lab.networks
    return [
        Flow(ground.lab, kind, network.vips[backend].get(family)) for kind in KINDS for family in FAMILIES
    ]


def close(flows: list[Flow]) -> None:
    for flow in flows:
        flow.sock.close()


def test_established_flows_are_taken_over_and_leave_by_the_vlan(served: Ground) -> None:
    (network,) = served.lab.networks
    assert flowtables(served.lab.node) == {"fast": {"eth0", network.device}}
    served.lab.reset_counters()
    assert conversations(served.lab) == []
    assert ways(served) == {hardware_address(served.lab["router"], "br-vlan").hex(":")}
    assert served.lab.by_gateway.wrong_way() == 0


@pytest.mark.parametrize(
    ("backend", "seen"), [(Backend.REMOTE_POD, 0), (Backend.LOCAL_POD, TURNS)], ids=["remote", "local"]
)
def test_what_is_taken_over_passes_no_hook(served: Ground, backend: Backend, seen: int) -> None:
    """Of a pod here, the answers do: the device that they come by is not in the flowtable."""
    node = served.lab.node
    flows = open_flows(served, backend)
    try:
        for flow in flows:
            flow.settle()
        node.nft(WATCH)
        for flow in flows:
            before = _counted(node)
            for _ in range(TURNS):
                flow.ask()
            # TCP acknowledges what it has not answered yet, as it likes.
            passed = _counted(node) - before
            assert passed == seen if flow.kind == "udp" or not seen else passed >= seen, flow.kind
    finally:
        close(flows)
        node.run("nft", "delete", "table", "inet", "watch")


def _counted(node: Namespace) -> int:
    found = re.search(r"counter packets (\d+)", node.run("nft", "list", "table", "inet", "watch"))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("ebpf", marks=pytest.mark.one_kernel("6.12")),
        pytest.param("nft", marks=pytest.mark.one_kernel("6.1")),
    ],
)
def test_what_a_new_policy_denies_stops(served: Ground, backend: str) -> None:
    """The eBPF program sees every packet; behind nftables' checks, the flowtable changes with them.

    Left out: eBPF on 6.1, where tests/vm/test_flowtables_vm.py shows that it sees what a flowtable carries; nftables on
    6.12, where flowtables are changed by the same transactions (the next test).
    """
    (network,) = served.lab.networks
    flows: list[Flow] = []
    try:
        served.apply(policy(served), top=f"backend: {backend}\n")
        flows = open_flows(served)
        for flow in flows:
            flow.settle()
        assert [flow.offloaded(served.lab.node) for flow in flows] == [True] * len(flows)
        deny = f'    reverse_path: {{deny: ["{network.client.v4}", "{network.client.v6}"]}}\n'
        served.apply(policy(served, deny), top=f"backend: {backend}\n")
        for flow in flows:
            flow.sock.settimeout(2)
            with pytest.raises(OSError, match="timed out"):
                flow.ask()
    finally:
        close(flows)
        served.apply(policy(served))


def test_without_it_flows_go_on_the_usual_way(served: Ground) -> None:
    node = served.lab.node
    flows = open_flows(served)
    try:
        for flow in flows:
            flow.settle()
        served.apply(served.public())
        assert not flowtables(node)
        assert not has_chains(node)
        for flow in flows:
            flow.settle()
        assert [flow.offloaded(node) for flow in flows] == [False] * len(flows)
        served.apply(policy(served))
        for flow in flows:
            flow.settle()
        assert [flow.offloaded(node) for flow in flows] == [True] * len(flows)
        assert served.lab.by_gateway.wrong_way() == 0
    finally:
        close(flows)


@pytest.mark.one_kernel("6.12")
def test_devices_that_come_and_go(served: Ground) -> None:
    """Somebody deletes the VLAN device; a bridge of pods comes, and goes.

    Left out on 6.1: what is put back there is put back by the same healer (the next test).
    """
    (network,) = served.lab.networks
    node = served.lab.node
    node.ip([f"link del {network.device}"])
    assert flowtables(node) == {"fast": {"eth0"}}
    look = served.heal()
    assert (look.failed, look.held) == ((), ())
    assert flowtables(node) == {"fast": {"eth0", network.device}}
    assert not served.status().steps
    served.lab.announce(network)
    assert conversations(served.lab, backends=[Backend.REMOTE_POD]) == []
    node.ip(["link add cni0 type bridge", "link set cni0 up", "addr add 10.112.77.1/24 dev cni0"])
    try:
        served.heal()
        assert flowtables(node) == {"fast": {"eth0", network.device, "cni0"}}
    finally:
        node.ip(["link del cni0"])
    assert flowtables(node) == {"fast": {"eth0", network.device}}
    # Its address is no longer one of the node's own: the checks change, the flowtable does not.
    assert not [step for step in served.status().steps if isinstance(step, NftTransaction)]
    served.heal()
    assert not served.status().steps


@pytest.mark.one_kernel("6.1")
def test_what_somebody_takes_out_is_put_back(served: Ground) -> None:
    """Left out on 6.12: there a device takes it out (the test before)."""
    (network,) = served.lab.networks
    node = served.lab.node
    whole = {"fast": {"eth0", network.device}}
    node.nft("delete flowtable inet datapath fast { hook ingress priority 0; devices = { eth0 }; }")
    assert flowtables(node) == {"fast": {network.device}}
    assert len(served.status().steps) == 1
    served.heal()
    assert flowtables(node) == whole
    node.nft("delete table inet datapath")
    served.heal()
    assert flowtables(node) == whole
    assert not served.status().steps


def test_it_is_the_same_when_applied_again(served: Ground) -> None:
    assert not served.apply(policy(served)).steps


def test_nothing_is_left_without_a_policy(served: Ground) -> None:
    flows = open_flows(served)
    try:
        for flow in flows:
            flow.settle()
        served.teardown()
        assert "flowtable" not in served.lab.node.run("nft", "list", "ruleset")
        assert served.changed() == ""
        assert [flow.offloaded(served.lab.node) for flow in flows] == [False] * len(flows)
    finally:
        close(flows)
        served.apply(policy(served))
        served.lab.announce(served.lab.networks[0])
    assert conversations(served.lab, backends=[Backend.REMOTE_POD]) == []
