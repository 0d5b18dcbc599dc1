# SPDX-License-Identifier: Apache-2.0
"""What FRR's bfdd says, in whatever pieces it comes, and what nobody should believe."""

from __future__ import annotations

import itertools
import json
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.kernel.bfd_sessions import VtyStream, sessions_of

fast = settings(max_examples=300, deadline=None, derandomize=True)

#: As bfdd 8.4 says it, without what nobody reads here.
SAID = b"""\
[
  {
    "multihop":false,
    "peer":"2001:db8:113::1",
    "vrf":"default",
    "interface":"eth0",
    "id":171624218,
    "status":"down",
    "downtime":0
  },
  {
    "multihop":false,
    "peer":"203.0.113.1",
    "vrf":"default",
    "interface":"eth0",
    "status":"up",
    "uptime":12
  }
]
"""


def heard(pieces: list[bytes]) -> list[tuple[int, bytes]]:
    stream = VtyStream()
    return [answer for piece in pieces for answer in stream.feed(piece)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(ends)]


TEXTS = st.binary(max_size=40).map(lambda text: text.replace(b"\0", b""))


@fast
@given(st.lists(st.tuples(st.integers(0, 255), TEXTS)), st.lists(st.integers(0, 200)))
def test_pieces_make_no_difference(answers: list[tuple[int, bytes]], places: list[int]) -> None:
    data = b"".join(text + bytes(3) + bytes([status]) for status, text in answers)
    assert heard(cut(data, places)) == answers


@fast
@given(TEXTS, st.integers(0, 255), st.lists(st.integers(0, 200)))
def test_nothing_is_said_before_its_last_byte(text: bytes, status: int, places: list[int]) -> None:
    data = text + bytes(3) + bytes([status])
    assert heard(cut(data[:-1], places)) == []


@fast
@given(st.lists(st.binary(max_size=60)))
def test_whatever_comes_is_read_or_refused(pieces: list[bytes]) -> None:
    try:
        answers = heard(pieces)
    except ValueError:
        return
    assert all(b"\0" not in text for _, text in answers)


def test_a_stream_without_an_end_is_refused() -> None:
    stream = VtyStream()
    for _ in range(16):
        assert list(stream.feed(b"x" * (1 << 20))) == []
    with pytest.raises(ValueError, match="more text"):
        list(stream.feed(b"x"))


def test_sessions_are_those_of_the_device() -> None:
    both = {ip_address("2001:db8:113::1"): "down", ip_address("203.0.113.1"): "up"}
    assert sessions_of(SAID, "eth0") == both
    assert sessions_of(SAID, "eth1") == {}
    assert sessions_of(b"[]", "eth0") == {}


@pytest.mark.parametrize("states", [("up", "down"), ("down", "up"), ("up", "shutdown")])
def test_of_two_sessions_with_one_gateway_one_is_enough(states: tuple[str, str]) -> None:
    said = [{"peer": "10.0.0.1", "interface": "d", "multihop": False, "status": state} for state in states]
    assert sessions_of(json.dumps(said).encode(), "d") == {ip_address("10.0.0.1"): "up"}


def test_sessions_over_several_hops_say_nothing_about_a_neighbour() -> None:
    said = [{"peer": "10.0.0.1", "interface": "d", "multihop": True, "status": "up"}]
    assert sessions_of(json.dumps(said).encode(), "d") == {}


def test_a_link_local_peer_is_known_without_its_zone() -> None:
    said = [{"peer": "fe80::1%d", "interface": "d", "multihop": False, "status": "up"}]
    assert sessions_of(json.dumps(said).encode(), "d") == {ip_address("fe80::1"): "up"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["peer", "interface", "status", "multihop", "x"]) | st.text(max_size=4),
            inner | st.sampled_from(["d", "10.0.0.1", "up", "fe80::1%"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@fast
@given(JSON)
def test_any_json_is_sessions_or_refused(value: object) -> None:
    try:
        found = sessions_of(json.dumps(value).encode(), "d")
    except ValueError:
        assert not isinstance(value, list)
        return
    assert isinstance(value, list)
    assert all(isinstance(state, str) for state in found.values())


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[", b"\xff\xfe", b"[" * 100_000, b"[" + b"9" * 5000 + b"]", b"% Unknown command"]
)
def test_what_is_no_list_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|line 1|decode|digits"):
        sessions_of(text, "d")
