# SPDX-License-Identifier: Apache-2.0
"""The order of an apply: compile, look, refuse or change, verify, remember; and back if anything fails."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass

from datapath.compiler import Compiler, compile_policy
from datapath.errors import (
    CompileError,
    ConflictError,
    DatapathError,
    EbpfError,
    InputError,
)
from datapath.facts import Facts, IdFacts
from datapath.generations import Generation, History
from datapath.in_force import parse_in_force
from datapath.kernel.executor import Executor
from datapath.kernel.guardian import new_pending, start_guardian
from datapath.kernel.observer import Sight, observe, observe_facts
from datapath.log import get_logger
from datapath.plan.model import MarkChange, NetworkIds, Note, Plan
from datapath.plan.render import render_plan
from datapath.policy import Backend as BackendWish
from datapath.policy import LoadedPolicy, Policy, Steering, parse_policy
from datapath.probing import ProbeUse, Probing
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.conflicts import find_conflicts
from datapath.reconcile.diff import ChangeSet, reconcile
from datapath.reconcile.present import carried_plan
from datapath.reconcile.steps import Step
from datapath.state import Pending, State, StateDirectory, current_netns
from datapath.undertaking import Undertaking


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did.

    Attributes:
        steps: in order; empty where everything was right already.
        warnings: about probes that fail and did not count.
    """

    plan: Plan
    steps: tuple[Step, ...]
    generation: int
    warnings: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """The live state against the policy in force.

    Attributes:
        steps: what an apply would do; empty where nothing drifted.
        actual: as observed.
        waiting: devices that are missing or down; what hangs on them is not among the steps.
    """

    plan: Plan
    steps: tuple[Step, ...]
    actual: Actual
    state: State
    waiting: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A change that was compiled, compared and checked, and may now be carried out."""

    loaded: LoadedPolicy
    facts: Facts
    plan: Plan
    actual: Actual
    changes: ChangeSet
    sight: Sight


class Controller:
    """Everything that changes or compares a namespace goes through here.

    Args:
        directory: of this namespace.
        wait_for_devices: serve the other networks while a device is missing or down, instead of refusing.
        sight: what is known of the kernel at this moment, for who hears of changes; default: look afresh each time.
        compiler: for who compiles elsewhere, too.
    """

    def __init__(
        self,
        directory: StateDirectory,
        *,
        wait_for_devices: bool = False,
        sight: Callable[[], Sight] = Sight,
        compiler: Compiler | None = None,
    ) -> None:
        self._directory = directory
        self._wait_for_devices = wait_for_devices
        self._sight = sight
        self._compiler = compiler or Compiler()
        self._log = get_logger()

    def facts(self) -> Facts:
        """Facts of this host, ids of ours included."""
        return observe_facts(self._load(), policies=(str(Steering.DIRECT),))

    def _load(self) -> State:
        """The state; without a daemon nobody would find out that a gateway is back."""
        state = self._directory.load()
        if not state.gateways_down or self._directory.has_daemon():
            return state
        return dataclasses.replace(state, gateways_down={})

    def plan(self, loaded: LoadedPolicy) -> Plan:
        """Compile for this host.

        Raises:
            PolicyError: with positions, also for what only this host makes wrong.
        """
        return compile_located(loaded, self.facts())

    def preview(self, loaded: LoadedPolicy) -> Drift:
        """What an apply would do here, checked by nft, the kernel and the verifier; changes nothing.

        Raises:
            PolicyError: the policy cannot hold on this host.
            ConflictError: something of others is in the way.
            KernelError: a step would be refused.
        """
        state = self._load()
        prepared = self._prepare(loaded, state)
        return Drift(prepared.plan, prepared.changes.steps, prepared.actual, state)

    def apply(
        self,
        loaded: LoadedPolicy,
        *,
        confirm_s: float | None = None,
        probes: ProbeUse = ProbeUse.JUDGE,
    ) -> Applied:
        """Make the namespace as the policy says.

        Args:
            loaded: the policy.
            confirm_s: go back by itself after so many seconds, unless `confirm` comes.
            probes: SKIP also says that this goes back to what was good, and is nobody's new change.

        Raises:
            PolicyError: the policy is wrong; nothing was changed.
            ConflictError: something of others is in the way; nothing was changed.
            KernelError: a step failed; everything is as before.
            ProbeError: a probe of the policy fails; everything is as before.
        """
        with self._directory.locked():
            state = dataclasses.replace(self._load(), netns=current_netns())
            prepared = self._prepare(loaded, state)
            plan, steps = prepared.plan, prepared.changes.steps
            if not steps and loaded.source.text == state.policy:
                return Applied(plan, steps, state.generation)
            new = state if probes is ProbeUse.SKIP else dataclasses.replace(state, undone=None)
            if not steps and probes is ProbeUse.JUDGE:
                probes = ProbeUse.REPORT
            probing = Probing(loaded, probes, prepared.changes.waiting)
            undertaking = Undertaking(self._directory, state.record)
            try:
                probing.try_before(lambda: self._policy_in_force(state), state.ids)
                done = self._put_in_force(prepared, new, confirm_s, probing, undertaking)
            except (DatapathError, KeyboardInterrupt) as error:
                self._log.warning("apply_failed", error=str(error))
                prepared.sight.forget("*")
                History(self._directory).discard(state.generation + 1)
                undertaking.roll_back(lambda: _previous_plan(state, prepared), state)
                raise
            self._log.info("policy_applied", steps=len(steps), networks=len(plan.ids))
            return Applied(plan, steps, done.generation, probing.warnings)

    def rollback(self, number: int | None = None) -> Applied:
        """Apply an earlier policy again.

        Args:
            number: generation; None means the one before the present policy, or, while a change waits for
                confirmation, the one before that change.

        Raises:
            InputError: there is no such generation.
            DatapathError: as `apply`.
        """
        state = self._directory.load()
        if number is None:
            number = self._previous_generation(state)
        if number == 0:
            return Applied(Plan(state.fwmark_mask), self.teardown(), 0)
        generation = History(self._directory).get(number)
        loaded = parse_policy(generation.policy.encode(), generation.policy_name)
        return self.apply(loaded, probes=ProbeUse.SKIP)

    def _previous_generation(self, state: State) -> int:
        if state.pending is not None:
            return state.pending.previous
        history = History(self._directory)
        for number in reversed(history.numbers()):
            if number < state.generation and history.get(number).policy != state.policy:
                return number
        raise InputError(
            "there is no earlier policy to go back to", hint="`datapath teardown` removes everything"
        )

    def _remember(self, state: State, plan: Plan) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        History(self._directory).add(
            Generation(state.generation, now, state.policy_name, state.policy, render_plan(plan))
        )

    def _prepare(self, loaded: LoadedPolicy, state: State) -> _Prepared:
        """Compile, look, refuse conflicts, and let the kernel check; nftables serves where eBPF is refused."""
        sight = self._sight()
        facts = observe_facts(state, sight, policies=(loaded.source.text, state.policy))
        try:
            return self._preflight(loaded, facts, state, sight)
        except EbpfError as error:
            if loaded.policy.backend is not BackendWish.AUTO:
                raise
            self._log.warning("ebpf_refused", reason=str(error))
            refused = facts.model_copy(update={"ebpf_refused": str(error)})
            return self._preflight(loaded, refused, state, sight)

    def _preflight(self, loaded: LoadedPolicy, facts: Facts, state: State, sight: Sight) -> _Prepared:
        plan = compile_located(loaded, facts, refuse=not self._wait_for_devices, compiled=self._compiler.plan)
        actual = observe(plan, state, sight)
        carried = carried_plan(plan, actual.links) if self._wait_for_devices else plan
        _refuse_conflicts(actual, carried, state.record)
        changes = reconcile(
            actual, plan, state.record, forget=_forget(plan, facts), unmark=_unmark(plan, facts)
        )
        if changes.waiting and not self._wait_for_devices:
            raise ConflictError(
                f"devices are down or cannot be made yet: {', '.join(sorted(changes.waiting))}",
                hint="nothing was changed; set them (and what they lie on) up",
            )
        with Executor() as executor:
            for step in changes.steps:
                executor.check(step)
        return _Prepared(loaded, facts, plan, actual, changes, sight)

    def teardown(self) -> tuple[Step, ...]:
        """Remove everything of ours and put back what was there.

        Raises:
            KernelError: a step failed; what is left is found by the next teardown.
        """
        with self._directory.locked():
            self._directory.require_writable()
            state = self._directory.load()
            empty = Plan(state.fwmark_mask)
            sight = self._sight()
            ids = observe_facts(state, sight)
            actual = observe(empty, state, sight)
            mask = ids.fwmark_mask
            forget = tuple((item.fwmark, mask) for item in ids.ids if item.fwmark)
            changes = reconcile(actual, empty, state.record, forget=forget)
            undertaking = Undertaking(self._directory, state.record)
            if changes.steps:
                undertaking.run(changes.steps)
                self._log.info("policy_removed", steps=len(changes.steps))
            undertaking.verify(empty, dataclasses.replace(state, record=changes.after), sight, changes.steps)
            self._directory.clear()
            return changes.steps

    def status(self) -> Drift | None:
        """The policy in force against the kernel; None where no policy is in force."""
        state = self._directory.load()
        if not state.policy:
            return None
        loaded = parse_in_force(state)
        sight = Sight()
        plan = compile_located(loaded, facts_in_force(state, sight), refuse=False)
        actual = observe(plan, state, sight)
        changes = reconcile(actual, plan, state.record)
        return Drift(plan, changes.steps, actual, state, changes.waiting)

    def _policy_in_force(self, state: State) -> Policy | None:
        """For the probes; one that a newer version no longer understands does not stand in the way of the next."""
        try:
            return _policy_in_force(state)
        except InputError as error:
            self._log.warning("previous_policy_unreadable", error=str(error), hint=error.hint)
            return None

    def _put_in_force(
        self,
        prepared: _Prepared,
        state: State,
        confirm_s: float | None,
        probing: Probing,
        undertaking: Undertaking,
    ) -> State:
        """Write down what is about to become ours, carry it out, verify, probe, and remember the policy."""
        loaded, plan, changes = prepared.loaded, prepared.plan, prepared.changes
        record = changes.after
        probation = _probation(state, confirm_s) if confirm_s else None
        # Killed from here on, a change on probation that this one replaces or undoes is still on probation.
        before = dataclasses.replace(state, pending=probation or state.pending)
        if changes.steps or probation:
            undertaking.announce(before, changes.before)
        if probation:
            start_guardian(self._directory, probation, has_probes=bool(loaded.policy.probes))
        if changes.steps:
            undertaking.run(changes.steps)
            record = undertaking.verify(
                plan.settled,
                dataclasses.replace(before, record=record),
                prepared.sight,
                changes.steps,
            )
        watched = probing.judge(plan.ids)
        done = dataclasses.replace(
            before,
            pending=probation and dataclasses.replace(probation, watched=watched),
            record=record,
            ids=id_facts(plan.ids),
            fwmark_mask=plan.fwmark_mask,
            generation=state.generation + 1,
            policy=loaded.source.text,
            policy_name=loaded.source.filename,
            ebpf_refused=prepared.facts.ebpf_refused,
        )
        # The state comes last: what it speaks of is there, and until then the policy before is the one in force.
        self._remember(done, plan)
        self._directory.save(done)
        return done


def facts_in_force(state: State, sight: Sight | None = None) -> Facts:
    """This host's facts, with the backend that the last apply found possible."""
    return observe_facts(state, sight).model_copy(update={"ebpf_refused": state.ebpf_refused})


