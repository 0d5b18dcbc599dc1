# SPDX-License-Identifier: Apache-2.0
"""What a right policy means: defaults and normal forms."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest

from datapath.errors import InputError
from datapath.plan.ingress import OtherCheck, VipCheck, VlanProtocol
from datapath.policy import (
    Backend,
    MarkProfile,
    Marks,
    Network,
    Policy,
    ReturnPath,
    Steering,
    Track,
    check_policy,
    load_policy,
    parse_policy,
)

SMALLEST = b"""version: 1
node:
  internal: [10.112.0.0/12, 10.96.0.0/12]
networks:
  - name: public
    vlan: {parent: eth0, id: 100}
    vips: [1.2.3.0/24]
    gateway: 1.2.3.1
"""


def network(text: str) -> Network:
    """The only network of a policy with these lines."""
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    return parse_policy(f"version: 1\nnetworks:\n  - name: a\n{lines}".encode(), "p").policy.networks[0]


def test_smallest_policy_and_its_defaults() -> None:
    policy = parse_policy(SMALLEST, "p.yaml").policy
    assert policy.marks.effective_mask == 0x0FFF_0000
    assert policy.rules.priority == 10000
    assert (policy.steering, policy.backend) == (Steering.RULES, Backend.AUTO)
    (public,) = policy.networks
    assert public.vlan is not None
    assert (public.device, public.vlan.protocol) == ("eth0.100", VlanProtocol.DOT1Q)
    assert [str(g) for g in public.gateway] == ["1.2.3.1"]
    assert [str(p) for p in public.effective_on_link] == ["1.2.3.0/24"]
    assert public.return_path is ReturnPath.CONNTRACK
    assert (public.reverse_path.vips, public.reverse_path.other) == (VipCheck.FEASIBLE, OtherCheck.STRICT)
    assert (public.table, public.mark, public.vrf, public.track) == (None, None, None, Track.FIRST)
    assert not public.isolate_clients
    assert not public.strict_arp
    assert public.needs_mark
    assert policy.steering_of(public) is Steering.RULES


def test_policy_is_frozen() -> None:
    policy = parse_policy(SMALLEST, "p").policy
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        policy.networks[0].name = "other"


def test_json_form_reads_back_as_the_same_policy() -> None:
    policy = parse_policy(SMALLEST, "p").policy
    assert Policy.model_validate(policy.model_dump(mode="json")) == policy


def test_both_families() -> None:
    a = network(
        'interface: eth1\nvips: [192.0.2.0/25, 192.0.2.128/25, "2001:db8::/64"]\ngateway: ["fe80::1", 192.0.2.1]'
    )
    assert [str(p) for p in a.vip_prefixes] == ["192.0.2.0/24", "2001:db8::/64"]
    assert a.vip_families == {4, 6}
    assert [[str(g.address) for g in a.gateways_of(family)] for family in (4, 6)] == [
        ["192.0.2.1"],
        ["fe80::1"],
    ]
    # As written: the other half of the /24 is not known to be on the network.
    assert [str(p) for p in a.effective_on_link] == ["192.0.2.0/25"]


def test_on_link_wins_over_the_vip_prefix() -> None:
    a = network(
        "interface: eth1\nvips: [192.0.2.0/28]\ngateway: 192.0.2.1\non_link: [192.0.2.0/25, 192.0.2.128/25]"
    )
    assert [str(p) for p in a.effective_on_link] == ["192.0.2.0/24"]


def test_without_gateway_no_mark_is_needed() -> None:
    a = network("interface: eth1\nvips: [192.0.2.7]")
    assert not a.needs_mark
    assert a.effective_on_link == ()
    assert not network(
        "interface: e\nvips: [192.0.2.0/24]\ngateway: 192.0.2.1\nreturn_path: source"
    ).needs_mark


def test_everything_that_can_be_set() -> None:
    a = network(
        "vlan: {parent: bond0, id: 4094, name: pub, protocol: 802.1ad}\nvips: [192.0.2.8-192.0.2.9]\n"
        "gateway: 192.0.2.1\non_link: [192.0.2.0/28]\nreturn_path: source\ntable: 0xffffffff\nmark: 0x00010000\n"
        "reverse_path: {vips: off, other: loose, allow: [203.0.113.0/24], deny: ['2001:db8::/32']}\n"
        "strict_arp: true\nsteering: rules\ntrack: last\nisolate_clients: false"
    )
    assert a.vlan is not None
    assert (a.device, a.vlan.protocol) == ("pub", VlanProtocol.DOT1AD)
    assert (a.table, a.mark, a.strict_arp, a.track) == (0xFFFF_FFFF, 0x10000, True, Track.LAST)
    assert (a.reverse_path.vips, a.reverse_path.other) == (VipCheck.OFF, OtherCheck.LOOSE)


def test_marks() -> None:
    assert Marks(profile=MarkProfile.TAILSCALE).effective_mask == 0x7F00_0000
    assert Marks(mask=0x8000_0101).effective_mask == 0x8000_0101


def test_unquoted_ipv6_that_looks_like_a_sexagesimal_number() -> None:
    assert str(network("interface: e\nvips: [2001:10:20:30:40:50:1:2]").vips[0]) == "2001:10:20:30:40:50:1:2"


def test_aliases_have_positions_of_their_own() -> None:
    loaded = parse_policy(
        b"version: 1\nnode: {internal: &in [10.0.0.0/8]}\nnetworks:\n"
        b"  - {name: a, interface: e, vips: [192.0.2.1], reverse_path: {allow: *in}}\n",
        "p",
    )
    assert [str(p) for p in loaded.policy.networks[0].reverse_path.allow] == ["10.0.0.0/8"]
    assert loaded.source.line_of(("networks", 0, "reverse_path", "allow")) == 4


def test_check_policy_finds_what_the_loader_finds() -> None:
    policy = Policy.model_validate(
        {
            "version": 1,
            "networks": [
                {"name": "a", "interface": "e", "vips": ["192.0.2.1"]},
                {"name": "a", "interface": "f", "vips": ["192.0.2.2"]},
            ],
        }
    )
    assert [p.path for p in check_policy(policy)] == [("networks", 1, "name")]


def test_load_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace(b"\n", b"\r\n"))
    assert load_policy(path).policy == parse_policy(SMALLEST, "p").policy


@pytest.mark.parametrize("name", ["missing.yaml", ".", "nul\0byte"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InputError, match=re.escape(repr(name)[1:-1] if name != "." else tmp_path.name)
    ) as caught:
        load_policy(tmp_path / name)
    assert caught.value.exit_status == 2
    assert caught.value.hint
