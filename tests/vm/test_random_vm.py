# SPDX-License-Identifier: Apache-2.0
"""A random sequence with VRFs: policies, sets, gateways and what others break; it ends as a fresh apply does.

What needs no VRF is drawn by `tests/netns/test_random_policies.py`, many times as much of it.

Left out on 6.12: each kind of change is there in the other files; this one looks for orders that nobody thought of, and
what they do wrong is the reconciler's, whose steps are the same for both.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from datapath.controller import Controller
from datapath.egress_sets import EgressSets, Verb
from datapath.policy import Policy, parse_policy
from datapath.reconcile.actual import Record
from datapath.service.healer import Healer
from datapath.state import StateDirectory
from tests.netns.fresh import converge, differences, normal
from tests.netns.nodes import inside
from tools.lab.dump import difference
from tools.lab.netns import Namespace, new_prefix, remove

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.one_kernel("6.1"),
    *(pytest.mark.kernel_feature(name) for name in ("dummy", "vrf")),
]

SEED = 20261121
POLICIES = 5
DEVICES = range(1, 5)
#: The last one is somebody else's, and there all the time.
VRFS = {"red": 1001, "blue": 1002, "given": 1003}


def said(text: str) -> None:
    """Shown with a failure: the same seed draws the same."""
    sys.stderr.write(f"{text}\n")


@pytest.mark.timeout(600)
def test_a_random_sequence_ends_as_a_fresh_apply_and_leaves_nothing(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    said(f"seed {SEED}")
    with _node() as node, _node() as twin, inside(node.name):
        empty = _dump(node)
        states = StateDirectory(tmp_path)
        controller = Controller(states)
        try:
            for number in range(POLICIES):
                text = _draw_policy(rng)
                said(f"--- {number}\n{text}")
                loaded = parse_policy(text.encode(), "random.yaml")
                controller.apply(loaded)
                _change_sets(rng, states, loaded.policy)
                _break_and_heal(rng, node, states)
            status = controller.status()
            assert status is not None
            reached = _dump(node)
            with inside(twin.name):
                converge(status.plan.settled, Record())
                assert differences(status.plan.settled) == []
            fresh = _dump(twin)
            assert (
                difference(*({k: normal(k, v) for k, v in dump.items()} for dump in (fresh, reached))) == ""
            )
        finally:
            controller.teardown()
        assert difference(empty, _dump(node)) == ""


@contextmanager
def _node() -> Iterator[Namespace]:
    """A namespace with devices that lead nowhere, and a VRF of somebody else."""
    namespace = Namespace(f"{new_prefix()}random")
    namespace.create()
    try:
        # Link-local addresses would come and go by themselves.
        namespace.sysctl({"net/ipv6/conf/default/addr_gen_mode": 1, "net/ipv4/ip_forward": 1})
        lines = [line for n in DEVICES for line in (f"link add eth{n} type dummy", f"link set eth{n} up")]
        namespace.ip([*lines, "link add given type vrf table 1003", "link set given up"])
        yield namespace
    finally:
        remove(namespace.name)


def _dump(namespace: Namespace) -> dict[str, str]:
    """By names: a VRF that was made later has another index."""
    names = ["all", "default", *(f"eth{n}" for n in DEVICES)]

    def sysctls() -> str:
        paths = [Path(f"/proc/sys/net/{f}/conf/{n}") for f in ("ipv4", "ipv6") for n in names]
        files = [file for path in paths for file in sorted(path.iterdir()) if file.name != "stable_secret"]
        files += [Path(f"/proc/sys/net/ipv4/{kind}_l3mdev_accept") for kind in ("tcp", "udp")]
        return "".join(f"{file} = {file.read_text()}" for file in files)

    links = namespace.run("ip", "-br", "link").splitlines()
    masters = namespace.run("ip", "-o", "link", "show", "type", "dummy").splitlines()
    return {
        "rules": namespace.run("ip", "-4", "-N", "rule") + namespace.run("ip", "-6", "-N", "rule"),
        # The kernel's own multicast routes stand in the order in which their devices went up last.
        "routes": "".join(
            line
            for family in (4, 6)
            for line in sorted(
                namespace.run("ip", f"-{family}", "-N", "route", "show", "table", "all").splitlines(
                    keepends=True
                )
            )
        ),
        "links": "\n".join(sorted(" ".join(link.split()[:2]) for link in links))
        + "".join(f"\n{line.split(': ')[1]} {line.partition(' master ')[2].split()[:1]}" for line in masters),
        "nft": namespace.run("nft", "-s", "list", "ruleset"),
        "sysctls": namespace.call(sysctls),
    }


# -- drawing ------------------------------------------------------------------------------------------


def _draw_policy(rng: random.Random) -> str:
    networks: list[dict[str, Any]] = []
    free = list(VRFS)
    for number in sorted(rng.sample(DEVICES, rng.randint(1, len(DEVICES)))):
        network = _draw_network(rng, number)
        if free and rng.random() < 0.6:
            # One with a way out in each VRF: its table has one default route.
            name = free.pop(rng.randrange(len(free)))
            network["vrf"] = {"name": name, "table": VRFS[name], "create": name != "given"}
            network.pop("table", None)
        networks.append(network)
    body = {
        "version": 1,
        "backend": "nft",
        "node": {"internal": ["172.16.0.0/12", "fd00::/8"]},
        "networks": networks,
        "egress": [_draw_egress(rng, networks, number) for number in range(rng.randint(0, 2))],
    }
    return str(yaml.safe_dump(body, sort_keys=False))


def _draw_network(rng: random.Random, number: int) -> dict[str, Any]:
    v4, v6 = f"10.{number}.0", f"2001:db8:{number}:"
    network: dict[str, Any] = {
        "name": rng.choice([f"n{number}", f"other-{number}"]),
        "interface": f"eth{number}",
        "vips": [f"{v4}.0/24", f"{v6}:/64"],
    }
    match rng.choice(["one", "several", "several", "external"]):
        case "one":
            network["gateway"] = [f"{v4}.1", rng.choice([f"{v6}:1", "fe80::1"])]
        case "several":
            stems = (f"{v4}.", f"{v6}:")
            network["gateways"] = [f"{stem}{n}" for stem in stems for n in range(1, rng.randint(2, 4))]
            network["gateway_mode"] = rng.choice(["ecmp", "active_standby"])
        case _:
            network |= {"routes": "external", "table": 5000 + number, "on_link": network["vips"]}
    if rng.random() < 0.4:
        network["isolate_clients"] = True
    return network


def _draw_egress(rng: random.Random, networks: list[dict[str, Any]], number: int) -> dict[str, Any]:
    network = rng.choice(networks)
    own = network["interface"].removeprefix("eth")
    addresses = [f"10.{own}.0.99", f"2001:db8:{own}::99"]
    return {
        "name": f"e{number}",
        "network": network["name"],
        "source_ip": rng.choice(["network", addresses]),
        "sources": [f"172.16.{number}.0/24", f"fd00:{number}::/64"],
        "set": rng.random() < 0.7,
    }


# -- what happens between two policies ----------------------------------------------------------------


def _change_sets(rng: random.Random, states: StateDirectory, policy: Policy) -> None:
    members = [f"172.17.0.{n}" for n in range(1, 4)] + [f"fd00:17::{n}" for n in range(1, 4)]
    for entry in policy.egress:
        if entry.set:
            EgressSets(states).change(entry.name, rng.choice(list(Verb)), rng.sample(members, 3))
    down = {
        network.name: tuple(rng.sample(network.gateway_addresses, 1))
        for network in policy.networks
        if network.gateways and rng.random() < 0.7
    }
    if down:
        said(f"down: {down}")
        _heal(states, down)


def _break_and_heal(rng: random.Random, node: Namespace, states: StateDirectory) -> None:
    """Somebody takes things of ours away; one look later they are back."""
    made = [name for name in ("red", "blue") if f" {name}: " in node.run("ip", "-o", "link")]
    slaves = [
        line.split(": ")[1]
        for line in node.run("ip", "-o", "link", "show", "type", "dummy").splitlines()
        if " master " in line
    ]
    damage = {
        "table": ["nft", "flush", "ruleset"],
        "rules": ["ip", f"-{rng.choice([4, 6])}", "rule", "flush", "protocol", "78"],
        "routes": ["ip", f"-{rng.choice([4, 6])}", "route", "flush", "table", "all", "proto", "78"],
        **({"VRF": ["ip", "link", "del", rng.choice(made)]} if made else {}),
        **({"device": ["ip", "link", "set", rng.choice(slaves), "nomaster"]} if slaves else {}),
    }
    for what in rng.sample(sorted(damage), 2):
        said(f"broken: {damage[what]}")
        node.run(*damage[what])
    _heal(states, None)


def _heal(states: StateDirectory, down: dict[str, Any] | None) -> None:
    healer = Healer(states)
    try:
        if down is not None:
            healer.set_down(down)
        look = healer.look()
    finally:
        healer.close()
    assert (look.failed, look.held, look.waiting, look.conflicts) == ((), (), (), ())
    status = Controller(states).status()
    assert status is not None
    assert [step.describe() for step in status.steps] == []