def compile_located(
    loaded: LoadedPolicy,
    facts: Facts,
    *,
    refuse: bool = True,
    compiled: Callable[[Policy, Facts], Plan] = compile_policy,
) -> Plan:
    """Compile; problems that only this host makes get their positions in the file.

    Args:
        loaded: the policy.
        facts: of the host.
        refuse: what the host cannot serve as it is now is a problem; else it is only left out.
        compiled: who does it.

    Raises:
        PolicyError: the policy cannot hold on this host.
    """
    try:
        plan = compiled(loaded.policy, facts)
    except CompileError as error:
        raise loaded.source.error(error.problems) from error
    if refuse and plan.refusals:
        raise loaded.source.error(plan.refusals)
    return plan


def _policy_in_force(state: State) -> Policy | None:
    return parse_in_force(state).policy if state.policy else None


def _previous_plan(state: State, change: _Prepared) -> Plan:
    """What to go back to: the policy in force, or nothing.

    Args:
        state: before the change.
        change: that is undone; its facts are from before it, with what both policies need to know.

    Raises:
        InputError: this version or this host no longer knows how.
    """
    policy = _policy_in_force(state)
    if policy is None:
        return Plan(state.fwmark_mask)
    moved = {ids.name: ids.zone for ids in observe_facts(state).ids} if change.plan.zone_changes else {}
    facts = change.facts.model_copy(update={"ebpf_refused": state.ebpf_refused, "live_zones": moved})
    return compile_policy(policy, facts)


