# SPDX-License-Identifier: Apache-2.0
"""Whatever somebody removes or changes of ours comes back, on the real kernel; the time is printed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath.kernel.bpf import attachments
from datapath.plan.tc import Hook
from tests.service.daemon import FIRST, SECOND, Daemon, Node, policy, wait_until
from tools.lab.dump import tcx_programs

pytestmark = [pytest.mark.root, pytest.mark.bpf]

_OTHER_PROGRAM = (
    "from datapath.kernel import bpf, tc; from datapath.plan.ingress import IngressProgram;"
    "loaded = bpf.load_ingress(IngressProgram(0x0ff00000)); tc.attach_filter('eth0', loaded.program_fd)"
)


def _our_table(node: Node) -> str:
    routes = node.ns.run("ip", "-4", "route", "show", "table", "all", "proto", "78")
    return next(line for line in routes.splitlines() if "eth0" in line).partition("table ")[2].split()[0]


def _link_flap(node: Node) -> None:
    node.ns.run("ip", "link", "set", "eth0", "down")
    node.ns.run("ip", "link", "set", "eth0", "up")


DRIFTS: dict[str, tuple[str, Callable[[Node], object]]] = {
    "ruleset flushed": ("nft", lambda node: node.ns.nft("flush ruleset")),
    "table deleted": ("nft", lambda node: node.ns.nft("delete table inet datapath")),
    "table flushed": ("nft", lambda node: node.ns.nft("flush table inet datapath")),
    "nft rule added": ("nft", lambda node: node.ns.nft("insert rule inet datapath prerouting accept")),
    "ip rule deleted": ("rule", lambda node: node.delete_rule(6)),
    "ip rules flushed": ("rule", lambda node: node.ns.run("ip", "rule", "flush", "protocol", "78")),
    "routes flushed": (
        "route",
        lambda node: node.ns.run("ip", "-4", "route", "flush", "table", _our_table(node)),
    ),
    "IPv6 route deleted": (
        "route",
        lambda node: node.ns.run("ip", "-6", "route", "del", "default", "table", _our_table(node)),
    ),
    "route replaced": (
        "route",
        lambda node: node.ns.run("ip", "route", "replace", "default", "dev", "lo", "table", _our_table(node)),
    ),
    "link down and up": ("route", _link_flap),
    "device gone and back": ("route", lambda node: node.replug_device("eth0")),
    "rp_filter on": ("sysctl", lambda node: node.ns.sysctl({"net/ipv4/conf/eth0/rp_filter": 1})),
}
EBPF_DRIFTS: dict[str, tuple[str, Callable[[Node], object]]] = {
    "qdisc removed": ("tc", lambda node: node.ns.run("tc", "qdisc", "del", "dev", "eth0", "clsact")),
    "all qdiscs removed": (
        "tc",
        lambda node: [node.ns.run("tc", "qdisc", "del", "dev", name, "clsact") for name in ("eth0", "eth1")],
    ),
    "filter removed": (
        "tc",
        lambda node: node.ns.run("tc", "filter", "del", "dev", "eth0", "ingress", "pref", "77"),
    ),
    "program replaced": ("tc", lambda node: node.ns.run(sys.executable, "-c", _OTHER_PROGRAM)),
    "device gone and back": ("tc", lambda node: node.replug_device("eth0")),
    "ruleset flushed": DRIFTS["ruleset flushed"],
}
_DETACH = "import sys; from datapath.kernel.bpf import attachments as a; a.detach(sys.argv[1])"
#: The kernel tells nobody when a tcx program goes.
TCX_DRIFTS: dict[str, tuple[str, Callable[[Node], object]]] = {
    "program detached": ("tc", lambda node: node.ns.run(sys.executable, "-c", _DETACH, "eth0")),
    "detached everywhere": (
        "tc",
        lambda node: [node.ns.run(sys.executable, "-c", _DETACH, name) for name in ("eth0", "eth1")],
    ),
    "device gone and back": ("tc", lambda node: node.replug_device("eth0")),
}


@pytest.fixture(scope="module", params=["nft", "ebpf", "tcx"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon of each backend that everything of this module drifts under; `ebpf` is attached by clsact."""
    node = Node(tmp_path_factory.mktemp("node"))
    node.policy.write_text(policy(FIRST, SECOND, backend="nft" if request.param == "nft" else "ebpf"))
    environment = {attachments.ENVIRONMENT: str(Hook.CLSACT)} if request.param == "ebpf" else {}
    with Daemon(node, environment=environment) as daemon:
        yield daemon.started()
    node.close()


def _heals(daemon: Daemon, name: str, kind: str, act: Callable[[Node], object]) -> None:
    node = daemon.node
    before, healed = node.snapshot(), len(daemon.events("drift_healed"))
    act(node)
    daemon.wait_for("drift_healed", healed + 1)
    wait_until(
        lambda: node.has(before), f"{name}: as before\n{before}\n{daemon.log_path.read_text()[-3000:]}"
    )
    events = daemon.events("drift_healed")[healed:]
    words = {
        "nft": "nft transaction",
        "rule": "add rule",
        "route": "route:",
        "sysctl": "set net",
        "tc": "eBPF",
    }
    assert any(words[kind] in step for event in events for step in event["steps"]), events
    sys.stdout.write(f"{name}: {events[0]['heal_ms']} ms, by {events[0].get('by')}\n")


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("served", ["nft"], indirect=True)
def test_drift_is_healed(served: Daemon, name: str) -> None:
    _heals(served, name, *DRIFTS[name])


