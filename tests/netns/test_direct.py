# SPDX-License-Identifier: Apache-2.0
"""`steering: direct` as an operator meets it: applied, changed, refused, drifting, and gone again."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.nodes import Node, node
from tests.netns.test_apply import User
from tools.lab import Backend, Lab, command, network
from tools.lab.dump import difference
from tools.lab.traffic import PingFlood, Transfer, connect, datagrams

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DIRECT = "    steering: direct\n"
POLICY = """\
version: 1
steering: direct
networks:
  - name: public
    interface: eth1
    vips: [198.51.100.0/24, "2001:db8:1::/64"]
    gateway: [198.51.100.1, "2001:db8:1::1"]
"""
DEFAULTS = ("-4 route add default dev eth2", "-6 route add default dev eth2")


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[User]:
    """A node without a default route."""
    with node(6) as made:
        yield User(made, tmp_path)


@pytest.fixture
def user(bare: User) -> User:
    """A node whose default routes leave by eth2."""
    _ip(bare.node, *DEFAULTS)
    bare.before = bare.dump()
    return bare


def _ip(where: Node, *lines: str) -> None:
    for line in lines:
        where.run("ip", *line.split())


def test_apply_status_again_and_teardown(user: User) -> None:
    assert "egress program for 1 network(s) on eth2" in user.apply(POLICY)
    assert "nothing to do" in user.apply(POLICY)
    assert "no drift" in user.run("status")
    (network,) = user.json("status")["networks"]
    assert (network["return_path"], network["steered"]) == ("direct", {"packets": 0, "bytes": 0})
    assert "eth2 egress: datapath_out" in user.dump()["tcx"] or "datapath_out" in user.dump()["filters"]
    assert "detach the egress program" in user.run("teardown")
    assert user.changed() == ""


@pytest.mark.parametrize(
    ("prepare", "policy", "line", "words"),
    [
        ((), POLICY, 7, "IPv4 default route of the main table, and there is none"),
        (DEFAULTS[:1], POLICY, 7, "IPv6 default route of the main table, and there is none"),
        (("-4 route add default dev eth1", DEFAULTS[1]), POLICY, 4, "which the IPv4 default route leaves by"),
        ((*DEFAULTS, "link set eth1 mtu 1400"), POLICY, 4, r"MTU of eth2 \(1500\)"),
        (
            (*DEFAULTS, "addr add 198.51.100.77/25 dev eth2"),
            POLICY,
            6,
            r"neighbours of eth2 \(198.51.100.0/25\)",
        ),
        (
            (*DEFAULTS, "addr add 203.0.113.7/24 dev eth2"),
            POLICY + "    on_link: [203.0.113.0/28, 198.51.100.0/24, '2001:db8:1::/64']\n",
            8,
            r"clients in 203.0.113.0/28",
        ),
        pytest.param(
            ("link add link eth2 name mac0 type macvlan", "link set mac0 up", *DEFAULTS),
            POLICY.replace("eth1", "mac0"),
            4,
            "its packets pass eth2 again",
            marks=pytest.mark.kernel_feature("macvlan"),
        ),
    ],
    ids=["no IPv4 default", "no IPv6 default", "on the network", "MTU", "subnet", "on_link", "macvlan"],
)
def test_what_this_host_cannot_serve_is_refused_with_its_line(
    bare: User, prepare: tuple[str, ...], policy: str, line: int, words: str
) -> None:
    _ip(bare.node, *prepare)
    bare.before = bare.dump()
    message = bare.run("apply", bare.policy(policy), status=2)
    assert re.search(words, message), message
    assert re.search(rf"policy\.yaml:{line}:\d+: error", message), message
    assert "steering: rules" in message
    assert bare.changed() == ""


def test_every_default_route_counts_and_follows(user: User) -> None:
    _ip(user.node, "-4 route add default metric 500 nexthop dev eth3 weight 1 nexthop dev eth4 weight 1")
    user.apply(POLICY)
    assert _steered_devices(user) == ["eth2", "eth3", "eth4"]
    _ip(
        user.node,
        "-4 route del default dev eth2",
        "-6 route del default dev eth2",
        "-6 route add default dev eth3",
    )
    assert user.json("status", status=3)["drift"] == ["egress program only for 1 network(s)"]
    user.apply(POLICY)
    assert _steered_devices(user) == ["eth3", "eth4"]


def _steered_devices(user: User) -> list[str]:
    dump = user.dump()
    return sorted(set(re.findall(r"^(\w+) egress:", dump["tcx"] + dump["filters"], re.MULTILINE)))


DETACH = "import sys; from datapath.kernel.bpf import attachments as a; from datapath.plan.tc import Direction as D;"
SPOIL = """
from datapath.kernel.bpf import steering
state = steering.observe_steering()
with steering.LoadedSteering.open(min(state.tables)) as loaded:
    tables = loaded.read_tables()
    loaded.write_tables(type(tables)({}, tables.targets))
