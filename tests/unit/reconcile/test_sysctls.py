# SPDX-License-Identifier: Apache-2.0
"""rp_filter: only our devices lose the kernel's check, at every moment, and everything is put back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.compiler.host import NO_SOURCE_LOOKUP, STRICT_ARP
from datapath.kernel import sysctl
from datapath.plan.rtnl import Sysctl
from datapath.reconcile.actual import Record, Saved
from datapath.reconcile.sysctls import ALL, Caution, diff_sysctls, inherited, rp_filter_key, split_by_device

DEVICES = ("default", "lo", "eth0", "eth1", "eth2")
LEVELS = st.sampled_from(["0", "1", "2"])
NODES = st.fixed_dictionaries({rp_filter_key(device): LEVELS for device in ("all", *DEVICES)})
EXEMPTIONS = st.lists(st.sets(st.sampled_from(["eth0", "eth1", "eth2"])), min_size=1, max_size=4)

fast = settings(max_examples=300, deadline=None, derandomize=True)


class Kernel:
    """The values of a node, and what apply remembers of them."""

    def __init__(self, values: dict[str, str], settings_: tuple[Sysctl, ...] = ()) -> None:
        self.values = dict(values)
        self.settings = settings_
        self.record = Record()

    def effective(self, device: str) -> int:
        """What the kernel checks: max(all, device), net/ipv4/fib_frontend.c."""
        return max(int(self.values[ALL]), int(self.values[rp_filter_key(device)]))

    def apply(self, exempt: set[str]) -> list[dict[str, int]]:
        """Carry out the steps; the effective levels after each of them."""
        changes = diff_sysctls(self.values, self.settings if exempt else (), exempt, self.record)
        moments = []
        for step in (*changes.loosen, *changes.tighten):
            assert self.values[step.key] == step.old != step.new
            self.values[step.key] = step.new
            moments.append({device: self.effective(device) for device in DEVICES})
        kept = {key: saved for key, saved in changes.saved.items() if key not in changes.released}
        self.record = Record(kept)
        return moments


@fast
@given(NODES, EXEMPTIONS)
def test_others_are_checked_as_before_at_every_moment(
    values: dict[str, str], exemptions: list[set[str]]
) -> None:
    kernel = Kernel(values)
    before = {device: kernel.effective(device) for device in DEVICES}
    last: set[str] = set()
    for exempt in [*exemptions, set[str]()]:
        moments = kernel.apply(exempt)
        for device in set(DEVICES) - exempt - last:
            assert {moment[device] for moment in moments} <= {before[device]}
        for device in DEVICES:
            assert kernel.effective(device) == (0 if device in exempt else before[device])
        assert kernel.apply(exempt) == [], "a second apply has nothing to do"
        last = exempt
    assert kernel.values == values
    assert kernel.record.sysctls == {}


@fast
@given(NODES, st.sets(st.sampled_from(["eth0", "eth1"]), min_size=1), st.integers(0, 12))
def test_an_apply_that_is_killed_anywhere_is_undone(
    values: dict[str, str], exempt: set[str], done: int
) -> None:
    """The record is written before the first step, so it knows what any number of them changed."""
    kernel = Kernel(values)
    changes = diff_sysctls(values, (), exempt, Record())
    for step in changes.loosen[:done]:
        kernel.values[step.key] = step.new
    kernel.record = Record(changes.saved)
    kernel.apply(set())
    assert kernel.values == values


@fast
@given(NODES, EXEMPTIONS, st.integers(0, 12), st.sets(st.sampled_from(["eth0", "eth1", "eth2"])))
def test_a_change_that_is_killed_anywhere_is_completed_or_undone(
    values: dict[str, str], exemptions: list[set[str]], done: int, last: set[str]
) -> None:
    """From any set of devices to any other: whatever comes next, every device is checked as it must be."""
    kernel = Kernel(values)
    before = {device: kernel.effective(device) for device in DEVICES}
    *earlier, killed = exemptions
    for exempt in earlier:
        kernel.apply(exempt)
    changes = diff_sysctls(kernel.values, (), killed, kernel.record)
    for step in (*changes.loosen, *changes.tighten)[:done]:
        kernel.values[step.key] = step.new
    kernel.record = Record(changes.saved)
    kernel.apply(last)
    for device in DEVICES:
        assert kernel.effective(device) == (0 if device in last else before[device])
    kernel.apply(set())
    assert kernel.values == values


@fast
@given(NODES, EXEMPTIONS, st.sets(st.integers(0, 12), max_size=3))
def test_nobody_is_checked_less_where_steps_are_refused(
    values: dict[str, str], exemptions: list[set[str]], refused: set[int]
) -> None:
    """Whoever goes on after a refusal; and the next change finds the way back from there."""
    kernel = Kernel(values)
    before = {device: kernel.effective(device) for device in DEVICES}
    last: set[str] = set()
    for exempt in [*exemptions, set[str]()]:
        changes = diff_sysctls(kernel.values, (), exempt, kernel.record)
        caution = Caution()
        for number, step in enumerate((*changes.loosen, *changes.tighten)):
            if number in refused:
                caution.not_done(step)
            elif not caution.forbids(step):
                kernel.values[step.key] = step.new
            for device in set(DEVICES) - exempt - last:
                assert kernel.effective(device) >= before[device]
        kernel.record = Record(changes.saved)
        last |= exempt
    kernel.apply(set())
    assert kernel.values == values


def test_a_device_that_is_no_longer_exempt_is_checked_again_at_the_end() -> None:
    kernel = Kernel({rp_filter_key(device): "1" for device in ("all", *DEVICES)})
    kernel.apply({"eth0", "eth1"})
    changes = diff_sysctls(kernel.values, (), {"eth0"}, kernel.record)
    assert changes.loosen == ()
    assert [(step.key, step.new) for step in changes.tighten] == [(rp_filter_key("eth1"), "1")]
    kernel.values[ALL] = "2"
    changes = diff_sysctls(kernel.values, (), {"eth0"}, kernel.record)
    keys = [step.key for step in changes.loosen]
    assert keys.index(rp_filter_key("eth1")) < keys.index(ALL), "it is checked at this moment, and stays so"


def test_what_a_device_to_come_inherits_is_all_that_a_plan_sets() -> None:
    assert {*STRICT_ARP, *NO_SOURCE_LOOKUP, "rp_filter"} <= set(sysctl._INHERITED)


def test_a_record_grows_without_forgetting() -> None:
    first = Record({"a": Saved("0", "1 2"), "b": Saved("0", "1")}, frozenset({"x"}), frozenset({"p"}))
    later = Record({"a": Saved("5", "2 3")}, frozenset({"y"}))
    assert first.also(later) == Record(
        {"a": Saved("5", "1 2 3"), "b": Saved("0", "1")}, frozenset({"x", "y"}), frozenset({"p"})
    )
    assert first.also(first) == first


@fast
@given(NODES, st.sampled_from(["lo", "eth2"]), LEVELS)
def test_what_somebody_else_sets_later_stays(values: dict[str, str], device: str, level: str) -> None:
    """An administrator's own value of another device is theirs: it is no drift, now or in any later round."""
    kernel = Kernel(values)
    kernel.apply({"eth0"})
    kernel.values[rp_filter_key(device)] = level
    for _ in range(3):
        assert kernel.apply({"eth0"}) == []
    assert kernel.values[rp_filter_key(device)] == level


