# SPDX-License-Identifier: Apache-2.0
"""Marks, tables and slots: the same for the same input, and they never move under a network."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.compiler.ids import TABLE_BASE
from datapath.errors import CompileError
from datapath.facts import Facts, IdFacts
from datapath.plan.model import NetworkIds
from datapath.policy import Policy, capacity, deposit
from tests.unit.compiler.walk import facts_after, policy

fast = settings(max_examples=40, deadline=None, derandomize=True)

NAMES = st.sets(st.from_regex(r"[a-d][a-d0-9]{0,2}", fullmatch=True), min_size=1, max_size=12)
MASKS = st.sampled_from([0x0FFF0000, 0xF, 0x0F00, 0x80402010, 0xFFFF0000])


def ids(subject: Policy, facts: Facts | None = None) -> dict[str, NetworkIds]:
    return {item.name: item for item in compile_policy(subject, facts or Facts()).ids}


def of_names(names: list[str], mask: int = 0x0FFF0000, **pins: dict[str, Any]) -> Policy:
    return policy(({"name": name} | pins.get(name, {}) for name in names), marks={"mask": mask})


@fast
@given(NAMES, st.integers(0, 2**32))
def test_order_of_the_file_does_not_matter(names: set[str], seed: int) -> None:
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    assert ids(of_names(shuffled)) == ids(of_names(sorted(names)))


@fast
@given(NAMES, MASKS)
def test_ids_are_distinct_and_inside_their_ranges(names: set[str], mask: int) -> None:
    found = ids(of_names(sorted(names), mask)).values()
    assert len(found) == len(names)
    for kind in ("fwmark", "table", "slot"):
        numbers = [getattr(item, kind) for item in found]
        assert len(set(numbers)) == len(numbers)
        assert all(numbers)
    assert all(item.fwmark & ~mask == 0 for item in found)
    assert all(item.table > 700_000 for item in found)


@fast
@given(NAMES, NAMES, NAMES, MASKS)
def test_ids_never_move_while_the_network_stays(
    first: set[str], second: set[str], third: set[str], mask: int
) -> None:
    facts = Facts()
    before: dict[str, NetworkIds] = {}
    for names in (first, second, third):
        plan = compile_policy(of_names(sorted(names), mask), facts)
        now = {item.name: item for item in plan.ids}
        assert {name: now[name] for name in before.keys() & now.keys()} == {
            name: before[name] for name in before.keys() & now.keys()
        }
        before, facts = now, facts_after(plan)


def test_the_lowest_free_numbers_by_name() -> None:
    assert ids(of_names(["c", "a", "b"])) == {
        name: NetworkIds(name, number << 16, 700_000 + number, number)
        for number, name in enumerate("abc", start=1)
    }


def test_removal_frees_the_ids_for_the_next_change() -> None:
    before = facts_after(compile_policy(of_names(["a", "b", "c"]), Facts()))
    plan = compile_policy(of_names(["a", "c", "y"]), before)
    after = {item.name: item for item in plan.ids}
    # Connections of b still carry its mark while this change runs.
    assert after["y"] == NetworkIds("y", 0x40000, 700_004, 4)
    assert after["c"] == NetworkIds("c", 0x30000, 700_003, 3)
    then = ids(of_names(["a", "c", "y", "z"]), facts_after(plan))
    assert then["z"] == NetworkIds("z", 0x20000, 700_002, 2)


def test_ids_of_this_very_change_are_taken_if_no_others_are_left() -> None:
    before = facts_after(compile_policy(of_names(["a", "b", "c"], 0x30000), Facts()))
    after = ids(of_names(["a", "c", "z"], 0x30000), before)
    assert after["z"].fwmark == 0x20000


def test_pins_come_first_and_the_others_step_aside() -> None:
    found = ids(of_names(["a", "b", "c"], c={"mark": 0x10000, "table": 700_001}))
    assert (found["c"].fwmark, found["c"].table) == (0x10000, 700_001)
    assert len({item.fwmark for item in found.values()}) == 3
    assert len({item.table for item in found.values()}) == 3


def test_a_pin_moves_the_network_to_its_new_number_and_nobody_else() -> None:
    before = facts_after(compile_policy(of_names(["a", "b", "c"]), Facts()))
    found = ids(of_names(["a", "b", "c"], b={"mark": 0x70000, "table": 100}), before)
    assert (found["b"].fwmark, found["b"].table) == (0x70000, 100)
    assert found["a"] == NetworkIds("a", 0x10000, 700_001, 1)
    assert found["c"] == NetworkIds("c", 0x30000, 700_003, 3)


def test_a_pin_that_is_taken_off_stays() -> None:
    """The number is in the kernel: taking the line out of the file is no reason to move."""
    before = facts_after(compile_policy(of_names(["a"], a={"mark": 0x70000, "table": 100}), Facts()))
    assert ids(of_names(["a"]), before)["a"] == NetworkIds("a", 0x70000, 100, 1)


def test_a_new_mask_gives_new_marks_and_keeps_the_tables() -> None:
    before = facts_after(compile_policy(of_names(["a", "b"], a={"table": 123}), Facts()))
    found = ids(of_names(["a", "b"], mask=0x0F00), before)
    assert found["a"] == NetworkIds("a", 0x0100, 123, 1)
    assert found["b"] == NetworkIds("b", 0x0200, 700_002, 2)


@pytest.mark.parametrize("mask", [0x3, 0x80000001, 0x00F00000])
def test_a_full_mask_still_has_room_for_everybody(mask: int) -> None:
    names = [f"n{number}" for number in range(capacity(mask))]
    found = ids(of_names(names, mask))
    assert {item.fwmark for item in found.values()} == {deposit(i + 1, mask) for i in range(len(names))}


def test_a_full_mask_with_a_pin_in_the_middle_and_numbers_in_the_kernel() -> None:
    """Pins of the new file, numbers of the old one, and the last free value for the rest."""
    before = facts_after(compile_policy(of_names(["x", "y"], mask=0x3), Facts()))
    found = ids(of_names(["x", "y", "z"], mask=0x3, z={"mark": 0x1}), before)
    assert {name: item.fwmark for name, item in found.items()} == {"x": 0x3, "y": 0x2, "z": 0x1}


def test_no_room_left_is_an_error_with_a_position() -> None:
    names = ["a", "b"]
    with pytest.raises(CompileError) as caught:
        ids(of_names(names, mask=0x100))
    (problem,) = caught.value.problems
    assert problem.path == ("networks", 1)
    assert "holds 1" in problem.message


@pytest.mark.parametrize(
    "nonsense",
    [
        IdFacts(name="a", fwmark=0x1, table=0, slot=0),
        IdFacts(name="a", fwmark=0xFFFFFFFF, table=254, slot=65535),
        IdFacts(name="stranger", fwmark=0x10000, table=700_001, slot=1),
    ],
)
def test_odd_numbers_from_the_kernel_do_no_harm(nonsense: IdFacts) -> None:
    found = ids(of_names(["a", "b"]), Facts(ids=(nonsense,), fwmark_mask=0x0FFF0000))
    assert all(item.fwmark and item.fwmark & ~0x0FFF0000 == 0 for item in found.values())
    assert all(item.table not in {0, 253, 254, 255} for item in found.values())
    assert found["a"].fwmark != found["b"].fwmark


def test_no_table_lies_in_a_list_that_every_look_up_walks() -> None:
    """FIB_TABLE_HASHSZ is 256: tables 254 and 255 share their lists with every id that has these low bits."""
    plan = compile_policy(policy([{}] * 1000), Facts())
    tables = [ids.table for ids in plan.ids]
    assert len(set(tables)) == len(tables)
    assert tables[0] == TABLE_BASE + 1
    assert not {table % 256 for table in tables} & {253, 254, 255}
    assert compile_policy(policy([{}] * 1000), facts_after(plan)).ids == plan.ids


def test_a_table_that_an_earlier_version_chose_in_such_a_list_stays() -> None:
    known = IdFacts(name="n0", fwmark=0x00010000, table=TABLE_BASE + 158, slot=1)
    assert known.table % 256 == 254
    plan = compile_policy(policy([{}, {}]), Facts(ids=(known,), fwmark_mask=0x0FFF0000))
    assert [ids.table for ids in plan.ids] == [known.table, TABLE_BASE + 2]
