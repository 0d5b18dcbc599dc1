# SPDX-License-Identifier: Apache-2.0
"""Addresses in plans read as Python writes them, whoever writes them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.plan.ingress import address_text, prefix_text

#: Words of which many are zero: where runs of zeros are left out is what two writers might disagree on.
WORDS = st.lists(st.sampled_from((0, 0, 0, 1, 0x64, 0xFFFF, 0xABC0)), min_size=8, max_size=8)


@given(
    st.one_of(st.ip_addresses(), WORDS.map(lambda words: IPv6Address(b"".join(w.to_bytes(2) for w in words))))
)
def test_an_address_reads_as_python_writes_it(address: IPv4Address | IPv6Address) -> None:
    assert address_text(address) == str(address)


@pytest.mark.parametrize("text", ["::", "::1", "::192.0.2.1", "::ffff:192.0.2.1", "64:ff9b::192.0.2.1"])
def test_what_could_be_ipv4_has_no_dots(text: str) -> None:
    assert address_text(ip_address(text)) == str(ip_address(text))


@given(st.ip_addresses(), st.integers(0, 32))
def test_a_prefix_reads_as_python_writes_it(address: IPv4Address | IPv6Address, length: int) -> None:
    prefix = ip_network(f"{address}/{length}", strict=False)
    assert prefix_text(prefix) == str(prefix)
    assert prefix_text(IPv6Network("::/0")) == "::/0"