def _probation(state: State, seconds: float) -> Pending:
    """Of a change that goes back to what is in force now, or to what that would go back to."""
    previous = state.pending.previous if state.pending else state.generation if state.policy else 0
    return new_pending(previous, seconds)


def _refuse_conflicts(actual: Actual, plan: Plan, record: Record) -> None:
    conflicts = find_conflicts(actual, plan, record)
    if conflicts:
        raise ConflictError(
            "this node is not as the policy needs it:\n" + "\n".join(f"  - {text}" for text in conflicts),
            hint="nothing was changed",
        )


def _forget(plan: Plan, facts: Facts) -> tuple[tuple[int, int], ...]:
    """Marks that were a network's and are no longer that network's, unless its connections are carried over."""
    kept = {(ids.name, ids.fwmark) for ids in plan.ids}
    carried = {change.name for change in plan.mark_changes}
    carried |= {network.name for network in plan.steering.networks}
    return tuple(
        (item.fwmark, facts.previous_mask)
        for item in facts.previous_ids
        if item.fwmark and (item.name, item.fwmark) not in kept and item.name not in carried
    )


def _unmark(plan: Plan, facts: Facts) -> tuple[MarkChange, ...]:
    """Networks that are steered directly from now on: their connections stay, and give the mark back."""
    steered = {network.name for network in plan.steering.networks}
    return tuple(
        MarkChange(item.name, item.fwmark, facts.previous_mask, 0, facts.previous_mask)
        for item in facts.previous_ids
        if item.fwmark and item.name in steered
    )


def id_facts(ids: tuple[NetworkIds, ...]) -> tuple[IdFacts, ...]:
    """As the state keeps them."""
    return tuple(
        IdFacts(name=item.name, fwmark=item.fwmark, table=item.own_table, slot=item.slot, zone=item.zone)
        for item in ids
    )
