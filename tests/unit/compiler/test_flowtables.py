# SPDX-License-Identifier: Apache-2.0
"""What a flowtable of others makes of the table, and what nothing makes of it where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts, LinkFacts
from datapath.plan.model import NoteLevel, Plan
from datapath.policy import Policy

LINK = LinkFacts(name="eth1")
FLOWTABLES = ("inet firewall fast",)
SWAP = {"forward", "swap", "postrouting"}


def compiled(*flowtables: str, top: dict[str, Any] | None = None, **network: Any) -> Plan:
    body = {"name": "net", "interface": "eth1", "vips": ["192.0.2.0/24"], "gateway": "192.0.2.1"} | network
    policy = Policy.model_validate({"version": 1, "networks": [body]} | (top or {}))
    return compile_policy(policy, Facts(links=(LINK,), flowtables=flowtables))


def chains(plan: Plan) -> dict[str, list[str]]:
    return (
        {chain.name: [rule.text for rule in chain.rules] for chain in plan.table.chains} if plan.table else {}
    )


@pytest.mark.parametrize("top", [{}, {"backend": "nft"}, {"marks": {"mask": 0x4400}}])
def test_chains_are_there_for_a_flowtable_alone(top: dict[str, Any]) -> None:
    without, beside = chains(compiled(top=top)), chains(compiled(*FLOWTABLES, top=top))
    assert set(beside) - set(without) == SWAP
    assert {name: beside[name] for name in without} == without


def test_masks_are_those_of_the_policy() -> None:
    beside = chains(compiled(*FLOWTABLES, top={"marks": {"mask": 0x4400}}))
    assert beside["forward"] == ["ct mark & 0x00004400 != 0 goto swap"]
    assert beside["swap"] == ["ct direction original goto reply", "meta mark set meta mark & 0xffffbbff"]
    (unmark,) = beside["postrouting"]
    assert unmark.endswith("ct direction original meta mark set meta mark & 0xffffbbff")


@pytest.mark.parametrize(
    "network", [{"return_path": "none"}, {"gateway": []}, {"return_path": "source"}, {"steering": "direct"}]
)
def test_networks_without_marks_get_none(network: dict[str, Any]) -> None:
    assert not SWAP & set(chains(compiled(*FLOWTABLES, **network)))


@pytest.mark.parametrize(
    ("network", "warned"),
    [
        ({}, False),
        ({"return_path": "source"}, True),
        ({"steering": "direct"}, True),
        ({"return_path": "none"}, False),
    ],
)
def test_who_is_not_served_beside_a_flowtable_is_told(network: dict[str, Any], warned: bool) -> None:
    def warnings(plan: Plan) -> list[str]:
        return [
            note.text for note in plan.notes if note.level is NoteLevel.WARNING and "flowtable" in note.text
        ]

    assert bool(warnings(compiled(*FLOWTABLES, **network))) is warned
    assert warnings(compiled(**network)) == []
