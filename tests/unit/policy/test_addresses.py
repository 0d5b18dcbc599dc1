# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.policy.addresses import (
    RefusedError,
    VipRange,
    collapse,
    parse_address,
    parse_prefix,
    parse_vip,
    prefix_range,
    supernets,
    united,
)


@pytest.mark.parametrize(
    ("text", "first", "last", "prefixes"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.7", ["192.0.2.7/32"]),
        ("192.0.2.0/24", "192.0.2.0", "192.0.2.255", ["192.0.2.0/24"]),
        ("192.0.2.3 - 192.0.2.8", "192.0.2.3", "192.0.2.8", ["192.0.2.3/32", "192.0.2.4/30", "192.0.2.8/32"]),
        ("192.0.2.0-192.0.2.3", "192.0.2.0", "192.0.2.3", ["192.0.2.0/30"]),
        ("2001:db8::1", "2001:db8::1", "2001:db8::1", ["2001:db8::1/128"]),
        ("2001:DB8::/64", "2001:db8::", "2001:db8::ffff:ffff:ffff:ffff", ["2001:db8::/64"]),
        ("2001:db8::-2001:db8::4", "2001:db8::", "2001:db8::4", ["2001:db8::/126", "2001:db8::4/128"]),
    ],
)
def test_vip(text: str, first: str, last: str, prefixes: list[str]) -> None:
    vip = parse_vip(text)
    assert vip == VipRange(ip_address(first), ip_address(last))
    assert [str(p) for p in vip.prefixes()] == prefixes
    assert parse_vip(str(vip)) == vip


@st.composite
def ranges(draw: st.DrawFn) -> VipRange:
    bits = draw(st.sampled_from([32, 128]))
    kind = IPv4Address if bits == 32 else IPv6Address
    base = draw(st.integers(0, (1 << bits) - 1))
    last = draw(st.integers(base, min(base + 5000, (1 << bits) - 1)))
    return VipRange(kind(base), kind(last))


@given(ranges())
def test_prefixes_cover_the_range_and_nothing_else(vip: VipRange) -> None:
    prefixes = vip.prefixes()
    assert sum(p.num_addresses for p in prefixes) == int(vip.last) - int(vip.first) + 1
    assert prefixes[0].network_address == vip.first
    assert prefixes[-1].broadcast_address == vip.last
    assert list(prefixes) == sorted(prefixes)
    assert parse_vip(str(vip)) == vip


def test_ranges_are_ordered_by_family_then_address() -> None:
    vips = [parse_vip(t) for t in ("2001:db8::1", "198.51.100.1", "192.0.2.0/24", "192.0.2.0")]
    assert [str(v) for v in sorted(vips)] == ["192.0.2.0", "192.0.2.0/24", "198.51.100.1", "2001:db8::1"]


def test_range_membership() -> None:
    vip = parse_vip("192.0.2.3-192.0.2.8")
    assert ip_address("192.0.2.3") in vip
    assert ip_address("192.0.2.9") not in vip
    assert ip_address("::c000:203") not in vip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "192.0.2",
        "192.0.2.1/33",
        "192.0.2.1/24",
        "2001:db8::1/64",
        "1-2",
        "-",
        "192.0.2.2-192.0.2.1",
        "192.0.2.1-::1",
        "fe80::1%eth0",
        "192.0.2.0/255.255.255.0",
        "192.0.2.1-192.0.2.3-192.0.2.4",
    ],
)
def test_refused_vips(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_vip(text)
    assert caught.value.hint


@pytest.mark.parametrize("value", [None, 7, True, 1.5, [], {}])
def test_only_text(value: object) -> None:
    for parse in (parse_vip, parse_prefix, parse_address):
        with pytest.raises(RefusedError):
            parse(value)


def test_collapse_and_united() -> None:
    prefixes = [ip_network(p) for p in ("10.1.0.0/16", "10.0.0.0/16", "2001:db8::/65", "10.0.3.0/24")]
    assert [str(p) for p in collapse(prefixes)] == ["10.0.0.0/15", "2001:db8::/65"]
    assert [str(r) for r in united(map(prefix_range, prefixes))] == [
        "10.0.0.0/16",
        "10.1.0.0/16",
        "2001:db8::/65",
    ]
    ranges = map(parse_vip, ("192.0.2.9-192.0.2.20", "192.0.2.0-192.0.2.9", "192.0.2.21", "::", "192.0.2.5"))
    assert [str(r) for r in united(ranges)] == ["192.0.2.0-192.0.2.20", "192.0.2.21", "::"]


def test_supernets() -> None:
    assert [str(p) for p in supernets(ip_network("10.1.2.0/24"), (32, 24, 16, 0))] == [
        "10.1.2.0/24",
        "10.1.0.0/16",
        "0.0.0.0/0",
    ]