"""

#: The program asks the tries for every packet, or knows a network that there is not.
STOP_INDEX = """
from datapath.kernel.bpf import abi, steering
state = steering.observe_steering()
with steering.LoadedSteering.open(min(state.tables)) as loaded:
    loaded.map(abi.MAP_INDEX).update({bytes(4): bytes(loaded.map(abi.MAP_INDEX).value_size)})
"""
SPOIL_INDEX = """
from datapath.kernel.bpf import abi, steering
state = steering.observe_steering()
with steering.LoadedSteering.open(min(state.tables)) as loaded:
    buckets = loaded.map(abi.INDEX_MAPS[6])
    buckets.update({key: b"\\1" * buckets.value_size for key in buckets.items()})
"""


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (
            DETACH + "a.detach('eth2', direction=D.EGRESS)",
            "egress program for 1 network(s) on eth2",
        ),
        (SPOIL, "egress program for 1 network(s) on eth2"),
        (STOP_INDEX, "egress program for 1 network(s) on eth2"),
        (SPOIL_INDEX, "egress program for 1 network(s) on eth2"),
    ],
    ids=["detached", "emptied", "index stopped", "index spoiled"],
)
def test_drift_is_named_and_healed(user: User, code: str, named: str) -> None:
    user.apply(POLICY)
    settled = user.dump()
    user.node.run(sys.executable, "-c", code)
    assert named in user.run("status", status=3)
    user.apply(POLICY)
    assert "no drift" in user.run("status")
    assert difference(settled, user.dump()) == ""


@pytest.mark.slow
def test_changes_of_direct_networks_lose_nothing(tmp_path: Path) -> None:
    """Networks come and go beside one that stays, the program is replaced, and rules give way to it."""
    with Lab(networks=[network(0), network(1)]) as lab:
        whole = lab.policy(network_extra=DIRECT)
        one = whole[: whole.rindex("  - name:")]
        rules = lab.policy()
        vips = lab.networks[0].vips
        command.apply(lab, tmp_path, rules)
        lab.by_gateway.reset()
        with ExitStack() as stack:
            floods = [
                stack.enter_context(PingFlood(lab, client, vips[backend].get(version)))
                for client, backend in (("client", Backend.LOCAL_POD), ("client_vlan", Backend.REMOTE_POD))
                for version in (4, 6)
            ]
            transfer = stack.enter_context(Transfer(lab, "client", vips[Backend.HOST_VIP].v4))
            for policy in (whole, one, whole, one):
                before = transfer.turns
                command.apply(lab, tmp_path, policy)
                while transfer.turns == before and transfer.error is None:
                    threading.Event().wait(0.02)
        assert transfer.error is None
        assert [(flood.error, flood.lost) for flood in floods] == [(None, set())] * 4
        assert min(flood.sent for flood in floods) > 50
        assert lab.by_gateway.wrong_way() == 0


def test_connections_survive_a_change_to_direct_and_give_their_mark_back(tmp_path: Path) -> None:
    with Lab() as lab:
        public = lab.networks[0]
        command.apply(lab, tmp_path, lab.policy())
        vip = public.vips[Backend.LOCAL_POD]
        with datagrams(lab, "client", vip.v4) as v4, datagrams(lab, "client", vip.v6) as v6:
            for sock in (v4, v6):
                sock.send(b"before")
                assert sock.recv(100) == b"before"
            assert "mark=65536" in lab.node.run("cat", "/proc/net/nf_conntrack")
            printed = command.apply(lab, tmp_path, lab.policy(network_extra=DIRECT))
            assert "carry connections of public from mark 0x00010000" in printed
            assert "mark=65536" not in lab.node.run("cat", "/proc/net/nf_conntrack")
            for sock in (v4, v6):
                sock.send(b"after")
                assert sock.recv(100) == b"after"
            command.apply(lab, tmp_path, lab.policy())
            for sock in (v4, v6):
                sock.send(b"and back")
                assert sock.recv(100) == b"and back"
        assert lab.by_gateway.wrong_way() == 0


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("client", ["client", "client_vlan"])
def test_first_answer_waits_for_its_neighbour(tmp_path: Path, client: str, family: int) -> None:
    """The packet that has to wait leaves for the right next hop, too (docs/design/steering.md)."""
    with Lab() as lab:
        public = lab.networks[0]
        command.apply(lab, tmp_path, lab.policy(network_extra=DIRECT))
        seen = lab.by_vlan[public.name]
        for backend in (Backend.LOCAL_POD, Backend.HOST_VIP):
            lab.node.run("ip", "neigh", "flush", "dev", public.device)
            seen.reset()
            with connect(lab, client, public.vips[backend].get(family)):
                pass
            macs = {s.mac for s in seen.read() if s.destination == str(public.clients[client].get(family))}
            assert len(macs) == 1, f"{backend}: {macs}"
        assert lab.by_gateway.wrong_way() == 0
        status = json.loads(command.datapath(lab, tmp_path, "status", "--json").stdout)
        assert status["networks"][0]["steered"]["packets"] >= 4
