# SPDX-License-Identifier: Apache-2.0
"""Disjoint ranges say of every address what a longest-prefix match says; addresses are tried at every border."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from datapath.compiler.prefixes import AddressRange, CommonSources, flatten, ranges_of
from datapath.observe.reference import is_spoofed
from datapath.plan.ingress import IpNetwork, SourceAction, SourceRule
from datapath.plan.rtnl import Family

ALLOW, DENY = SourceAction.ALLOW, SourceAction.DENY
BITS = {Family.IPV4: 32, Family.IPV6: 128}
KIND: dict[Family, type[IPv4Address | IPv6Address]] = {
    Family.IPV4: IPv4Address,
    Family.IPV6: IPv6Address,
}
FAMILIES = st.sampled_from(list(Family))


@st.composite
def prefixes(draw: st.DrawFn) -> IpNetwork:
    """Prefixes of both families with few different bits, so that they nest, touch and are equal often."""
    family = draw(FAMILIES)
    bits = BITS[family]
    number = draw(st.integers(0, 7)) | draw(st.integers(0, 3)) << (bits - 2)
    length = draw(st.sampled_from([0, 1, 2, 3, bits - 3, bits - 2, bits - 1, bits]))
    return ip_network((number, length), strict=False)


def lists(actions: st.SearchStrategy[SourceAction]) -> st.SearchStrategy[list[SourceRule]]:
    """Source lists; the compiler names no prefix twice in one list."""
    return st.dictionaries(prefixes(), actions, max_size=8).map(
        lambda named: [SourceRule(prefix, action) for prefix, action in named.items()]
    )


def borders(named: Iterable[IpNetwork], family: Family) -> set[int]:
    """What is decided changes nowhere but at these numbers."""
    highest = (1 << BITS[family]) - 1
    near = {0, highest}
    for prefix in named:
        if prefix.version == family:
            first, last = int(prefix.network_address), int(prefix.broadcast_address)
            near |= {first - 1, first, last, last + 1}
    return {number for number in near if 0 <= number <= highest}


def holds(ranges: Iterable[AddressRange], number: int) -> bool:
    return any(item.first <= number <= item.last for item in ranges)


def assert_minimal(ranges: tuple[AddressRange, ...], family: Family) -> None:
    """Sorted, and with a gap between each and the next."""
    assert all(item.family == family and item.first <= item.last for item in ranges)
    assert all(one.last + 1 < two.first for one, two in itertools.pairwise(ranges))


@given(
    own=lists(st.sampled_from([ALLOW, DENY])), common=lists(st.sampled_from([ALLOW, DENY])), family=FAMILIES
)
def test_the_own_list_decides_where_it_matches(
    own: list[SourceRule], common: list[SourceRule], family: Family
) -> None:
    denied, allowed = flatten(own, CommonSources(common), family)
    assert_minimal(denied, family)
    assert_minimal(allowed, family)
    for number in borders((rule.prefix for rule in (*own, *common)), family):
        address = KIND[family](number)
        if any(address in rule.prefix for rule in own):
            spoofed = is_spoofed(address, own, common)
            assert (holds(denied, number), holds(allowed, number)) == (spoofed, not spoofed), address
        else:
            assert not holds(denied, number), address
            assert not holds(allowed, number), address


@given(own=lists(st.sampled_from([ALLOW, DENY])), common=lists(st.just(DENY)), family=FAMILIES)
@example(
    own=[SourceRule(ip_network("10.0.0.0/8"), ALLOW)],
    common=[SourceRule(ip_network("10.0.0.0/8"), DENY)],
    family=Family.IPV4,
)
@example(
    own=[SourceRule(ip_network("::/1"), ALLOW)],
    common=[SourceRule(ip_network("::/2"), DENY), SourceRule(ip_network("::/1"), DENY)],
    family=Family.IPV6,
)
def test_two_sets_and_an_exception_are_one_longest_match(
    own: list[SourceRule], common: list[SourceRule], family: Family
) -> None:
    """The rules that nft gets: denied by the own list, or in the common set and not allowed by the own list."""
    denied, allowed = flatten(own, CommonSources(common), family)
    everywhere = ranges_of((rule.prefix for rule in common), family)
    for number in borders((rule.prefix for rule in (*own, *common)), family):
        dropped = holds(denied, number) or (holds(everywhere, number) and not holds(allowed, number))
        assert dropped == is_spoofed(KIND[family](number), own, common), KIND[family](number)


@given(named=st.lists(prefixes(), max_size=10), family=FAMILIES)
def test_ranges_are_the_union(named: list[IpNetwork], family: Family) -> None:
    ranges = ranges_of(named, family)
    assert_minimal(ranges, family)
    for number in borders(named, family):
        address = KIND[family](number)
        assert holds(ranges, number) == any(address in prefix for prefix in named), address


@given(prefix=prefixes())
def test_a_prefix_is_written_as_one(prefix: IpNetwork) -> None:
    (only,) = ranges_of([prefix], Family(prefix.version))
    is_single = prefix.prefixlen == prefix.max_prefixlen
    assert only.render() == (str(prefix.network_address) if is_single else str(prefix))


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (["10.0.0.0/25", "10.0.0.128/25"], "10.0.0.0/24"),
        (["10.0.0.1/32", "10.0.0.2/32"], "10.0.0.1-10.0.0.2"),
        (["10.0.0.2/31", "10.0.0.4/31"], "10.0.0.2-10.0.0.5"),
        (["2001:db8::/33", "2001:db8:8000::/33"], "2001:db8::/32"),
        (["2001:db8::1/128", "2001:db8::2/127"], "2001:db8::1-2001:db8::3"),
        (["::/1", "8000::/1"], "::/0"),
    ],
)
def test_neighbours_become_one_range(named: list[str], text: str) -> None:
    family = Family.IPV6 if ":" in text else Family.IPV4
    (only,) = ranges_of(map(ip_network, named), family)
    assert only.render() == text
