# SPDX-License-Identifier: Apache-2.0
"""Headers of logged packets, as far as they were copied."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.kernel.packet_log import _packets, _parse
from datapath.plan.egress import EgressDrop, counter_name, owner_and_drop

_FOUR = ip_address("10.1.2.3").packed + ip_address("192.0.2.1").packed
_SIX = ip_address("fd00::1").packed + ip_address("2001:db8::1").packed


def ipv4(protocol: int, *, fragment: int = 0, options: int = 0) -> bytes:
    head = bytes([0x45 + options, 0, 0, 0, 0, 0]) + fragment.to_bytes(2, "big") + bytes([64, protocol, 0, 0])
    return head + _FOUR + bytes(4 * options) + b"\0\x07\0\x50"


def ipv6(following: int, *headers: bytes) -> bytes:
    return bytes([0x60, 0, 0, 0, 0, 0, following, 64]) + _SIX + b"".join(headers) + b"\0\x07\0\x50"


def fragment(following: int, offset: int) -> bytes:
    return bytes([following, 0]) + (offset << 3 | 1).to_bytes(2, "big") + bytes(4)


def options(following: int, length: int = 0) -> bytes:
    return bytes([following, length]) + bytes(6 + 8 * length)


@pytest.mark.parametrize(
    ("data", "protocol", "offset"),
    [
        (ipv4(17), 17, 20),
        (ipv4(6, options=3), 6, 32),
        (ipv4(17, fragment=0x2000), 17, 20),
        (ipv4(17, fragment=0x2001), 17, 0),
        (ipv6(17), 17, 40),
        (ipv6(58), 58, 40),
        (ipv6(0, options(60), options(6, 1)), 6, 64),
        (ipv6(44, fragment(17, 0)), 17, 48),
        (ipv6(44, fragment(17, 185)), 17, 0),
    ],
)
def test_where_the_ports_are(data: bytes, protocol: int, offset: int) -> None:
    parsed = _parse(data)
    assert parsed is not None
    assert parsed[2:] == (protocol, offset)
    assert {str(parsed[0]), str(parsed[1])} in ({"10.1.2.3", "192.0.2.1"}, {"fd00::1", "2001:db8::1"})
    if offset:
        assert data[offset : offset + 4] == b"\0\x07\0\x50"


@given(st.binary(max_size=200))
def test_no_bytes_break_it(data: bytes) -> None:
    """A packet may hold anything, and may be cut anywhere."""
    _parse(data)
    list(_packets(data))
    for first in (0x45, 0x60):
        _parse(bytes([first]) + data)


@pytest.mark.parametrize("drop", EgressDrop)
def test_what_a_rule_logs_names_the_counter(drop: EgressDrop) -> None:
    assert owner_and_drop(counter_name("web-1", drop)) == ("web-1", drop)


@pytest.mark.parametrize(
    "text", ["", "web", "egress.web.opened", "ingress.web.late", "egress.web", "x.egress.web.late"]
)
def test_what_others_log_is_not_ours(text: str) -> None:
    assert owner_and_drop(text) is None
