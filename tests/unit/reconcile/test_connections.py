# SPDX-License-Identifier: Apache-2.0
"""Marks that end together are few questions, and exactly these marks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.policy.marks import capacity, deposit
from datapath.reconcile.connections import forgotten
from datapath.reconcile.steps import ForgetConnections

MASK = 0x0FFF0000


def is_forgotten(mark: int, steps: tuple[ForgetConnections, ...]) -> bool:
    return any(mark & step.fwmask == step.fwmark for step in steps)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((0x0FF0, 0x10F00, 0xFF, 0x80000001)), st.data())
def test_exactly_these_marks_are_forgotten(mask: int, data: st.DataObject) -> None:
    room = capacity(mask)
    chosen = data.draw(st.frozensets(st.integers(1, room), max_size=room))
    steps = forgotten((deposit(index, mask), mask) for index in chosen)
    foreign = 0x2 if not mask & 0x2 else 0x40000
    for index in range(room + 1):
        mark = deposit(index, mask)
        assert is_forgotten(mark, steps) == (index in chosen)
        assert is_forgotten(mark | foreign, steps) == (index in chosen)
    assert len(steps) <= len(chosen)
    assert all(step.fwmark and step.fwmark & ~step.fwmask == 0 for step in steps)


def test_no_mark_is_in_two_questions() -> None:
    steps = forgotten((deposit(index, MASK), MASK) for index in (1, 2, 3, 7, 6, 5, 9))
    assert steps == (
        ForgetConnections(0x00010000, MASK),
        ForgetConnections(0x00020000, 0x0FFE0000),
        ForgetConnections(0x00050000, MASK),
        ForgetConnections(0x00060000, 0x0FFE0000),
        ForgetConnections(0x00090000, MASK),
    )


def test_all_networks_of_a_large_policy() -> None:
    """The kernel walks all connections for each: 4,094 times was most of a teardown."""
    steps = forgotten((deposit(index, MASK), MASK) for index in range(1, 4095))
    assert len(steps) == 22


def test_marks_of_two_masks_stay_apart() -> None:
    steps = forgotten([(0x10, 0x30), (0x20, 0x30), (0x30, 0x30), (0x10, 0x10)])
    assert steps == (
        ForgetConnections(0x10, 0x10),
        ForgetConnections(0x10, 0x30),
        ForgetConnections(0x20, 0x20),
    )
