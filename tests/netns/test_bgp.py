# SPDX-License-Identifier: Apache-2.0
"""FRR on the node and on the router: one learns the VIPs, the other the way back, and we live beside it."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lab import VIP_BACKENDS, Backend, Lab, command, network, probe_all, vlan_cells
from tools.lab.bgp import Frr, Speaker
from tools.lab.dump import difference, dump_namespace
from tools.lab.netns import LabError
from tools.lab.topology import FAMILIES, pair
from tools.lab.traffic import Transfer, ask_line, connect

pytestmark = [pytest.mark.root, pytest.mark.bpf]

TABLE = 1000
#: On no link: without BGP the router does not know where they are.
VIPS = {backend: pair(f"198.51.101.{i}", f"2001:db8:b00::{i}") for i, backend in enumerate(VIP_BACKENDS, 10)}
PUBLIC = dataclasses.replace(network(), vips=VIPS)
PREFIXES = ("198.51.101.0/24", "2001:db8:b00::/64")
ON_LINK = tuple(PUBLIC.prefixes.values())
NODE = pair("1.2.3.9", "2001:db8:100::9")
ROUTER = PUBLIC.gateway

ON_NODE = Speaker(64512, 64513, NODE, ROUTER, announced=tuple(VIPS.values()), table=TABLE)
ON_ROUTER = Speaker(64513, 64512, ROUTER, NODE, announces_default=True)


@dataclasses.dataclass
class Ground:
    """The lab with both speakers.

    Attributes:
        before: the node with FRR's routes and without a policy.
    """

    lab: Lab
    node: Frr
    router: Frr
    state: Path
    before: dict[str, str]

    def policy(self, extra: str = "") -> str:
        own, *_ = self.lab.policy().partition("networks:")
        vips, on_link = (", ".join(f'"{p}"' for p in prefixes) for prefixes in (PREFIXES, ON_LINK))
        return (
            f"{own}networks:\n  - name: {PUBLIC.name}\n    interface: {PUBLIC.device}\n    vips: [{vips}]\n"
            f"    table: {TABLE}\n    routes: external\n    on_link: [{on_link}]\n{extra}"
        )

    def established(self) -> None:
        """Wait until both sessions are up and all routes are where they belong."""
        for family in FAMILIES:
            self.node.wait_established(str(ROUTER.get(family)))
            self.node.wait(lambda: bool(self.learned(family)), "the table has a default route")  # noqa: B023
            self.router.wait(lambda: self.announced(family) == announced(family), "the VIPs are learned")  # noqa: B023

    def learned(self, family: int) -> list[str]:
        """BGP's routes in the network's table."""
        return routes(self.lab, "node", family, "table", str(TABLE), "proto", "bgp")

    def announced(self, family: int) -> set[str]:
        """What the router has learned."""
        found = routes(self.lab, "router", family, "proto", "bgp")
        return {line.partition("dst=")[2].partition(" ")[0] for line in found}

    def ours(self) -> list[str]:
        return [line for f in FAMILIES for line in routes(self.lab, "node", f, "table", "all", "proto", "78")]

    def faults(self) -> list[str]:
        results = probe_all(self.lab, vlan_cells(self.lab.networks))
        return [f"{r.cell}: {r.detail}" for r in results if not r.ok]

    def doctor(self) -> list[tuple[str, str]]:
        """Severity and text of what the doctor says about routes."""
        done = command.datapath(self.lab, self.state, "doctor", "--json")
        found = json.loads(done.stdout)["findings"]
        return [(item["severity"], item["seen"]) for item in found if item["check"] == "routes"]

    def drift(self) -> list[str]:
        done = command.datapath(self.lab, self.state, "status", "--json")
        drift: list[str] = json.loads(done.stdout)["drift"]
        return drift


def announced(family: int) -> set[str]:
    return {str(vip.get(family)) for vip in VIPS.values()}


def routes(lab: Lab, role: str, family: int, *selector: str) -> list[str]:
    # All tables at once: one without a route does not exist, and ip(8) calls that an error.
    table = selector[selector.index("table") + 1] if "table" in selector else "main"
    text = lab[role].run("ip", f"-{family}", "-j", "route", "show", "table", "all", *_without_table(selector))
    found = json.loads(text or "[]")
    return sorted(
        " ".join(
            f"{key}={route[key]}"
            for key in ("type", "dst", "gateway", "dev", "metric", "table")
            if key in route
        )
        for route in found
        if table in ("all", str(route.get("table", "main")))
    )


def _without_table(selector: tuple[str, ...]) -> list[str]:
    at = selector.index("table") if "table" in selector else len(selector)
    return [*selector[:at], *selector[at + 2 :]]


def settled(lab: Lab) -> dict[str, str]:
    """The node's state without the numbers of next hops, which zebra counts up."""
    dump = dump_namespace(lab.node)
    return {name: re.sub(r"(nhid|nh_info id) \d+", r"\1", text) for name, text in dump.items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """Both speakers with their sessions up; no policy."""
    with Lab(networks=[PUBLIC]) as lab:
        lab.node.ip([f"addr add {a}/{24 if a.version == 4 else 64} dev {PUBLIC.device}" for a in NODE])
        # The lab's own ways to the VIPs: here they come by BGP.
        lab["router"].ip([f"-{a.version} route del {a} dev br-vlan" for vip in VIPS.values() for a in vip])
        lab["client_vlan"].ip([f"-{a.version} route del {a} dev eth0" for vip in VIPS.values() for a in vip])
        with Frr(lab["router"], ON_ROUTER) as router, Frr(lab.node, ON_NODE) as node:
            ground = Ground(lab, node, router, tmp_path_factory.mktemp("state"), {})
            ground.established()
            ground.before = settled(lab)
            yield ground


def test_without_policy_the_router_knows_the_vips_and_answers_leave_elsewhere(bare: Ground) -> None:
    assert [bare.announced(f) for f in FAMILIES] == [announced(f) for f in FAMILIES]
    clients = [c for c in vlan_cells(bare.lab.networks) if c.client == "client"]
    assert not any(r.ok for r in probe_all(bare.lab, clients, seconds=0.4))


def test_a_table_that_others_fill_is_refused_unless_the_policy_says_so(bare: Ground, tmp_path: Path) -> None:
    policy = bare.policy().replace("routes: external", f'gateway: ["{ROUTER.v4}", "{ROUTER.v6}"]')
    with pytest.raises(LabError, match=rf"table {TABLE} holds a route of somebody else \(.* by BGP"):
        command.apply(bare.lab, tmp_path, policy)


@pytest.fixture(scope="module")
def ground(bare: Ground) -> Iterator[Ground]:
    """The same with the policy; at the end the node must be as FRR has it."""
    command.apply(bare.lab, bare.state, bare.policy())
    yield bare
    bare.established()
    command.teardown(bare.lab, bare.state)
    assert difference(bare.before, settled(bare.lab)) == ""


def test_every_cell_holds_by_the_learned_routes(ground: Ground) -> None:
    assert ground.faults() == []
    assert ground.lab.by_gateway.wrong_way() == 0
    assert ground.drift() == []
    ((severity, text),) = ground.doctor()
    assert (severity, text.rpartition(": ")[2]) == ("ok", "0.0.0.0/0 by BGP (FRR)")


def test_ours_is_no_gateway_only_neighbours_and_the_guard(ground: Ground) -> None:
    assert not any("gateway=" in line for line in ground.ours())
    assert sum(line.startswith("type=unreachable dst=default") for line in ground.ours()) == 2


@pytest.mark.parametrize("side", ["node", "router"])
def test_transfers_survive_a_reset_of_the_sessions(ground: Ground, side: str) -> None:
    ours = ground.ours()
    ground.lab.reset_counters()
    targets = [
        VIPS[b].get(f) for b in (Backend.LOCAL_POD, Backend.REMOTE_POD, Backend.HOST_VIP) for f in FAMILIES
    ]
    # TCP waits longer with each try, so nothing may come for twice as long as the sessions are down.
    transfers = [Transfer(ground.lab, "client", target, pause_s=0.02, seconds=60) for target in targets]
    speaker = ground.node if side == "node" else ground.router
    resets = count_resets(ground)
    for transfer in transfers:
        transfer.__enter__()
    try:
        speaker.tell("clear bgp *")
        ground.node.wait(lambda: count_resets(ground) >= resets + 2, "both sessions went down")
        ground.established()
        after = [transfer.turns for transfer in transfers]
        for transfer, turns in zip(transfers, after, strict=True):
            ground.node.wait(lambda t=transfer, n=turns: t.turns > n or t.error, "the transfer goes on")  # type: ignore[misc]
    finally:
        for transfer in transfers:
            transfer.__exit__(None, None, None)
    assert [transfer.error for transfer in transfers] == [None] * len(targets)
    assert ground.lab.wrong_way() == 0
    assert ground.ours() == ours
    assert ground.drift() == []


def count_resets(ground: Ground) -> int:
    """How often the sessions went down so far."""
    return sum(
        ground.node.ask(f"show bgp neighbors {address}")[str(address)]["connectionsDropped"]
        for address in ROUTER
    )


@pytest.fixture
def silent(ground: Ground) -> Iterator[Ground]:
    """The node's speaker is gone, and its routes with it; the router goes on sending to one VIP."""
    way = f"{VIPS[Backend.LOCAL_POD].v4} via {NODE.v4}"
    ground.node.stop("bgpd")
    try:
        ground.node.wait(lambda: not ground.learned(4) and not ground.learned(6), "its routes are gone")
        ground.lab["router"].ip([f"route replace {way}"])
        yield ground
    finally:
        ground.lab["router"].run("ip", "route", "flush", "proto", "boot", str(VIPS[Backend.LOCAL_POD].v4))
        ground.node.start("bgpd")
        ground.established()


@pytest.fixture
def conversation(ground: Ground) -> Iterator[socket.socket]:
    """A connection that was there before."""
    with connect(ground.lab, "client", VIPS[Backend.LOCAL_POD].v4, seconds=60) as sock:
        assert '"source"' in ask_line(sock, "who")
        yield sock
        # What was answered meanwhile is sent again, once there is a way.
        sock.settimeout(60)
        assert b'"source"' in sock.recv(4096)


def test_without_a_session_answers_are_refused_and_never_leave_elsewhere(
    conversation: socket.socket, silent: Ground
) -> None:
    ((severity, text),) = silent.doctor()
    assert (severity, f"table {TABLE} of network public" in text) == ("warn", True)
    silent.lab.reset_counters()
    conversation.sendall(b"who\n")
    conversation.settimeout(1.5)
    with pytest.raises(TimeoutError):
        conversation.recv(100)
    assert silent.lab.by_gateway.wrong_way() == 0
    assert silent.drift() == []


@pytest.mark.parametrize(
    ("kill", "options"),
    [(False, ()), (True, ()), (True, ("-r",))],
    ids=["ends", "killed", "killed-and-retains"],
)
def test_our_routes_survive_a_restart_of_zebra(ground: Ground, kill: bool, options: tuple[str, ...]) -> None:
    """A zebra that is killed leaves its routes; the next one sweeps what FRR left, next hops even with `-r`.

    The others are restarted with it, as watchfrr does.
    """
    ours = ground.ours()
    assert len(ours) == 5
    ground.node.stop("zebra", kill=kill)
    assert ground.ours() == ours
    ground.node.stop("bgpd", kill=kill)
    assert [bool(ground.learned(f)) for f in FAMILIES] == [kill] * 2
    ground.node.start("zebra", *options)
    ground.node.start("bgpd")
    ground.established()
    assert ground.ours() == ours
    assert ground.drift() == []
    assert ground.faults() == []


def test_frr_announces_none_of_our_routes(ground: Ground) -> None:
    for family in FAMILIES:
        found = ground.router.ask(f"show bgp ipv{family} unicast")["routes"]
        assert {prefix.partition("/")[0] for prefix in found if prefix[-2:] != "/0"} == announced(family)
