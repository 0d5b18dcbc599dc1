# SPDX-License-Identifier: Apache-2.0
"""How `make test-systemd` counts and judges: without a machine, because a lane that cannot fail shows nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

from datapath.plan.rtnl import ROUTE_PROTOCOL
from datapath.policy import parse_policy
from tools.deb import steps, topology
from tools.deb.steps import REPAIRED_MS, Step
from tools.deb.traffic import INTERVAL_S, Request, figures
from tools.deb.vm import table

_GOOD: Final = {"sent": 100, "lost": 0, "stuck": 0, "outage_ms": 0}
_RULE: Final = "add rule: -4 priority 10005 from all nop protocol 78"
_HARMLESS: Final = Step("harmless", lambda: None, event="service_started")
_BREAKS: Final = Step("breaks", lambda: None, breaks=True)


def _requests(flow: str, answers: str, *, saved: bool = False) -> list[Request]:
    """`+` for an answered request, `-` for a lost one."""
    return [
        Request(
            flow, number * INTERVAL_S, number * INTERVAL_S if answer == "+" else None, saved and answer == "-"
        )
        for number, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "lost", "outage_ms"),
    [
        ("+++++", 0, 0),
        ("++-++", 1, 250),
        ("-++--", 3, 500),
        ("+--+---+", 5, 750),
        ("-----", 5, 1250),
        ("", 0, 0),
    ],
)
def test_an_outage_is_the_longest_time_without_an_answer(answers: str, lost: int, outage_ms: int) -> None:
    seen = figures(_requests("a IPv4 node kept", answers))
    assert seen == {"sent": len(answers), "lost": lost, "stuck": 0, "outage_ms": outage_ms}


def test_the_worst_flow_counts_whatever_the_others_do() -> None:
    requests = _requests("a IPv4 node kept", "--+++") + _requests("a IPv6 pod kept", "+---+")
    assert figures(requests) == {"sent": 10, "lost": 5, "stuck": 0, "outage_ms": 750}


def test_a_new_connection_is_stuck_where_no_repeat_was_answered() -> None:
    assert figures(_requests("a IPv4 pod new", "+-+"))["stuck"] == 1
    assert figures(_requests("a IPv4 pod new", "+-+", saved=True))["stuck"] == 0


def _problems(
    step: Step, *, repaired: tuple[str, ...] = (), healthy: bool = True, wrong_way: int = 0, **seen: int
) -> list[str]:
    return step.problems(
        {**_GOOD, **seen}, repaired=repaired, events={"service_started"}, healthy=healthy, wrong_way=wrong_way
    )


def test_what_may_cost_nothing() -> None:
    assert _problems(_HARMLESS) == []
    assert _problems(_HARMLESS, lost=1)
    assert _problems(_HARMLESS, wrong_way=1)
    assert _problems(_HARMLESS, repaired=(_RULE,))
    assert _problems(_HARMLESS, repaired=("eBPF program for 1 network(s) on eth0",)) == []
    assert _problems(_HARMLESS, healthy=False)
    assert _problems(_HARMLESS, sent=0)
    assert _problems(Step("nothing came of it", lambda: None, event="policy_in_force"))


def test_what_must_be_repaired() -> None:
    assert _problems(_BREAKS, repaired=(_RULE,), outage_ms=REPAIRED_MS, lost=9, wrong_way=9) == []
    assert _problems(_BREAKS, repaired=(_RULE,), outage_ms=REPAIRED_MS + 1, lost=9, wrong_way=9)
    assert _problems(_BREAKS, repaired=())
    assert _problems(_BREAKS, repaired=(_RULE,), stuck=1)
    assert _problems(_BREAKS, repaired=(_RULE,), healthy=False)


def test_the_node_has_a_policy_that_loads() -> None:
    loaded = parse_policy(topology.policy().encode(), "policy.yaml")
    assert [network.name for network in loaded.policy.networks] == [site.name for site in topology.SITES]


@pytest.mark.root
def test_the_services_of_the_node_load(tmp_path: Path) -> None:
    conf = tmp_path / "nftables.conf"
    conf.write_text(topology.nftables_conf(), encoding="utf-8")
    # In a namespace of its own: the file begins with a flush, even where it is only checked.
    done = subprocess.run(
        ["unshare", "--net", "nft", "--check", "--file", str(conf)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_protocol_is_that_of_the_product() -> None:
    assert str(ROUTE_PROTOCOL) == steps.PROTOCOL


def test_the_table_has_a_line_for_every_step() -> None:
    told = [
        {"step": "restart", "good": True, "limit": "0 lost", **_GOOD},
        {"check": "order at boot", "good": True},
        {"step": "stop", "good": False, "limit": "0 lost", **_GOOD, "lost": 7},
    ]
    lines = table(told).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["restart", "stop"]
    assert [line.split()[-1] for line in lines[1:]] == ["ok", "FAIL"]
    assert "7" in lines[2].split()
