# SPDX-License-Identifier: Apache-2.0
"""Up and down by answers, on a clock that the test turns."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.service.gateway_health import Health

CHECK = GatewayCheck("n", "eth0", ip_address("10.0.0.1"), CheckMethod.NEIGHBOUR, 0.2, 3, 5, 5.0)


class Clock:
    """A gateway that is asked every interval."""

    def __init__(self, health: Health) -> None:
        self.health, self.now_s, self.switches = health, 0.0, 0

    def ask(self, times: int, *, answers: bool) -> None:
        for _ in range(times):
            self.now_s += CHECK.interval_s
            note = self.health.answered if answers else self.health.missed
            self.switches += note(self.now_s)

    def until_up(self) -> float:
        """Seconds of nothing but answers until it is up again."""
        began = self.now_s
        while not self.health.is_up:
            self.ask(1, answers=True)
        return self.now_s - began


def test_down_after_as_many_misses_as_told_and_not_one_earlier() -> None:
    clock = Clock(Health(CHECK))
    clock.ask(2, answers=False)
    clock.ask(1, answers=True)
    clock.ask(2, answers=False)
    assert clock.health.is_up
    clock.ask(1, answers=False)
    assert (clock.health.is_up, clock.switches) == (False, 1)


def test_misses_around_a_time_without_questions_do_not_add_up() -> None:
    clock = Clock(Health(CHECK))
    for _ in range(5):
        clock.ask(2, answers=False)
        clock.health.interrupted()
    assert clock.health.is_up
    clock.ask(3, answers=False)
    clock.health.interrupted()
    assert not clock.health.is_up, "it was down before"


def test_up_only_after_the_hold_time_and_answers_in_a_row() -> None:
    clock = Clock(Health(CHECK))
    clock.ask(3, answers=False)
    assert 5.0 <= clock.until_up() < 5.5
    clock = Clock(Health(CHECK))
    clock.ask(100, answers=False)
    for _ in range(10):
        clock.ask(4, answers=True)
        clock.ask(1, answers=False)
    assert not clock.health.is_up, "the hold time was over long ago, but it never answered five times"
    clock.ask(5, answers=True)
    assert clock.health.is_up


def test_who_comes_and_goes_stays_out_longer_each_time_and_is_forgiven() -> None:
    clock = Clock(Health(CHECK))
    times = []
    for _ in range(7):
        clock.ask(3, answers=False)
        times.append(round(clock.until_up()))
    assert times == [5, 10, 20, 40, 80, 80, 80]
    clock.ask(int(51 / CHECK.interval_s), answers=True)
    clock.ask(3, answers=False)
    assert round(clock.until_up()) == 5


def test_known_to_be_down_from_the_start_needs_no_hold_time() -> None:
    clock = Clock(Health(CHECK, is_up=False))
    clock.ask(4, answers=True)
    assert not clock.health.is_up
    clock.ask(1, answers=True)
    assert clock.health.is_up


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=3000))
def test_flapping_never_switches_more_often_than_the_hold_time_allows(answers: list[bool]) -> None:
    clock = Clock(Health(CHECK))
    for answer in answers:
        clock.ask(1, answers=answer)
    # Down and up again take the hold time at least.
    assert clock.switches <= 2 * (clock.now_s / CHECK.hold_s) + 2
