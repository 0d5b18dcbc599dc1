# SPDX-License-Identifier: Apache-2.0
"""What `status` and `doctor` say about VRFs."""

from __future__ import annotations

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.observe.doctor_vrf import check_vrfs
from datapath.observe.status import Status, make_status
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family
from datapath.policy import parse_policy
from datapath.reconcile.actual import Actual, ActualLink, ForeignRule
from datapath.reconcile.diff import reconcile
from datapath.state import State

TEXT = """\
version: 1
networks:
  - name: a
    interface: eth1
    vips: [192.0.2.0/24]
    vrf: {name: red, table: 2}
"""
ETH1, RED = ActualLink("eth1", up=True, vrf="red"), ActualLink("red", up=True, kind="vrf", vrf_table=2)


def plan(text: str = TEXT) -> Plan:
    return compile_policy(parse_policy(text.encode(), "p.yaml").policy, Facts())


def actual(*links: ActualLink, rules: tuple[ForeignRule, ...] = ()) -> Actual:
    return Actual(links={link.name: link for link in links}, foreign_rules=rules)


def rule(
    priority: int, *, table: int = 0, is_l3mdev: bool = False, family: Family = Family.IPV4
) -> ForeignRule:
    return ForeignRule(family, priority, 0, 0, table, 2, "", is_l3mdev)


def status(node: Actual) -> Status:
    changes = reconcile(node, plan(), (state := State(policy=TEXT, policy_name="p.yaml")).record)
    return make_status(plan(), state, (), changes.waiting, {}, actual=node)


def test_status_names_the_vrf() -> None:
    found = status(actual(ETH1, RED))
    assert "eth1 (red)" in found.render()
    assert found.as_json()["networks"][0]["vrf"] == "red"
    assert found.drift == ()


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ((ActualLink("eth1", up=True),), ["there is no VRF red"]),
        ((ActualLink("eth1", up=True, vrf="black"), RED), ["eth1 belongs to VRF black"]),
        ((ETH1, ActualLink("red", up=True, kind="vrf", vrf_table=7)), ["red has table 7"]),
        ((ETH1, ActualLink("red", up=False, kind="vrf", vrf_table=2)), ["VRF red is down"]),
        ((RED,), ["device eth1 is missing or down"]),
        ((), ["there is no VRF red", "device eth1 is missing or down"]),
    ],
)
def test_status_says_what_is_wrong_with_a_vrf(links: tuple[ActualLink, ...], words: list[str]) -> None:
    drift = status(actual(*links)).drift
    assert len(drift) == len(words)
    assert all(word in text for word, text in zip(words, drift, strict=True))


def test_doctor() -> None:
    (well,) = check_vrfs(plan(), actual(ETH1, RED, rules=(rule(0, table=255), rule(1000, is_l3mdev=True))))
    assert (well.severity, "eth1 in red" in well.seen) == ("ok", True)
    moved = actual(ETH1, RED, rules=(rule(32765, table=255), rule(1000, is_l3mdev=True)))
    (late,) = check_vrfs(plan(), moved)
    assert (late.severity, "behind" in late.seen) == ("warn", True)
    (others,) = check_vrfs(plan(), actual(ETH1, RED, ActualLink("mgmt", up=True, kind="vrf", vrf_table=9)))
    assert (others.severity, "mgmt" in others.seen) == ("warn", True)
    quiet = plan(TEXT.replace("table: 2", "table: 2, host_sockets: false"))
    assert [item.severity for item in check_vrfs(quiet, moved)] == ["ok"]
    assert list(check_vrfs(Plan(0), moved)) == []


def test_doctor_compares_the_first_rules_of_one_family() -> None:
    ipv4 = (rule(100, table=255), rule(1000, is_l3mdev=True), rule(5000, table=255))
    by_vrf = rule(50, is_l3mdev=True, family=Family.IPV6)
    for priority, severity in ((0, "ok"), (60, "warn")):
        local = rule(priority, table=255, family=Family.IPV6)
        (found,) = check_vrfs(plan(), actual(ETH1, RED, rules=(*ipv4, local, by_vrf)))
        assert found.severity == severity
    assert "the IPv6 rule" in found.seen
    assert "`ip -6 rule add pref 0 table local`" in found.remedy
