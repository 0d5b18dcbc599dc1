# SPDX-License-Identifier: Apache-2.0
"""The index says what the tries say, for every table, and at every point of a change from one to another."""

from __future__ import annotations

import dataclasses
import random
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

import pytest

from datapath import points
from datapath.kernel.bpf import abi, grace, steering_index
from datapath.kernel.bpf.steering_tables import (
    SteeringTables,
    Way,
    encode_replies,
    encode_targets,
    resolve_steering,
)
from tests.bpf.test_steering import IFINDEXES, INNER, PROGRAM, PUBLIC, Outcome, Steering, loaded, packet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datapath.plan.ingress import IpNetwork

root = [pytest.mark.root, pytest.mark.bpf]
SIZES = {4: 64, 6: 64}
CLIENT = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
GATEWAY = {4: ip_address("198.51.100.1"), 6: ip_address("fe80::1")}


def tables(*vips: str, passed: Iterable[str] = ()) -> SteeringTables:
    """One way for each VIP, told by its device: 1001, 1002, ..."""
    prefixes = [ip_network(vip) for vip in vips]
    replies: dict[IpNetwork, Way] = {
        prefix: Way(1, 1000 + number, GATEWAY[prefix.version])
        for number, prefix in enumerate(prefixes, start=1)
    }
    return SteeringTables(replies, frozenset((abi.SLOT_NONE, ip_network(text)) for text in passed))


def built(of: SteeringTables) -> tuple[abi.SteeringIndex, dict[int, list[Any]]]:
    """How it is asked, and its elements by IP version."""
    index = steering_index.build(encode_replies(of.replies), of.targets, SIZES)
    layouts: dict[int, Any] = {4: abi.IndexedNetwork4, 6: abi.IndexedNetwork6}
    elements = {
        version: [layouts[version].from_buffer_copy(raw) for raw in index.buckets[version].values()]
        for version in (4, 6)
    }
    return abi.SteeringIndex.from_buffer_copy(index.how), elements


