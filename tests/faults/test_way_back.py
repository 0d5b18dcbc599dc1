# SPDX-License-Identifier: Apache-2.0
"""The way back in detail: who interferes while it is gone, what it costs, and what it may never do.

On the fake kernel; test_every_fault.py goes through all points of all changes.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from datapath import compiler, controller, in_force, points
from datapath.compiler import compile_policy
from datapath.confirmation import undo
from datapath.errors import CompileError, DatapathError, InputError, KernelError, Problem
from datapath.facts import Facts
from datapath.generations import History
from datapath.plan.model import Plan
from datapath.plan.tc import Hook
from datapath.policy import Policy
from datapath.reconcile.sysctls import ALL, rp_filter_key
from tests.fake_kernel.policies import policy
from tests.fake_kernel.site import Killed, Site, attempt, points_of, refusal

ENOMEM = refusal(errno.ENOMEM)


def number_of(names: list[str], words: str, *, last: bool = False) -> int:
    """The first or last point with these words."""
    found = [number for number, name in enumerate(names) if words in name]
    return found[-1 if last else 0]


@pytest.mark.parametrize("second", [ENOMEM, Killed])
def test_a_device_that_the_way_back_makes_again_is_on_record(site: Site, second: object) -> None:
    """Also after a second pass, when the first has deleted it, and although no record can be written any more."""
    site.begin("vlan", "ebpf")
    site.again_meddled()
    names = points_of(lambda: site.apply("two", "ebpf"))
    first = number_of(names, "write state.json", last=True)
    site.again_meddled()

    def no_room(name: str) -> Exception | BaseException:
        return ENOMEM(name) if second is ENOMEM else Killed(name)

    made: list[str] = []

    def listener(name: str) -> None:
        made.append(name)
        if len(made) - 1 == first:
            raise ENOMEM(name)
        if len(made) > first + 1 and "state.json" in name:
            raise no_room(name)

    with points.listening(listener), pytest.raises((KernelError, Killed)):
        site.apply("two", "ebpf")
    assert "eth3.5" in site.kernel.links.by_name
    assert "eth3.5" in site.directory.load().record.links
    site.apply("two", "ebpf")
    assert "eth3.5" not in site.kernel.links.by_name


def test_no_device_is_checked_less_where_all_cannot_be_put_back(site: Site) -> None:
    site.begin("none", "nft")
    before = site.kernel.snapshot()
    with points.listening(_refusing("nft transaction", f"set {ALL} from 0")), pytest.raises(KernelError):
        site.apply("two", "nft")
    assert site.kernel.sysctls[ALL] == "0"
    assert site.kernel.sysctls[rp_filter_key("eth3")] == "1", "its own value, as long as `all` is off"
    site.controller.teardown()
    assert not site.differences(before)


def test_the_daemon_lowers_nothing_while_all_cannot_be_raised(site: Site) -> None:
    """It goes on after a refusal; somebody has set `all` to 0, which the policy before had put back to 1."""
    site.begin("two", "nft")
    eth3 = rp_filter_key("eth3")
    site.kernel.sysctls |= {ALL: "1", eth3: "0"}
    with points.listening(_refusing(f"set {eth3}")):
        look = site.look()
    assert [step.describe() for step, _ in look.failed] == [f"set {eth3} from 0 to 1"]
    assert f"set {ALL} from 1 to 0" in [step.describe() for step in look.held]
    assert site.kernel.sysctls[ALL] == "1", "eth3 would not be checked at all"
    assert not site.look().failed
    assert (site.kernel.sysctls[ALL], site.kernel.sysctls[eth3]) == ("0", "1")


def test_a_foreign_filter_does_not_end_the_way_back(site: Site) -> None:
    """It takes our place on one device; what comes after that in the order goes back all the same."""
    site.begin("one", "ebpf", Hook.CLSACT)
    old = site.kernel.snapshot()
    last = number_of(points_of(lambda: site.apply("two", "ebpf")), "write state.json", last=True)
    site.again()

    def taken(name: str) -> Exception:
        del site.kernel.ingress.attached["eth1"]
        site.kernel.ingress.foreign.add("eth1")
        return ENOMEM(name)

    assert isinstance(attempt(lambda: site.apply("two", "ebpf"), {last: taken}), KernelError)
    now = site.kernel.snapshot()
    for part in ("rules", "routes", "sysctls", "table"):
        assert now[part] == old[part]
    site.kernel.ingress.foreign.clear()
    assert site.apply("one", "ebpf")
    assert not site.differences(old)


class Compiler:
    """In place of the controller's two ways to compile. Counts, and no longer knows one policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unknown: str = "") -> None:
        self.done: list[int] = []
        self.unknown = unknown
        monkeypatch.setattr(controller, "compile_policy", self)
        monkeypatch.setattr(compiler.Compiler, "plan", lambda _, policy, facts: self(policy, facts))

    def __call__(self, policy: Policy, facts: Facts) -> Plan:
        self.done.append(len(policy.networks))
        if any(network.name == self.unknown for network in policy.networks):
            raise CompileError((Problem(("networks", 0), "no longer served"),))
        return compile_policy(policy, facts)


