# SPDX-License-Identifier: Apache-2.0
"""What is taken over from the policy before is what would have been read anew, and nothing else is."""

from __future__ import annotations

import pytest

from datapath.compiler import Compiler
from datapath.errors import PolicyError, Problem
from datapath.facts import Facts, LinkFacts
from datapath.policy import Policy, parse_policy
from datapath.policy.yamlfile import read_yaml

NETWORK = """  - name: {name}
    interface: eth{number}
    vips: [192.0.{number}.0/24]
    gateway: 192.0.{number}.1
"""
ONE = NETWORK.format(name="a", number=1)
TWO = NETWORK.format(name="b", number=2)


def parsed(*networks: str, top: str = "") -> Policy:
    return parse_policy(f"version: 1\n{top}networks:\n{''.join(networks)}".encode(), "p.yaml").policy


def fresh(*networks: str) -> Policy:
    """Without anything from before."""
    data = read_yaml(f"version: 1\nnetworks:\n{''.join(networks)}").data
    return Policy.model_validate(data)


def test_a_network_that_says_the_same_is_the_same() -> None:
    first = parsed(ONE)
    second = parsed(TWO, "  # moved\n", ONE)
    assert second.networks[1] is first.networks[0]
    assert second == fresh(TWO, ONE)
    assert parsed(TWO, ONE) is second
    assert parsed(TWO, ONE, top="backend: nft\n") is not second


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "    reverse_path: {vips: feasible}\n"),
        ("    strict_arp: true\n", "    strict_arp: false\n"),
        ("    on_link: [192.0.1.0/24]\n", "    on_link: [192.0.1.0/25]\n"),
    ],
)
def test_a_network_that_says_something_else_is_another(before: str, after: str) -> None:
    """Also where it only says a default aloud, which the compiler hears."""
    parsed(ONE + before)
    again, anew = parsed(ONE + after), fresh(ONE + after)
    assert again == anew
    assert again.networks[0].model_fields_set == anew.networks[0].model_fields_set


def test_a_value_of_another_type_is_not_taken_for_the_same() -> None:
    parsed(ONE + "    strict_arp: true\n")
    with pytest.raises(PolicyError, match="strict_arp"):
        parsed(ONE + "    strict_arp: 1\n")


def test_problems_come_again_and_with_the_positions_of_the_new_file() -> None:
    parsed(ONE)
    for lines in (0, 3):
        with pytest.raises(PolicyError) as caught:
            parsed("  #\n" * lines, ONE, ONE.replace("eth1", "eth3"))
        assert f"p.yaml:{lines + 7}:" in str(caught.value)
    # Wrong between the networks, and right again.
    assert parsed(ONE).networks[0].name == "a"


def test_a_text_that_is_known_tells_where_things_are() -> None:
    text = f"version: 1\nnetworks:\n{ONE}{TWO}".encode()
    for _ in range(2):
        parsed(TWO)
        anew, again = parse_policy(text, "p.yaml"), parse_policy(text, "q.yaml")
        assert again.policy is anew.policy
        assert again.source.text == anew.source.text
        for path in (("networks", 1), ("networks", 1, "vips", 0), ("networks", 0, "gateway"), ("version",)):
            assert again.source.locate(path) == anew.source.locate(path)
        assert str(again.source.error([Problem(("networks", 1, "name"), "is odd")])).startswith("q.yaml:7:")


def test_a_text_that_is_wrong_is_wrong_again() -> None:
    """Also where what was right before says the same otherwise, or was read in between."""
    wrong = ONE.replace("eth1", "eth3")
    for _ in range(2):
        parsed(ONE)
        for _ in range(2):
            with pytest.raises(PolicyError, match="name"):
                parsed(ONE, wrong)


def test_a_plan_is_of_its_policy_and_its_facts() -> None:
    compile_policy = Compiler().plan
    here, there = (Facts(links=(LinkFacts(name="eth1", up=up),), forwarding={4: up}) for up in (True, False))
    plain, aloud = parsed(ONE.replace("    gateway: 192.0.1.1\n", "")), None
    first = compile_policy(plain, here)
    assert compile_policy(plain, here.model_copy()) is first
    aloud = parsed(ONE.replace("    gateway: 192.0.1.1\n", "    reverse_path: {vips: feasible}\n"))
    # Equal for pydantic or not: what was said aloud decides whether sources are checked.
    assert compile_policy(aloud, here).ingress != first.ingress
    assert compile_policy(plain, here) == first
    assert compile_policy(plain, there).notes != first.notes
