# SPDX-License-Identifier: Apache-2.0
"""The chains of `backend: nft`: how many rules a packet meets, what is counted, and that nft takes them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.compiler.context import Context
from datapath.compiler.nft_ingress import PRIORITY, emit_classification
from datapath.facts import Facts
from datapath.kernel.sandbox import check_nft
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, Verdict, VipCheck
from datapath.plan.nft import CLASSIFY_CHAIN, Hook, NftTable
from datapath.plan.render import render_table
from datapath.policy import Policy


def policy(*reverse_paths: dict[str, Any], **network: Any) -> Policy:
    """One network on a device of its own for each of these source checks."""
    return Policy.model_validate(
        {
            "version": 1,
            "backend": "nft",
            "node": {"internal": ["10.96.0.0/12", "fd00:10:96::/112"]},
            "networks": [
                {
                    "name": f"net{n}",
                    "interface": f"eth{n}",
                    "vips": [f"198.51.{n}.0/24", f"2001:db8:{n}::/64"],
                    "gateway": [f"198.51.{n}.1", f"2001:db8:{n}::1"],
                    "reverse_path": reverse_path,
                }
                | network
                for n, reverse_path in enumerate(reverse_paths, start=1)
            ],
        }
    )


def table(wanted: Policy) -> NftTable:
    compiled = compile_policy(wanted, Facts()).table
    assert compiled is not None
    return compiled


def rules(wanted: NftTable, chain: str) -> list[str]:
    (found,) = [item for item in wanted.chains if item.name == chain]
    return [rule.text for rule in found.rules]


KINDS: list[dict[str, Any]] = [
    {},
    {"vips": "strict", "other": "loose"},
    {"vips": "off", "other": "off"},
    {"allow": ["10.97.0.0/16", "0.0.0.0/1", "::/1"], "deny": ["203.0.113.0/24", "2001:db8:ffff::/48"]},
]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_packet_meets_the_rules_of_its_own_network_only(count: int) -> None:
    one, many = table(policy({})), table(policy(*[{}] * count))
    assert rules(many, CLASSIFY_CHAIN) == ["iifname vmap @networks"]
    assert [item.name for item in many.chains if item.base and item.base.hook is Hook.PREROUTING] == [
        CLASSIFY_CHAIN,
        "prerouting",
    ]
    for number in range(1, count + 1):
        for chain in ("check", "vips", "pass"):
            assert len(rules(many, f"{chain}-net{number}")) == len(rules(one, f"{chain}-net1"))
    (networks,) = [item for item in many.maps if item.name == "networks"]
    assert dict(networks.elements) == {f'"eth{n}"': f"goto check-net{n}" for n in range(1, count + 1)}


def test_it_runs_between_reassembly_and_connection_tracking() -> None:
    (chain,) = [item for item in table(policy({})).chains if item.name == CLASSIFY_CHAIN]
    assert chain.base is not None
    assert chain.base.priority == PRIORITY
    assert -400 < PRIORITY < -200


@pytest.mark.parametrize("kind", KINDS)
def test_every_drop_is_counted_by_a_counter_that_exists(kind: dict[str, Any]) -> None:
    wanted = table(policy(kind))
    text = [rule.text for chain in wanted.chains for rule in chain.rules]
    named = [name for rule in text for name in re.findall(r'counter name "([^"]+)"', rule)]
    # With a gateway for both families every source of a request to a VIP can be answered: counted, and always 0.
    idle = {"net1.vip_unreachable", "net1.vip_strict"}
    assert set(named) <= set(wanted.counters) <= set(named) | idle
    assert all('counter name "net1.' in rule for rule in text if rule.endswith("drop"))
    assert sum(rule.endswith("drop") for rule in text) >= 4


def test_each_knob_has_its_own_drop() -> None:
    """What a policy switches off is not in the chains; what it switches on is."""

    def counted(**reverse_path: str) -> set[str]:
        return {name.removeprefix("net1.") for name in table(policy(reverse_path)).counters}

    always = {verdict.label for verdict in (Verdict.PASS, Verdict.MARTIAN, Verdict.SPOOFED)}
    assert counted(vips="off", other="off") == always
    assert counted(vips="feasible", other="off") == always | {Verdict.VIP_UNREACHABLE.label}
    assert counted(vips="strict", other="off") == always | {Verdict.VIP_STRICT.label}
    assert counted(vips="off", other="strict") == always | {Verdict.RPF_STRICT.label}
    assert counted(vips="off", other="loose") == always | {Verdict.RPF_LOOSE.label}


def test_a_network_without_checks_has_no_rules_to_check() -> None:
    unchecked = IngressNetwork("plain", 1, 0x10000, IngressPoint("eth1"), "eth1")
    checked = IngressNetwork("strict", 2, 0, IngressPoint("eth2"), "eth2", vip_check=VipCheck.STRICT)
    context = Context(policy({}), Facts(), 0x0FFF0000, ())
    emitted = emit_classification(context, IngressProgram(0x0FFF0000, (unchecked, checked)))
    chains = {chain.name: [rule.text for rule in chain.rules] for chain in emitted.chains}
    assert chains["check-plain"] == ["goto pass-plain"]
    assert "vips-plain" not in chains
    assert len(chains["check-strict"]) > 1
    assert "vips-strict" in chains
    assert emitted.counters == ("plain.pass", "strict.pass", "strict.vip_strict")
    # A network without a mark must leave those of others alone.
    assert "mark" not in "".join(chains["pass-strict"])
    assert chains["pass-plain"] == [
        'counter name "plain.pass" meta mark set meta mark & 0xf000ffff | 0x00010000'
    ]


@pytest.mark.root
@pytest.mark.parametrize("network", [{}, {"return_path": "none"}, {"return_path": "source"}])
def test_nft_takes_it(network: dict[str, Any]) -> None:
    check_nft(render_table(table(policy(*KINDS, **network))))