def test_the_policy_before_is_compiled_only_for_the_way_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.begin("one", "nft")
    before = site.kernel.snapshot()
    compiled = Compiler(monkeypatch)
    with points.listening(_refusing("nft transaction")), pytest.raises(KernelError):
        site.apply("two", "nft")
    assert compiled.done == [2, 1]
    assert not site.differences(before)
    compiled.done.clear()
    site.apply("two", "nft")
    assert compiled.done == [2]


def test_a_policy_that_no_longer_compiles_is_replaced(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.begin("two", "nft")
    site.apply("one", "nft")
    after = site.kernel.snapshot()
    site.again()
    Compiler(monkeypatch, unknown="b")
    with points.listening(_refusing("delete rule")), pytest.raises(KernelError, match="delete rule"):
        site.apply("one", "nft")
    assert History(site.directory).numbers() == [1], "the new one is not in force"
    site.apply("one", "nft")
    assert not site.differences(after)


def test_a_policy_that_cannot_be_read_any_more_is_replaced(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.begin("two", "nft")

    def unreadable(_text: bytes, _name: str) -> object:
        raise InputError("a newer version does not know this key")

    monkeypatch.setattr(in_force, "parse_policy", unreadable)
    with points.listening(_refusing("delete rule")), pytest.raises(KernelError, match="delete rule"):
        site.apply("one", "nft")
    assert site.apply("one", "nft")


def test_a_daemon_carries_marks_over_once(site: Site) -> None:
    """An apply that was killed over a change of marks has left the new ones: they become the network's own."""
    site.begin("two", "nft")
    names = points_of(lambda: site.apply("mark", "nft"))
    site.again()
    attempt(lambda: site.apply("mark", "nft"), {number_of(names, "write history"): Killed})
    assert any("carry connections of b" in step.describe() for step in site.look().done)
    assert not site.look().done
    drift = site.controller.status()
    assert drift is not None
    assert not drift.steps


def test_state_that_cannot_be_written_is_written_later(site: Site, tmp_path: Path) -> None:
    del tmp_path
    site.begin("two", "nft")
    with points.listening(_refusing("nft transaction", "state.json")), pytest.raises(DatapathError):
        site.apply("one", "nft")
    assert not site.look().failed


def _refusing(*words: str) -> points.Listener:
    """Whatever has one of these in its name is refused."""

    def listener(name: str) -> None:
        if any(part in name for part in words):
            raise ENOMEM(name)

    return listener


def test_a_kill_leaves_an_unconfirmed_change_on_probation(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is undone, and while another policy takes its place: it never stays without being confirmed."""
    monkeypatch.setattr(controller, "start_guardian", lambda *_, **__: None)
    site.begin("one", "ebpf")
    before = site.kernel.snapshot()

    def on_probation() -> str:
        site.again()
        site.controller.apply(policy("two", "ebpf"), confirm_s=600)
        pending = site.directory.load().pending
        assert pending is not None
        return pending.token

    def undone() -> object:
        return undo(site.directory, site.controller, token)

    for way in (undone, lambda: site.apply("vips", "ebpf"), lambda: site.apply("none", "")):
        token = on_probation()
        for number, name in enumerate(points_of(way)):
            token = on_probation()
            assert isinstance(attempt(way, {number: Killed}), Killed), name
            undone()
            assert site.directory.load().policy_name == "one.yaml", f"killed before {name}"
            assert not site.differences(before), f"killed before {name}"
