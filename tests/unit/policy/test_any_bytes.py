# SPDX-License-Identifier: Apache-2.0
"""Whatever the file holds, the answer is a policy or a PolicyError."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from datapath.errors import PolicyError
from datapath.policy import LoadedPolicy, parse_policy

GOOD = b"""version: 1
node: {internal: [10.96.0.0/12]}
marks: {profile: tailscale}
networks:
  - name: public
    vlan: {parent: eth0, id: 100}
    vips: [192.0.2.0/24, "2001:db8::/64"]
    gateway: [192.0.2.1, "fe80::1"]
    reverse_path: {vips: off, allow: [203.0.113.0/24]}
  - {name: b, interface: eth1, vips: [198.51.100.1-198.51.100.9]}
"""

#: Pieces that mean something to YAML or to the policy.
FRAGMENTS = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b": ",
        b"- ",
        b"\n",
        b"\t",
        b"&a ",
        b"*a",
        b"!!int ",
        b"|\n",
        b"'",
        b'"',
        b"?",
        b"<<",
        b"~",
        b"0",
        b"-1",
        b"1e999",
        b"0x",
        b"99999999999999999999",
        b"/0",
        b"%eth0",
        b"::",
        b"yes",
        b"\xff",
        b"\0",
        b"---\n",
        b"%YAML 9.9\n",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"name",
        b"vips",
        b"networks",
        b"#",
        b"\\x41",
        b",",
    ]
)

KEYS = st.sampled_from(
    [
        "version",
        "node",
        "internal",
        "marks",
        "mask",
        "profile",
        "rules",
        "priority",
        "networks",
        "name",
        "vlan",
        "parent",
        "id",
        "interface",
        "vips",
        "gateway",
        "on_link",
        "reverse_path",
        "table",
        "mark",
        "vrf",
        "egress",
        "probes",
        "network",
        "sources",
        "source_ip",
        "set",
        "exclude",
        "tcp",
        "http",
        "timeout",
        "attempts",
        "steering",
        "backend",
        "track",
        "create",
        "protocol",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["192.0.2.1", "192.0.2.0/24", "2001:db8::1", "192.0.2.1-192.0.2.9", "eth0", "cilium", "a"]
    )
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)


def outcome(text: bytes) -> LoadedPolicy | PolicyError:
    try:
        return parse_policy(text, "p.yaml")
    except PolicyError as error:
        refused = error
    assert refused.problems
    assert all(c.isprintable() or c in "\n\t" for c in refused.rendered)
    return refused


def test_the_base_is_good() -> None:
    assert isinstance(outcome(GOOD), LoadedPolicy)


@given(st.binary(max_size=200))
@example(b"\xff\xfe")
@example(b"%TAG ! tag:x,2000:\n--- !foo 1")
@example(b"&a [&b [*a]]")
@example(b"? ? ? :")
def test_any_bytes(text: bytes) -> None:
    outcome(text)


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    outcome(text.encode("utf-8", "surrogatepass"))


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), FRAGMENTS | st.binary(max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_damaged_policies(edits: list[tuple[int, int, bytes]]) -> None:
    text = GOOD
    for position, length, piece in edits:
        text = text[:position] + piece + text[position + length :]
    outcome(text)


@given(TREES)
def test_any_tree(tree: Any) -> None:
    outcome(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.dictionaries(KEYS, TREES, max_size=4), st.dictionaries(KEYS, TREES, max_size=6))
def test_any_tree_in_the_place_of_a_network(top: dict[str, Any], network: dict[str, Any]) -> None:
    policy = top | {
        "version": 1,
        "networks": [{"name": "a", "interface": "b", "vips": ["192.0.2.1"]} | network],
    }
    outcome(yaml.safe_dump(policy).encode())
