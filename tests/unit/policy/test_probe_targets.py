# SPDX-License-Identifier: Apache-2.0
"""What a probe connects to; what is refused, and how, is in the corpus of wrong policies."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.policy.addresses import RefusedError
from datapath.policy.targets import Endpoint, Url, parse_endpoint, parse_url


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("192.0.2.5:443", "192.0.2.5", 443),
        (" 127.0.0.1:1 ", "127.0.0.1", 1),
        ("[2001:db8::5]:65535", "2001:db8::5", 65535),
        ("[fe80::1]:80", "fe80::1", 80),
    ],
)
def test_endpoints(text: str, address: str, port: int) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == Endpoint(ip_address(address), port)
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "endpoint", "host", "path"),
    [
        ("http://192.0.2.5", "192.0.2.5:80", "192.0.2.5", "/"),
        ("http://192.0.2.5:8080/a/b?c=d%20e", "192.0.2.5:8080", "192.0.2.5:8080", "/a/b?c=d%20e"),
        ("HTTP://[2001:db8::5]:81/?x", "[2001:db8::5]:81", "[2001:db8::5]:81", "/?x"),
    ],
)
def test_urls(text: str, endpoint: str, host: str, path: str) -> None:
    assert parse_url(text) == Url(text, parse_endpoint(endpoint), host, path)


@given(
    st.text()
    | st.from_regex(r"(http://|\[)?[0-9a-f.:\]\[@/?# %]{0,30}(:[0-9]+)?[\n\ta/]{0,5}", fullmatch=True)
)
def test_anything_else_is_refused_with_a_hint(text: str) -> None:
    for parse in (parse_endpoint, parse_url):
        with contextlib.suppress(RefusedError):
            target = parse(text)
            assert parse(str(target)) == target
            assert str(target).isprintable(), "it goes to terminals and into a request"