class TestContents:
    """What lies where."""

    def test_most_frequent_length_is_in_the_array(self) -> None:
        how, elements = built(tables("192.0.2.0/25", "192.0.2.128/25", "198.51.100.7/32", "2001:db8::/64"))
        assert (bytes(how.mask4).hex(), bytes(how.mask6).hex()) == ("ffffff80", "ff" * 8 + "00" * 8)
        assert (how.state4, how.state6) == (abi.IndexState.WHOLE, abi.IndexState.WHOLE)
        assert sorted(bytes(e.address) for e in elements[4] if e.network.ifindex) == [
            bytes([192, 0, 2, 0]),
            bytes([192, 0, 2, 128]),
        ]
        assert [e.network.ifindex for e in elements[6]] == [1004]

    def test_longer_prefix_marks_its_bucket_and_puts_out_what_it_lies_in(self) -> None:
        _, elements = built(tables("192.0.2.0/24", "203.0.113.0/24", "192.0.2.128/25"))
        assert sorted((e.network.ifindex, e.ask_trie) for e in elements[4]) == [(0, 1), (1002, 0)]

    def test_shorter_prefix_makes_the_trie_be_asked_always(self) -> None:
        how, _ = built(tables("192.0.2.0/25", "192.0.2.128/25", "198.51.0.0/16"))
        assert (how.state4, how.state6) == (abi.IndexState.PART, abi.IndexState.WHOLE)

    def test_second_of_a_bucket_marks_it(self) -> None:
        """More than there are buckets."""
        _, elements = built(tables(*(f"192.0.{number}.0/24" for number in range(200))))
        assert len(elements[4]) <= SIZES[4]
        assert sum(e.ask_trie for e in elements[4]) > SIZES[4] // 2
        assert all(e.network.ifindex for e in elements[4])

    @pytest.mark.parametrize("form", ["100.{high}.{low}.0/24", "2001:db8:{number:x}::/64"])
    def test_numbered_networks_have_a_bucket_each(self, form: str) -> None:
        vips = [form.format(number=n, high=64 + n // 256, low=n % 256) for n in range(1, 4095)]
        index = steering_index.build(encode_replies(tables(*vips).replies), (), {4: 1 << 14, 6: 1 << 14})
        assert sum(map(len, index.buckets.values())) == len(vips)

    def test_every_excepted_destination_is_covered(self) -> None:
        few = ["10.0.0.0/8", "224.0.0.0/4", "2001:db8:1::/108", "2001:db8:1::f:0/112"]
        how, _ = built(tables("192.0.2.0/24", passed=few))
        assert [(bytes(p.address).hex(), bytes(p.mask).hex()) for p in how.passed4][:3] == [
            ("0a000000", "ff000000"),
            ("e0000000", "f0000000"),
            ("ffffffff", "00000000"),
        ]
        # Both differ behind the first half only.
        assert [bytes(p.mask).hex() for p in how.passed6] == ["ff" * 8] + ["00" * 8] * 7
        how, _ = built(tables("192.0.2.0/24", passed=[f"10.{n}.0.0/16" for n in range(0, 20, 2)]))
        assert (bytes(how.passed4[0].address), bytes(how.passed4[0].mask)) == (bytes(4), bytes(4))


def _random_prefix(chance: random.Random, version: int, lengths: list[int]) -> IpNetwork:
    """Of few different bits, so that many lie in others."""
    length = chance.choice(lengths)
    if version == 4:
        address = (192 << 24) | chance.getrandbits(10) << 14 | chance.getrandbits(2)
        return IPv4Network((address, length), strict=False)
    address6 = 0x20010DB8 << 96 | chance.getrandbits(10) << 60 | chance.getrandbits(2)
    return IPv6Network((address6, length), strict=False)


def _expected(of: SteeringTables, source: str, destination: str) -> Outcome | None:
    """The longest match, one by one."""
    if any(ip_address(destination) in prefix for slot, prefix in of.targets if slot == abi.SLOT_NONE):
        return None
    found = [vip for vip in of.replies if ip_address(source) in vip]
    if not found:
        return None
    way = of.replies[max(found, key=lambda vip: vip.prefixlen)]
    return Outcome(way.ifindex, way.gateway)


@pytest.fixture(scope="module")
def steering(module_node: str) -> Iterator[Steering]:
    assert module_node
    with loaded(SteeringTables()) as made:
        yield made


class TestInTheKernel:
    """The loaded program."""

    pytestmark = root

    @pytest.mark.parametrize("seed", range(12))
    def test_longest_match_whatever_the_tables(self, steering: Steering, seed: int) -> None:
        chance = random.Random(seed)
        prefixes: dict[IpNetwork, Way] = {}
        passed = set()
        for version, lengths in ((4, [18, 20, 24, 24, 25, 32]), (6, [60, 64, 64, 68, 127, 128])):
            few = chance.sample(lengths, chance.randint(1, 3))
            for number in range(chance.choice([0, 1, 5, 60, 120])):
                way = Way(1, 1000 * version + number, GATEWAY[version])
                prefixes[_random_prefix(chance, version, few)] = way
            for _ in range(chance.choice([0, 2, 12])):
                passed.add((abi.SLOT_NONE, _random_prefix(chance, version, lengths)))
        of = SteeringTables(prefixes, frozenset(passed))
        steering.loaded.write_tables(of)
        assert steering.loaded.read_tables() == of
        for vip in (*prefixes, *(_random_prefix(chance, v, [32 if v == 4 else 128]) for v in (4, 6) * 20)):
            for source in (vip[0], vip[-1], vip[-1] + 1):
                target = _random_prefix(chance, vip.version, [32 if vip.version == 4 else 128])[0]
                for destination in (CLIENT[vip.version], str(target)):
                    outcome = steering.run(packet(str(source), destination))
                    assert outcome == _expected(of, str(source), destination), (source, destination)

    def test_index_answers_without_the_tries_and_the_tries_without_the_index(
        self, steering: Steering
    ) -> None:
        of = tables("192.0.2.0/24", "2001:db8:100::/64", passed=["10.0.0.0/8", "fd00::/8"])
        steering.loaded.write_tables(of)
        vips = {4: "192.0.2.10", 6: "2001:db8:100::10"}
        replies = {v: steering.loaded.map(abi.REPLY_MAPS[v]).items() for v in (4, 6)}
        targets = {v: steering.loaded.map(abi.TARGET_MAPS[v]).items() for v in (4, 6)}
        for version in (4, 6):
            steering.loaded.map(abi.REPLY_MAPS[version]).delete(list(replies[version]))
        for version, vip in vips.items():
            assert steering.run(packet(vip, CLIENT[version])) == Outcome(
                1000 + version // 2 - 1, GATEWAY[version]
            )
        everybody = encode_targets(frozenset((0, ip_network(text)) for text in ("0.0.0.0/0", "::/0")))
        for version in (4, 6):
            steering.loaded.map(abi.REPLY_MAPS[version]).update(replies[version])
            steering.loaded.map(abi.TARGET_MAPS[version]).update(everybody[version])
            assert steering.run(packet(vips[version], CLIENT[version])) is not None
        raw = steering.loaded.map(abi.MAP_INDEX).lookup(bytes(4)) or b""
        steering.loaded.map(abi.MAP_INDEX).update({bytes(4): steering_index.Index(raw, {}).stopped})
        for version in (4, 6):
            assert steering.run(packet(vips[version], CLIENT[version])) is None
            steering.loaded.map(abi.TARGET_MAPS[version]).delete([*everybody[version]])
            index = steering.loaded.map(abi.INDEX_MAPS[version])
            index.update({key: bytes(index.stored_size) for key in index.items()})
            assert steering.run(packet(vips[version], CLIENT[version])) is not None
        assert targets == {v: steering.loaded.map(abi.TARGET_MAPS[v]).items() for v in (4, 6)}
        steering.loaded.write_tables(of)
        assert steering.loaded.read_tables() == of

    def test_empty_bucket_is_no_vip(self, steering: Steering) -> None:
        """Its address is 0, too."""
        steering.loaded.write_tables(tables("192.0.2.0/24", "2001:db8:100::/64"))
        assert steering.run(packet("0.0.0.1", CLIENT[4])) is None
        assert steering.run(packet("::1", CLIENT[6])) is None

    @pytest.mark.parametrize("name", [abi.MAP_INDEX, abi.INDEX_MAPS[4], abi.INDEX_MAPS[6]])
    def test_spoiled_index_is_seen_and_written_again(self, steering: Steering, name: str) -> None:
        of = resolve_steering(PROGRAM, IFINDEXES)
        steering.loaded.write_tables(of)
        spoiled = steering.loaded.map(name)
        key = bytes(3 + 1)
        (before,) = (value for raw, value in spoiled.items().items() if raw == key)
        spoiled.update({key: bytes(byte ^ 1 for byte in before)})
        assert steering.loaded.read_tables() == dataclasses.replace(of, is_indexed=False)
        steering.loaded.write_tables(of, only_add=True)
        assert steering.loaded.read_tables() == of


#: From each of these to each other one: other lengths, nested or not, shorter ones, none, one more.
STAGES = {
    "one": (PUBLIC,),
    "nested": (PUBLIC, INNER),
    "halves": (
        dataclasses.replace(PUBLIC, vips=tuple(half for vip in PUBLIC.vips for half in vip.subnets())),
    ),
    "around": (
        dataclasses.replace(
            PUBLIC,
            vips=(ip_network("192.0.2.0/23"), ip_network("203.0.113.0/26"), ip_network("2001:db8:100::/48")),
        ),
        dataclasses.replace(
            INNER, vips=tuple(ip_network(f"198.51.{n}.0/24") for n in range(9)), gateways=INNER.gateways
        ),
    ),
    "addresses": (
        dataclasses.replace(
            PUBLIC, vips=tuple(map(ip_network, ("192.0.2.10", "192.0.2.11", "2001:db8:100::10")))
        ),
    ),
}


@pytest.mark.root
@pytest.mark.bpf
@pytest.mark.parametrize("second", STAGES)
@pytest.mark.parametrize("first", STAGES)
def test_what_both_serve_is_served_at_every_point_of_a_change(
    steering: Steering, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """And what only one of them knows goes as one of them says."""
    old, new = (
        resolve_steering(dataclasses.replace(PROGRAM, networks=STAGES[name]), IFINDEXES)
        for name in (first, second)
    )
    sources = ("192.0.2.10", "192.0.2.11", "192.0.2.200", "192.0.3.1", "198.51.3.3", "2001:db8:100::10")
    pairs = [
        (source, destination)
        for source in (*sources, "2001:db8:100::8001", "2001:db8:100:7::1")
        for destination in (
            ("203.0.113.9", "10.97.1.1") if "." in source else ("2001:db8:ffff::9", "fd00:10::1")
        )
    ]
    steering.loaded.write_tables(old)
    before = {pair: steering.run(packet(*pair)) for pair in pairs}
    steering.loaded.write_tables(new)
    after = {pair: steering.run(packet(*pair)) for pair in pairs}
    steering.loaded.write_tables(old)
    seen = []

    def look(point: str) -> None:
        seen.append(point)
        for pair in pairs:
            assert steering.run(packet(*pair)) in {before[pair], after[pair]}, (point, pair)

    waits = grace.wait_for_programs

    def wait() -> None:
        look("wait")
        waits()

    monkeypatch.setattr(grace, "wait_for_programs", wait)
    with points.listening(look):
        steering.loaded.write_tables(new, only_add=True)
        # Half way, both are in force.
        for pair in pairs:
            either = {before[pair], after[pair]} - {None} or {None}
            assert steering.run(packet(*pair)) in either, pair
        steering.loaded.write_tables(new)
    assert {pair: steering.run(packet(*pair)) for pair in pairs} == after
    assert (seen.count("wait") >= 2) == (old != new)


@pytest.mark.root
@pytest.mark.bpf
def test_nobody_looks_into_the_index_while_it_is_written(
    steering: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop, wait, write, wait, start: what is read while it is copied would be neither the old nor the new."""
    old, new = (
        resolve_steering(dataclasses.replace(PROGRAM, networks=networks), IFINDEXES)
        for networks in ((PUBLIC,), (PUBLIC, INNER))
    )
    steering.loaded.write_tables(old)
    steps: list[str] = []
    kind = type(steering.loaded.map(abi.MAP_INDEX))
    update = kind.update

    def spy(self: Any, items: dict[bytes, bytes]) -> None:
        if self.name == abi.MAP_INDEX:
            how = abi.SteeringIndex.from_buffer_copy(items[bytes(4)])
            steps.append("stop" if how.state4 == how.state6 == abi.IndexState.OFF else "start")
        elif self.name in abi.INDEX_MAPS.values() and items:
            steps.append("write")
        update(self, items)

    monkeypatch.setattr(kind, "update", spy)
    monkeypatch.setattr(grace, "wait_for_programs", lambda: steps.append("wait"))
    steering.loaded.write_tables(new)
    assert steps == ["stop", "wait", "write", "write", "stop", "wait", "start"]
    steps.clear()
    steering.loaded.write_tables(new)
    assert steps == []
