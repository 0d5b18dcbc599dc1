# SPDX-License-Identifier: Apache-2.0
"""Who remembers what a dump meant sees every drift that one sees who takes all of it apart, each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from datapath.controller import Controller, Drift
from datapath.errors import DatapathError
from datapath.facts import Facts
from datapath.kernel import recall, rtnl
from datapath.kernel.bpf import attachments
from datapath.kernel.observer import Sight
from datapath.plan.tc import Hook
from datapath.policy import LoadedPolicy, parse_policy
from datapath.reconcile.unchanged import Unchanged
from datapath.state import StateDirectory
from tests.netns.nodes import inside
from tests.service.daemon import FIRST, SECOND, Node, policy, wait_until
from tests.service.test_drift import DRIFTS, EBPF_DRIFTS, TCX_DRIFTS

pytestmark = [pytest.mark.root, pytest.mark.bpf]

#: What others do, which is nothing to heal; or something that is refused.
_OTHERS: Final[dict[str, Callable[[Node], object]]] = {
    "rule of others": lambda node: node.ns.run(
        "ip", "rule", "add", "pref", "77", "fwmark", "7", "lookup", "99"
    ),
    "address added": lambda node: node.ns.run("ip", "address", "add", "192.0.2.1/24", "dev", "eth1"),
    "device added": lambda node: node.add_device("eth7"),
    "device renamed": lambda node: node.ns.ip(["link set p-eth1 down", "link set p-eth1 name other"]),
    "names exchanged": lambda node: node.ns.ip(
        [
            "link set p-eth0 down",
            "link set p-eth1 down",
            "link set p-eth0 name tmp",
            "link set p-eth1 name p-eth0",
            "link set tmp name p-eth1",
        ]
    ),
    "mtu changed": lambda node: node.ns.run("ip", "link", "set", "eth0", "mtu", "1400"),
    "device down": lambda node: node.ns.run("ip", "link", "set", "eth1", "down"),
    "port of a bridge": lambda node: node.ns.ip(["link add br0 type bridge", "link set p-eth0 master br0"]),
    "rp_filter of others": lambda node: node.ns.sysctl({"net/ipv4/conf/p-eth0/rp_filter": 2}),
}
_KINDS: Final = [
    (backend, name, act)
    for backend, drifts in (("nft", DRIFTS), ("ebpf", EBPF_DRIFTS), ("tcx", TCX_DRIFTS))
    for name, (_, act) in drifts.items()
] + [("ebpf", name, act) for name, act in _OTHERS.items()]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    with inside(made.ns.name):
        yield made
    made.close()


def _loaded(backend: str) -> LoadedPolicy:
    text = policy(FIRST, SECOND, backend="nft" if backend == "nft" else "ebpf")
    return parse_policy(text.encode(), "policy.yaml")


def _seen(controller: Controller, loaded: LoadedPolicy) -> tuple[Drift | str, Facts]:
    """What an apply would do, or why it is refused."""
    try:
        found: Drift | str = controller.preview(loaded)
    except DatapathError as error:
        found = str(error)
    return found, controller.facts()


def _seen_afresh(controller: Controller, loaded: LoadedPolicy) -> tuple[Drift | str, Facts]:
    """As who remembers nothing, and what is remembered stays as it is."""
    with pytest.MonkeyPatch.context() as patched:
        for memory in (recall.Recall, recall.SetRecall, Unchanged):
            patched.setattr(memory, "of", lambda *_: None)
            patched.setattr(memory, "keep", lambda *_: None)
        patched.setattr(Unchanged, "forget", lambda _: None)
        return _seen(controller, loaded)


@pytest.mark.kernel_feature("tcx")
@pytest.mark.parametrize(("backend", "name", "act"), _KINDS, ids=[f"{kind[0]}: {kind[1]}" for kind in _KINDS])
def test_every_drift_is_seen(
    served: Node, monkeypatch: pytest.MonkeyPatch, backend: str, name: str, act: Callable[[Node], object]
) -> None:
    if backend == "ebpf":
        monkeypatch.setenv(attachments.ENVIRONMENT, str(Hook.CLSACT))
    controller, loaded = Controller(StateDirectory(served.state)), _loaded(backend)
    controller.apply(loaded)
    for _ in range(2):
        assert controller.apply(loaded).steps == ()
    before = _seen(controller, loaded)
    act(served)
    # Addresses of a device that went and came follow by themselves, maybe between the two looks.
    wait_until(
        lambda: _seen(controller, loaded) == _seen_afresh(controller, loaded),
        "what was remembered is out of date",
    )
    seen = _seen(controller, loaded)
    assert seen != before
    assert isinstance(seen[0], str) or seen[0].steps or name in _OTHERS


def test_a_look_without_change_takes_nothing_apart(served: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, loaded = Controller(StateDirectory(served.state)), _loaded("ebpf")
    plan = controller.apply(loaded).plan
    controller.apply(loaded)
    monkeypatch.setattr(rtnl, "RouteDecoder", None)
    monkeypatch.setattr(rtnl, "RuleDecoder", None)
    assert controller.apply(loaded).steps == ()
    sight = Sight()
    assert sight.routes() == plan.route_set
    served.delete_rule(6)
    with pytest.raises(TypeError):
        sight.rules()


def test_what_nobody_keeps_is_not_remembered() -> None:
    known: recall.SetRecall[int] = recall.SetRecall()
    some = frozenset({1, 2})
    known.keep(b"digest", some)
    desired = frozenset([2, 1])
    assert known.shared(some, desired) is desired
    del some
    assert known.of(b"digest") is desired
    assert known.of(b"other") is known.of(b"") is known.of(b"digest", given="more") is None
    del desired
    assert known.of(b"digest") is None


@pytest.mark.parametrize("found", [{1, 2}, {1, 2, 3}, {1}, {3, 4}, set(), {1, 3}])
def test_of_two_equal_items_the_plan_s_is_taken(found: set[int]) -> None:
    known: recall.SetRecall[IPv4Address] = recall.SetRecall()
    desired, read = (frozenset(map(IPv4Address, numbers)) for numbers in ({1, 2}, found))
    shared = known.shared(read, desired)
    assert shared == read
    assert {id(item) for item in shared if item in desired} <= {id(item) for item in desired}
    assert (shared is desired) == (read == desired)
