# SPDX-License-Identifier: Apache-2.0
"""Whatever was compiled before, the plan is the one that is compiled from nothing."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_interface
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from datapath.compiler import Compiler, compile_policy, kept
from datapath.compiler.kept import Merged
from datapath.errors import CompileError, PolicyError
from datapath.facts import Facts, IdFacts, LinkFacts
from datapath.plan.model import Plan
from datapath.policy import Policy, parse_policy

NUMBERS = range(1, 6)


def network(number: int, option: str) -> str:
    """One network; its VIPs and its gateways stay the same where the option says nothing of them."""
    gateway = f"gateway: [10.{number}.0.1, '2001:db8:{number}::1']"
    options = {
        "plain": gateway,
        "no gateway": "strict_arp: false",
        "IPv4 gateway": f"gateway: [10.{number}.0.1]",
        "arp": f"{gateway}, strict_arp: true",
        "source": f"{gateway}, return_path: source",
        "direct": f"{gateway}, steering: direct",
        "isolated": f"{gateway}, isolate_clients: true",
        "pinned": f"{gateway}, table: {800 + number}",
        "denied": f"{gateway}, reverse_path: {{deny: [10.{number}.0.64/26]}}",
        "vrf": f"{gateway}, vrf: {{name: vrf{number % 2}, table: {900 + number % 2}, create: true}}",
        "gateways": f"gateways: [10.{number}.0.1, 10.{number}.0.2], gateway_check: {{}}",
    }
    vips = f"[10.{number}.0.0/24, '2001:db8:{number}::/64']"
    if option == "one address":
        # As the device's own: of two sources with one prefix the first counts.
        vips, options[option] = (
            f"[10.{number}.0.9/32]",
            f"gateway: 10.{number}.0.1, on_link: [10.{number}.0.0/24]",
        )
    return f"- {{name: n{number}, interface: eth{number}, vips: {vips}, {options[option]}}}"


OPTIONS = (
    "plain",
    "plain",
    "no gateway",
    "IPv4 gateway",
    "arp",
    "source",
    "direct",
    "isolated",
    "pinned",
    "denied",
    "vrf",
    "gateways",
    "one address",
)
#: What may be changed, one thing at a time, and what it is at first.
CHANGES: dict[str, tuple[Any, ...]] = {
    "order": ((1, 2, 3, 4, 5), (1, 2, 3, 4), (5, 4, 3, 2, 1), (3, 5, 1)),
    "backend": ("ebpf", "nft"),
    "steering": ("rules", "direct"),
    "mask": ("0x0fff0000", "0xff00"),
    "internal": ("172.16.0.0/12", "172.16.0.0/12, 'fd00::/16'"),
    "egress": (False, True),
    "ipv6": (True, False),
    "down": ((), (1,), (1, 2)),
    "ids": ("in force", "lost"),
    **{f"option {number}": OPTIONS for number in NUMBERS},
    **{f"address {number}": (".9/24", ".8/24", ".9/32", None) for number in NUMBERS},
}
CHANGE = st.one_of(*(st.tuples(st.just(key), st.sampled_from(values)) for key, values in CHANGES.items()))


def policy(drawn: dict[str, Any]) -> str:
    lines = [
        "version: 1",
        f"backend: {drawn['backend']}",
        f"steering: {drawn['steering']}",
        f"marks: {{mask: {drawn['mask']}}}",
        f"node: {{internal: [{drawn['internal']}]}}",
        "networks:",
        *(network(number, drawn[f"option {number}"]) for number in drawn["order"]),
    ]
    if drawn["egress"]:
        lines.append(
            f"egress: [{{name: e, network: n{drawn['order'][0]}, sources: [172.16.9.0/24], source_ip: 192.0.2.7}}]"
        )
    return "\n".join(lines)


def host(drawn: dict[str, Any], plan: Plan | None) -> Facts:
    """A host on which that plan is in force."""
    links = [LinkFacts(name="eth0", mtu=1500)]
    for number in NUMBERS:
        if address := drawn[f"address {number}"]:
            addresses = (ip_interface(f"10.{number}.0{address}"), ip_interface(f"2001:db8:{number}::9/64"))
            links.append(LinkFacts(name=f"eth{number}", mtu=1500, addresses=addresses))
    known = plan if drawn["ids"] == "in force" else None
    ids = tuple(
        IdFacts(name=item.name, fwmark=item.fwmark, table=item.own_table, slot=item.slot, zone=item.zone)
        for item in (known.ids if known else ())
    )
    return Facts(
        links=tuple(links),
        ids=ids,
        previous_ids=ids,
        fwmark_mask=known.fwmark_mask if known else 0,
        previous_mask=known.fwmark_mask if known else 0,
        rule_bank=0 if known else None,
        default_devices={4: ("eth0",), 6: ("eth0",)},
        ipv6=drawn["ipv6"],
        gateways_down={f"n{number}": (ip_interface(f"10.{number}.0.1").ip,) for number in drawn["down"]},
    )


def result(compiled: Any, policy: Policy, facts: Facts) -> Plan | str:
    try:
        plan = compiled(policy, facts)
    except CompileError as error:
        return repr(error.problems)
    assert isinstance(plan, Plan)
    return plan


AT_FIRST = {key: values[0] for key, values in CHANGES.items()}
OF_NETWORKS = st.fixed_dictionaries({f"option {number}": st.sampled_from(OPTIONS) for number in NUMBERS})


def follow(begin: dict[str, Any], changes: list[tuple[str, Any]]) -> int:
    """Compile after each change, with and without what was compiled before; how often there was a policy to compile."""
    drawn, compiler, right = AT_FIRST | begin, Compiler(), 0
    in_force: Plan | None = None
    # However much changes, single places are looked for.
    with mock.patch.object(kept, "_ONE_OF", 0):
        for key, value in [("down", ()), *changes]:
            drawn = drawn | {key: value}
            try:
                read = parse_policy(policy(drawn).encode(), "p.yaml").policy
            except PolicyError:
                continue
            right += 1
            # As an apply and the look after it: the ids of the plan are facts then.
            for _ in range(2):
                facts = host(drawn, in_force)
                again = result(compiler.plan, read, facts)
                assert again == result(compile_policy, read, facts), (key, value)
                in_force = again if isinstance(again, Plan) else in_force
    return right


@given(OF_NETWORKS, st.lists(CHANGE, min_size=1, max_size=6))
def test_what_was_compiled_before_changes_nothing(
    begin: dict[str, Any], changes: list[tuple[str, Any]]
) -> None:
    follow(begin, changes)


def test_nothing_of_one_change_is_left_after_the_next() -> None:
    """Each to its other values and back, on networks of all kinds that go together."""
    begin = {
        "option 2": "gateways",
        "option 3": "denied",
        "option 4": "one address",
        "option 5": "no gateway",
    }
    changes = [(key, value) for key, values in CHANGES.items() for value in (*values[1:], values[0])]
    right = follow({"option 1": "vrf", "option 3": "vrf"}, changes)
    right += follow({}, [("egress", True), ("egress", False), *changes])
    right += follow(begin, [*changes, ("ids", "lost"), ("order", (3, 5, 1)), ("order", (1, 2, 3, 4, 5))])
    # What the policy's own checks refuse says nothing.
    assert right > len(changes)


def test_an_unchanged_network_keeps_its_objects() -> None:
    texts = [
        "version: 1\nnetworks:\n" + "\n".join(network(number, "plain") for number in numbers) + "\n"
        for numbers in ((1, 2), (3, 1, 2))
    ]
    compiler = Compiler()
    first = compiler.plan(parse_policy(texts[0].encode(), "p.yaml").policy, host(AT_FIRST, None))
    second = compiler.plan(parse_policy(texts[1].encode(), "p.yaml").policy, host(AT_FIRST, first))
    same = {id(route) for route in first.routes}
    assert same < {id(route) for route in second.routes}
    assert {id(item) for item in first.ingress.networks} < {id(item) for item in second.ingress.networks}


@dataclasses.dataclass(frozen=True)
class Item:
    key: int
    text: str


@given(
    st.lists(
        st.lists(
            st.lists(st.builds(Item, st.integers(0, 60), st.sampled_from("ab")), max_size=3), max_size=40
        ),
        max_size=4,
    )
)
def test_merging_again_is_merging_anew(rounds: list[list[list[Item]]]) -> None:
    """Also with equal keys, where the part that comes first wins."""
    merged: Merged[Item] = Merged(lambda item: item.key, lambda one, other: one.key == other.key)
    seen: dict[int, Item] = {}
    parts: list[tuple[Item, ...]] = []
    for drawn in rounds:
        # Some of the parts before stay, as the same objects.
        parts = [*parts[1:], *(tuple(part) for part in drawn)]
        seen = {}
        for part in parts:
            for item in part:
                seen.setdefault(item.key, item)
        with mock.patch.object(kept, "_ONE_OF", 0):
            assert merged.merge(tuple(parts)) == tuple(seen[key] for key in sorted(seen))
