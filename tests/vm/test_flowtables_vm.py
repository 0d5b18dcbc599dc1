# SPDX-License-Identifier: Apache-2.0
"""A flowtable of others carries established flows past the hooks: they must leave by their VLAN all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from datapath.kernel import ingress
from datapath.kernel.watch import NftWatch
from datapath.plan.ingress import Verdict
from datapath.service.healer import Healer
from tests.bpf.conftest import inside
from tests.vm.conftest import Ground
from tests.vm.flows import TURNS, Flow, conversations, has_chains, ways
from tests.vm.paths import hardware_address
from tools.lab import Backend
from tools.lab.topology import FAMILIES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.kernel_feature("nf_flow_table"),
]

#: Which packets may add a flow: the other direction's route is looked up by that packet.
HOOKED = {"any": "", "request": "ct direction original", "reply": "ct direction reply"}

FOREIGN = """
table inet firewall {{
  flowtable fast {{
    hook ingress priority 0
    devices = {{ {devices} }}
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    {match} ct state established flow add @fast
  }}
}}
"""


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[Ground]:
    ground.apply(ground.public())
    ground.lab.announce(ground.lab.networks[0])
    yield ground
    ground.apply()


@pytest.fixture
def flowtable(served: Ground) -> Iterator[Callable[[str], None]]:
    """Load the foreign flowtable for some packets, and apply again, as the daemon does when it hears of it."""
    node = served.lab.node

    def load(match: str) -> None:
        (network,) = served.lab.networks
        devices = f"eth0, {network.device}, to-pod_a, to-pod_b"
        node.nft(FOREIGN.format(devices=devices, match=match))
        served.apply(served.public())

    yield load
    node.run("nft", "delete", "table", "inet", "firewall")
    served.apply(served.public())
    assert not has_chains(node)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", HOOKED)
def test_established_flows_leave_by_the_vlan(
    served: Ground, flowtable: Callable[[str], None], who: str
) -> None:
    flowtable(HOOKED[who])
    served.lab.reset_counters()
    assert conversations(served.lab) == []
    assert ways(served) == {hardware_address(served.lab["router"], "br-vlan").hex(":")}
    assert served.lab.by_gateway.wrong_way() == 0


@pytest.mark.timeout(600)
def test_a_daemon_hears_of_flowtables_and_adds_the_chains_and_takes_them_away(served: Ground) -> None:
    """Tables of others are passed over as ever."""
    node = served.lab.node
    healer = Healer(served.controller._directory)
    watch = node.call(NftWatch)

    def heard() -> list[tuple[str, str]]:
        events = watch.read()
        healer.forget(event.kind for event in events)
        with inside(node.name):
            assert healer.look().failed == ()
        return [(event.kind, event.what) for event in events]

    try:
        node.nft("add table inet other\nadd set inet other s { type ipv4_addr; elements = { 192.0.2.1 }; }")
        node.nft("delete table inet other")
        assert heard() == []
        node.nft(FOREIGN.format(devices="eth0", match=""))
        assert heard() == [("flowtable", "flowtable added")]
        assert has_chains(node)
        node.run("nft", "delete", "table", "inet", "firewall")
        assert heard() == [("flowtable", "flowtable deleted")]
        assert not has_chains(node)
    finally:
        watch.close()
        healer.close()


def seen_by_the_program(ground: Ground) -> int:
    (network,) = ground.lab.networks
    with inside(ground.lab.node.name):
        return ingress.read_counters()[ground.slots[network.name]][Verdict.PASS].packets


@pytest.mark.timeout(600)
def test_sources_are_checked_before_the_flowtable(served: Ground, flowtable: Callable[[str], None]) -> None:
    """The program sees packets that the flowtable carries, and what the policy denies stops at once."""
    (network,) = served.lab.networks
    flowtable("")
    flow = Flow(served.lab, "udp", network.vips[Backend.LOCAL_POD].v4)
    with flow.sock:
        flow.ask()
        flow.ask()
        assert flow.offloaded(served.lab.node)
        before = seen_by_the_program(served)
        for _ in range(TURNS):
            flow.ask()
        assert seen_by_the_program(served) - before == TURNS
        served.apply(f"{served.public()}    reverse_path: {{deny: [{network.client.v4}]}}\n")
        flow.sock.settimeout(2)
        with pytest.raises(TimeoutError):
            flow.ask()
        served.apply(served.public())
        flow.sock.settimeout(20)
        flow.ask()


@pytest.mark.timeout(600)
def test_a_flow_follows_a_new_gateway(served: Ground, flowtable: Callable[[str], None]) -> None:
    """The kernel looks a flow's routes up again when routes have changed; nothing has to be flushed."""
    (network,) = served.lab.networks
    other = served.lab["client_vlan"]
    # The client on the VLAN becomes a router, too: it sends what it gets on to the first one.
    other.sysctl(
        {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1, "net/ipv4/conf/all/send_redirects": 0}
    )
    flowtable("")
    flows = [
        Flow(served.lab, kind, network.vips[Backend.LOCAL_POD].get(family))
        for kind in ("tcp", "udp")
        for family in FAMILIES
    ]
    try:
        for flow in flows:
            flow.settle()
        assert [flow.offloaded(served.lab.node) for flow in flows] == [True] * len(flows)
        policy = served.public()
        for old, new in zip(network.gateway, network.client_vlan, strict=True):
            policy = policy.replace(f'"{old}"', f'"{new}"')
        served.apply(policy)
        served.lab.reset_counters()
        for flow in flows:
            flow.settle()
        assert ways(served) == {hardware_address(other, "eth0").hex(":")}
    finally:
        for flow in flows:
            flow.sock.close()
        served.apply(served.public())
        other.sysctl({"net/ipv4/ip_forward": 0, "net/ipv6/conf/all/forwarding": 0})