@pytest.mark.parametrize("name", EBPF_DRIFTS)
@pytest.mark.parametrize("served", ["ebpf"], indirect=True)
def test_program_drift_is_healed(served: Daemon, name: str) -> None:
    _heals(served, name, *EBPF_DRIFTS[name])


@pytest.mark.kernel_feature("tcx")
@pytest.mark.parametrize("name", TCX_DRIFTS)
@pytest.mark.parametrize("served", ["tcx"], indirect=True)
def test_tcx_drift_is_healed(served: Daemon, name: str) -> None:
    _heals(served, name, *TCX_DRIFTS[name])


@pytest.fixture
def steering(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that steers at the device of the default routes, which has still to come."""
    node = Node(tmp_path)
    node.add_device("up0")
    node.add_device("up1")
    node.policy.write_text("steering: direct\n" + policy(FIRST, backend="ebpf"))
    with Daemon(node) as daemon:
        yield daemon.started()
    node.close()


def _steers_at(node: Node) -> set[str]:
    filters = "".join(
        f"{name} egress: {node.ns.run('tc', 'filter', 'show', 'dev', name, 'egress')}"
        for name in ("up0", "up1")
        if "datapath" in node.ns.run("tc", "filter", "show", "dev", name, "egress")
    )
    return set(re.findall(r"(\w+) egress:", node.ns.call(tcx_programs) + filters))


def test_egress_program_follows_the_default_routes_and_is_put_back(steering: Daemon) -> None:
    node = steering.node
    assert _steers_at(node) == set()
    node.ns.ip(["-4 route add default dev up0", "-6 route add default dev up0"])
    wait_until(lambda: _steers_at(node) == {"up0"}, "a default route came")
    node.ns.ip(["-4 route add default dev up1 metric 9"])
    wait_until(lambda: _steers_at(node) == {"up0", "up1"}, "a second one came")
    node.ns.ip(["-4 route del default dev up0", "-6 route replace default dev up1"])
    wait_until(lambda: _steers_at(node) == {"up1"}, "both moved")
    detach = "from datapath.plan.tc import Direction as D; from datapath.kernel.bpf import attachments as a;"
    node.ns.run(sys.executable, "-c", f"{detach} a.detach('up1', direction=D.EGRESS)")
    wait_until(lambda: _steers_at(node) == {"up1"}, "detached, and put back")


@pytest.mark.parametrize("served", ["nft"], indirect=True)
def test_who_did_it_is_named(served: Daemon) -> None:
    count = len(served.events("drift_healed"))
    served.node.ns.nft("delete table inet datapath")
    event = served.wait_for("drift_healed", count + 1)
    assert any(by.startswith("nft[") for by in event["by"])
    assert event["seen"]


@pytest.mark.parametrize("served", ["nft"], indirect=True)
def test_new_address_of_the_node_is_no_valid_source_any_more(served: Daemon) -> None:
    count = len(served.events("drift_healed"))
    served.node.ns.ip(["addr add 198.51.100.7/32 dev lo"])
    served.wait_for("drift_healed", count + 1)
    wait_until(lambda: "198.51.100.7" in served.node.snapshot()["table"], "the address is in the set")
    served.node.ns.ip(["addr del 198.51.100.7/32 dev lo"])
    wait_until(lambda: "198.51.100.7" not in served.node.snapshot()["table"], "and out of it again")


@pytest.mark.parametrize("served", ["nft"], indirect=True)
def test_missing_device_leaves_the_others_served(served: Daemon) -> None:
    node = served.node
    before = node.snapshot()
    waits = len(served.events("networks_waiting"))
    node.ns.ip(["link del eth0"])
    assert served.wait_for("networks_waiting", waits + 1)["networks"] == ["first"]
    heals = len(served.events("drift_healed"))
    node.ns.nft("flush ruleset")
    served.wait_for("drift_healed", heals + 1)
    assert "eth1" in node.ns.run("ip", "route", "show", "table", "all", "proto", "78")
    node.add_device("eth0")
    wait_until(lambda: node.has(before), "the device is back, and served as before")


@pytest.mark.parametrize("served", ["nft"], indirect=True)
def test_own_changes_wake_nobody(served: Daemon) -> None:
    """After a repair there is quiet: the daemon does not hear itself."""
    count = len(served.events("drift_healed"))
    served.node.ns.nft("flush ruleset")
    served.wait_for("drift_healed", count + 1)
    stat = Path(f"/proc/{served.process.pid}/stat")
    wait_until(lambda: served.node.snapshot()["table"], "healed")
    served.wait_for("drift_healed", count + 1)
    wait_until(lambda: stat.exists() and _is_quiet(served, 15), "quiet for fifteen glances")
    assert len(served.events("drift_healed")) == count + 1


def _is_quiet(daemon: Daemon, glances: int) -> bool:
    """Asleep, and no CPU time used, at every glance of a tenth of a second."""

    def used() -> list[str]:
        text = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2]
        return text.split()[11:13]

    first = used()
    for _ in range(glances):
        time.sleep(0.1)
        if used() != first:
            return False
    return True