def test_our_own_device_is_healed() -> None:
    kernel = Kernel({rp_filter_key(device): "1" for device in ("all", *DEVICES)})
    kernel.apply({"eth0"})
    kernel.values |= {ALL: "2", rp_filter_key("eth0"): "1"}
    kernel.apply({"eth0"})
    assert kernel.effective("eth0") == 0
    assert kernel.effective("eth1") == 2, "as somebody wanted it for all"
    kernel.apply(set())
    assert kernel.values[ALL] == "2", "their later value is put back, not the older one"


def test_a_setting_comes_goes_and_respects_a_later_value() -> None:
    key = "net/ipv4/conf/eth0/arp_ignore"
    record = Record()
    changes = diff_sysctls({key: "0"}, [Sysctl(key, "1")], (), record)
    assert [(step.key, step.new) for step in changes.loosen] == [(key, "1")]
    assert changes.saved == {key: Saved("0", "1")}
    after = Record(changes.saved)
    assert [step.new for step in diff_sysctls({key: "1"}, (), (), after).tighten] == ["0"]
    assert diff_sysctls({key: "2"}, (), (), after).tighten == ()


def test_a_device_that_is_gone_is_passed_over() -> None:
    record = Record({rp_filter_key("gone"): Saved("0", "1")})
    changes = diff_sysctls({ALL: "0"}, [Sysctl("net/ipv4/conf/gone/arp_ignore", "1")], (), record)
    assert (changes.loosen, changes.tighten) == ((), ())
    assert changes.released == {rp_filter_key("gone")}


def test_a_device_to_come_starts_with_the_values_of_default() -> None:
    actual = {rp_filter_key("default"): "2", ALL: "1", "net/ipv4/conf/default/arp_ignore": "0"}
    values = inherited(actual, ["eth0.100"])
    assert values == {rp_filter_key("eth0.100"): "2", "net/ipv4/conf/eth0.100/arp_ignore": "0"}
    steps = diff_sysctls(actual | values, (), ["eth0.100"], Record()).loosen
    rest, theirs = split_by_device(steps, frozenset({"eth0.100"}))
    assert [step.key for step in theirs] == [rp_filter_key("eth0.100")]
    assert ALL in {step.key for step in rest}
