# SPDX-License-Identifier: Apache-2.0
"""What `accelerate` makes of the table: which connections, which devices, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.errors import PolicyError
from datapath.facts import Facts
from datapath.plan.model import NoteLevel, Plan
from datapath.plan.nft import NftTable
from datapath.plan.render import DEVICES_PER_COMMAND, render_table
from datapath.policy import Policy, parse_policy
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.nft import as_actual, diff_table
from datapath.reconcile.steps import NftTransaction

SPEC = "inet datapath"
LINKS = (
    {"name": "eth0", "addresses": ["192.168.1.10/24"]},
    {"name": "eth1"},
    {"name": "cni0", "kind": "bridge", "addresses": ["10.112.1.1/24"]},
    {"name": "virbr0", "kind": "bridge", "addresses": ["192.168.122.1/24"]},
    {"name": "bond0.7", "kind": "vlan", "parent": "bond0"},
    {"name": "bond0"},
)


def facts(**more: Any) -> Facts:
    return Facts.model_validate({"links": LINKS, "default_devices": {4: ("eth0",)}} | more)


def compiled(*networks: dict[str, Any], known: Facts | None = None, **top: Any) -> Plan:
    bodies = [
        {
            "name": f"net{number}",
            "interface": "eth1",
            "vips": [f"192.0.{number}.0/24"],
            "gateway": f"192.0.{number}.1",
        }
        | body
        for number, body in enumerate(networks)
    ]
    policy = Policy.model_validate(
        {"version": 1, "node": {"internal": ["10.112.0.0/12"]}, "networks": bodies} | top
    )
    return compile_policy(policy, known or facts())


def table_of(plan: Plan) -> NftTable:
    assert plan.table is not None
    return plan.table


def marks(plan: Plan) -> set[str]:
    return {key for item in table_of(plan).maps if item.name == "accelerated" for key, _ in item.elements}


def devices(plan: Plan) -> tuple[str, ...]:
    (flowtable,) = table_of(plan).flowtables
    return flowtable.devices


def test_nothing_of_it_is_there_unless_it_is_asked_for() -> None:
    table = table_of(compiled({}))
    assert not table.flowtables
    assert not {"accelerate", "carry", "forward", "swap"} & {chain.name for chain in table.chains}


def test_both_ways_are_looked_up_with_their_marks() -> None:
    chains = {chain.name for chain in table_of(compiled({}, accelerate=True)).chains}
    assert {"accelerate", "carry", "forward", "swap", "postrouting"} <= chains


@pytest.mark.parametrize(
    ("default", "own", "expected"),
    [(False, None, 0), (True, None, 2), (True, False, 1), (False, True, 1), (True, True, 2)],
)
def test_a_network_overrides_the_file(default: bool, own: bool | None, expected: int) -> None:
    first = {} if own is None else {"accelerate": own}
    plan = compiled(first, {"interface": "eth2"}, accelerate=default)
    assert len(marks(plan) if table_of(plan).flowtables else ()) == expected


def test_connections_that_leave_by_an_accelerated_network_are_meant_too() -> None:
    entry = {
        "name": "web",
        "network": "net0",
        "sources": ["10.112.1.0/24"],
        "source_ip": {"loadBalancer": "192.0.0.7"},
    }
    entry["source_ip"] = "192.0.0.7"
    plan = compiled({}, accelerate=True, egress=[entry])
    assert len(marks(plan)) == 2


def test_devices_are_those_of_requests_of_answers_from_afar_and_of_pods_here() -> None:
    assert devices(compiled({}, accelerate=True)) == ("cni0", "eth0", "eth1")
    vlan = {"interface": None, "vlan": {"parent": "eth5", "id": 5}}
    assert devices(compiled(vlan, accelerate=True)) == ("cni0", "eth0", "eth5", "eth5.5")
    assert devices(compiled({"interface": "bond0.7"}, accelerate=True)) == (
        "bond0",
        "bond0.7",
        "cni0",
        "eth0",
    )


def test_tunnels_are_left_out_by_rules_that_a_device_without_a_kind_passes() -> None:
    (carry,) = (chain for chain in table_of(compiled({}, accelerate=True)).chains if chain.name == "carry")
    first, second, last = (rule.text for rule in carry.rules)
    assert first.startswith("meta iifkind {")
    assert second.startswith("meta oifkind {")
    assert last == "flow add @fast"


def test_behind_the_checks_of_nftables_the_flowtable_changes_with_them() -> None:
    names = [
        table_of(compiled(body, accelerate=True, backend="nft")).flowtables[0].name
        for body in ({}, {"reverse_path": {"deny": ["198.51.100.0/24"]}}, {})
    ]
    assert names[0] == names[2] != names[1]
    assert table_of(compiled({}, accelerate=True)).flowtables[0].name == "fast"


def test_a_kernel_without_flowtables_serves_everything_else_and_a_person_is_told() -> None:
    plan = compiled({}, accelerate=True, known=facts(flowtables_refused="No such file or directory"))
    assert plan.table == compiled({}).table
    (problem,) = plan.refusals
    assert problem.path == ("accelerate",)
    assert "No such file or directory" in problem.message
    assert any(note.level is NoteLevel.WARNING and "flowtables" in note.text for note in plan.notes)
    own = compiled({}, {"interface": "eth2", "accelerate": True}, known=facts(flowtables_refused="no"))
    assert [problem.path for problem in own.refusals] == [("networks", 1, "accelerate")]
    assert not compiled({}, known=facts(flowtables_refused="no")).refusals


def test_connections_come_back_before_they_move_to_another_zone() -> None:
    before = compiled({}, accelerate=True)
    known = facts(
        ids=[
            {"name": ids.name, "fwmark": ids.fwmark, "table": ids.table, "slot": ids.slot}
            for ids in before.ids
        ],
        fwmark_mask=before.fwmark_mask,
        previous_mask=before.fwmark_mask,
        previous_ids=[
            {"name": ids.name, "fwmark": ids.fwmark, "table": ids.table, "slot": ids.slot}
            for ids in before.ids
        ],
    )
    plan = compiled({"isolate_clients": True}, accelerate=True, known=known)
    assert plan.transition is not None
    assert plan.holding is not None
    assert plan.zone_changes
    assert not plan.transition.flowtables
    assert not plan.holding.flowtables
    assert table_of(plan).flowtables


# -- carried out ----------------------------------------------------------------------------------


def transactions(plan: Plan, *names: str, before: NftTable | None = None) -> list[str]:
    links = {name: ActualLink(name, up=True) for name in names}
    actual = Actual(
        links=links,
        table=as_actual(before) if before else None,
        rules=plan.rule_set,
        routes=plan.route_set,
        fwmark_mask=plan.fwmark_mask if before else 0,
    )
    return [step.text for step in reconcile(actual, plan, Record()).steps if isinstance(step, NftTransaction)]


def test_a_device_that_is_not_there_is_not_asked_for() -> None:
    (text,) = transactions(compiled({}, accelerate=True), "eth0", "eth1")
    assert 'devices = { "eth0", "eth1" };' in text
    assert "cni0" not in text


def test_a_device_that_the_change_makes_comes_once_it_is_there() -> None:
    plan = compiled({"interface": None, "vlan": {"parent": "eth0", "id": 5}}, accelerate=True)
    first, then = transactions(plan, "eth0")
    assert 'devices = { "eth0" };' in first
    assert then.startswith("add flowtable inet datapath fast {")
    assert 'devices = { "eth0.5" };' in then
    assert then.count("\n") == 1


def test_devices_come_and_go_one_by_one() -> None:
    plan = compiled({}, accelerate=True)
    table = table_of(plan)
    assert diff_table(as_actual(table), table, spec=SPEC) == ""
    narrow = table_of(compiled({}, accelerate=True, known=facts(default_devices={4: ("eth9",)})))
    text = diff_table(as_actual(narrow), table, spec=SPEC)
    assert text.splitlines() == [
        'delete flowtable inet datapath fast { hook ingress priority 0; counter; devices = { "eth9" }; }',
        'add flowtable inet datapath fast { hook ingress priority 0; counter; devices = { "eth0" }; }',
    ]


def test_a_flowtable_goes_after_the_rules_that_speak_of_it() -> None:
    lines = diff_table(
        as_actual(table_of(compiled({}, accelerate=True))), table_of(compiled({})), spec=SPEC
    ).splitlines()
    assert lines.index("flush chain inet datapath carry") < lines.index("delete flowtable inet datapath fast")


def test_the_kernel_takes_so_many_devices_at_once() -> None:
    vlans = [{"interface": None, "vlan": {"parent": "eth0", "id": number + 1}} for number in range(200)]
    text = render_table(table_of(compiled(*vlans, accelerate=True)))
    lines = [line for line in text.splitlines() if line.startswith("add flowtable")]
    assert max(line.count('"') // 2 for line in lines) == DEVICES_PER_COMMAND
    assert sum(line.count('"') // 2 for line in lines) == 202


# -- refused as it is read ------------------------------------------------------------------------

POLICY = """\
version: 1
{top}
networks:
  - name: public
    interface: eth1
    vips: [192.0.2.0/24]
{body}
"""
GATEWAY = "    gateway: 192.0.2.1\n"


@pytest.mark.parametrize(
    ("top", "body", "line", "words"),
    [
        ("accelerate: true", f"{GATEWAY}    return_path: source", 8, "keeps no mark"),
        ("accelerate: true", f"{GATEWAY}    track: last", 8, "every packet"),
        ("accelerate: true", f"{GATEWAY}    steering: direct", 8, "keeps no mark"),
        ("steering: direct", f"{GATEWAY}    accelerate: true", 4, "keeps no mark"),
        ("", "    accelerate: true", 7, "nothing to accelerate"),
        ("", f"{GATEWAY}    return_path: none\n    accelerate: true", 9, "nothing to accelerate"),
    ],
)
def test_what_cannot_work_is_refused_where_it_stands(top: str, body: str, line: int, words: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(POLICY.format(top=top, body=body).encode(), "p.yaml")
    assert f"p.yaml:{line}:" in str(refused.value)
    assert words in str(refused.value)
    assert "hint: " in str(refused.value)


@pytest.mark.parametrize(
    "body", ["", f"{GATEWAY}    return_path: none", f"{GATEWAY}    track: last\n    accelerate: false"]
)
def test_a_network_that_needs_nothing_does_not_stand_in_the_way_of_the_others(body: str) -> None:
    parse_policy(POLICY.format(top="accelerate: true", body=body).encode(), "p.yaml")
