# SPDX-License-Identifier: Apache-2.0
"""One look at the kernel against the policy in force, and the repair of what differs.

Unlike an apply, a repair goes forward only: every step that can be done is done, what fails is tried again
later, and nothing is rolled back, because each object that is right again serves somebody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from datapath.compiler import Compiler, with_members
from datapath.compiler.gateways import rerouted
from datapath.controller import facts_in_force, id_facts
from datapath.errors import CompileError, DatapathError, KernelError
from datapath.facts import Facts
from datapath.in_force import parse_in_force
from datapath.kernel.executor import Executor
from datapath.kernel.held import HeldProgram, HeldSteering
from datapath.kernel.observer import Sight, observe
from datapath.log import get_logger
from datapath.plan.model import Plan
from datapath.plan.rtnl import TABLE_MAIN, Route
from datapath.policy import Network, Policy
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.conflicts import find_conflicts
from datapath.reconcile.diff import reconcile
from datapath.reconcile.present import carried_plan, waiting_devices
from datapath.reconcile.steps import (
    AddRoute,
    ExtendSteering,
    NftTransaction,
    SetSysctl,
    Step,
    SyncIngress,
    TrimSteering,
    kind_of,
)
from datapath.reconcile.sysctls import Caution
from datapath.service.backoff import Backoff
from datapath.service.gateways import Down
from datapath.state import State, StateDirectory


def key_of(step: Step) -> str:
    """What a step repairs: one transaction is the whole table, one sync the whole program."""
    if isinstance(step, NftTransaction | SyncIngress):
        return kind_of(step)
    if isinstance(step, ExtendSteering | TrimSteering):
        return "egress program"
    if isinstance(step, SetSysctl):
        return f"set {step.key}"
    return step.describe()


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the kernel found and did.

    Attributes:
        state: as it is now; its policy is empty where none is in force.
        plan: None where no policy is in force.
        done: steps carried out.
        failed: steps that the kernel refused, with its reason.
        held: steps left alone for now, because somebody undoes them, or because they need one that failed.
        delays: seconds that things in `done` and `failed` will be left alone for, by key; only where any.
        waiting: networks whose device is missing or down.
        conflicts: what of others is in the way, in words.
        networks: names of the policy in force.
        began_s: monotonic clock.
        switched: steps that follow a gateway which went up or down, also carried out.
        filtered: devices that had a filter although there is tcx.
    """

    state: State
    plan: Plan | None = None
    done: tuple[Step, ...] = ()
    failed: tuple[tuple[Step, KernelError], ...] = ()
    held: tuple[Step, ...] = ()
    delays: dict[str, float] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    began_s: float = 0.0
    switched: tuple[Step, ...] = ()
    filtered: frozenset[str] = frozenset()


class Healer:
    """Compares and repairs. Keeps what is dear to compute: the parsed policy, its plan, the loaded program."""

    def __init__(self, directory: StateDirectory, compiler: Compiler | None = None) -> None:
        self._directory = directory
        self._compiler = compiler or Compiler()
        self._log = get_logger()
        self._text = ("", "")
        self._policy: Policy | None = None
        self._facts: Facts | None = None
        self._plan: Plan | None = None
        self._program = HeldProgram()
        self._steering = HeldSteering()
        self._program_may_differ = True
        self._sight = Sight(glances=True)
        self._unwritten: tuple[State, State] | None = None
        self._down: Down | None = None
        self._rerouted: frozenset[Route] = frozenset()
        self._is_resteered = False
        self.backoff = Backoff()

    def close(self) -> None:
        self._program.close()
        self._steering.close()

    @property
    def sight(self) -> Sight:
        """What was read of the kernel and is true as far as anybody has told."""
        return self._sight

    def forget(self, kinds: Iterable[str]) -> None:
        """Events of these kinds came (`*` for whatever): what was read about them is out of date."""
        kinds = set(kinds)
        self._sight.forget(kinds)
        if kinds - {"nft", "flowtable", "rule", "route", "address", "sysctl"}:
            self._program_may_differ = True

    def programs_changed(self) -> bool:
        """Whether somebody attached or detached a program since they were read: for tcx no event tells that.

        Raises:
            DatapathError: the kernel cannot be asked.
        """
        if self._sight.is_as_glanced():
            return False
        self.forget(["tc"])
        return True

    def program_moved(self, ifname: str) -> None:
        """The daemon itself gave this device tcx instead of its filter: nobody has to look because of that."""
        self._sight.filter_left(ifname)

    def set_down(self, down: Down) -> None:
        """These gateways, by network, are down from now on; the next look makes it so."""
        self._down = down

    def look(self) -> Look:
        """Compare the kernel with the policy in force, and repair.

        Raises:
            BusyError: another process changes something at this moment.
            DatapathError: state, policy or kernel cannot be read.
        """
        began = time.monotonic()
        with self._directory.locked(wait_s=0):
            written = self._with_unwritten(self._directory.load())
            if not written.policy:
                return Look(written)
            state = written if self._down is None else dataclasses.replace(written, gateways_down=self._down)
            plan = self._desired(state)
            actual = observe(plan, state, self._sight)
            changes = reconcile(actual, plan, state.record)
            if not changes.steps:
                self._sight.share(plan)
            written = self._save(written, dataclasses.replace(written, record=changes.before))
            state = dataclasses.replace(state, record=changes.before)
            with Executor() as executor:
                look = self._repair(state, plan, actual, changes.steps, executor)
            if not look.failed and not look.held:
                self._rerouted, self._is_resteered = frozenset(), False
                state = _done(state, plan, changes.after)
            # Only now what is known of gateways: who waits for another way must not wait for a disk.
            look = dataclasses.replace(look, began_s=began, state=self._save(written, state))
            self._follow_program(plan, look)
            return look

    def _desired(self, state: State) -> Plan:
        """Compiled again only when the policy or the host changed."""
        text = (state.policy, state.policy_name)
        if text != self._text:
            self._policy, self._facts = parse_in_force(state).policy, None
            self._text = text
        facts = facts_in_force(state, self._sight)
        if facts.rule_bank is None and self._facts is not None:
            # Our table is gone, but the rules that it speaks of are where they were: no reason to move them.
            bank = {"rule_bank": self._facts.rule_bank, "has_rule_tree": self._facts.has_rule_tree}
            facts = facts.model_copy(update=bank)
        if self._plan is not None and self._policy and _differs_only_in("gateways_down", facts, self._facts):
            before, self._plan = self._plan, rerouted(self._plan, self._policy, facts.gateways_down)
            self._rerouted = self._plan.route_set - before.route_set
            self._is_resteered = self._plan.steering != before.steering
        elif self._plan is not None and _differs_only_in("egress_sets", facts, self._facts):
            self._plan, self._rerouted = with_members(self._plan, facts.egress_sets), frozenset()
        elif self._plan is None or facts != self._facts:
            self._plan, self._rerouted = self._compile(state, facts), frozenset()
        self._facts = facts
        return self._plan

    def _compile(self, state: State, facts: Facts) -> Plan:
        """Positions in the text are large and needed only for problems: they are not kept."""
        policy = self._policy or parse_in_force(state).policy
        try:
            return self._compiler.plan(policy, facts)
        except CompileError as error:
            raise parse_in_force(state).source.error(error.problems) from error

    @property
    def _networks(self) -> tuple[Network, ...]:
        return () if self._policy is None else tuple(self._policy.networks)

    def _repair(
        self, state: State, plan: Plan, actual: Actual, steps: tuple[Step, ...], executor: Executor
    ) -> Look:
        done: list[Step] = []
        failed: list[tuple[Step, KernelError]] = []
        held: list[Step] = []
        switched: list[Step] = []
        delays: dict[str, float] = {}
        caution = Caution()
        self._sight.forget({kind_of(step) for step in steps})
        for step in steps:
            key, now = key_of(step), time.monotonic()
            follows_gateway = self._follows_gateway(step)
            if caution.forbids(step) or (
                self.backoff.holds(key, now) and key not in delays and not follows_gateway
            ):
                held.append(step)
                caution.not_done(step)
                continue
            try:
                self._run(step, executor)
                (switched if follows_gateway else done).append(step)
            except KernelError as error:
                failed.append((step, error))
                caution.not_done(step)
            except DatapathError as error:
                failed.append((step, KernelError(step.describe(), str(error), hint=error.hint)))
            if key not in delays and not follows_gateway:
                delays[key] = self.backoff.repaired(key, now)
        return Look(
            state,
            plan,
            tuple(done),
            tuple(failed),
            tuple(held),
            {key: delay for key, delay in delays.items() if delay},
            _waiting(self._networks, plan, actual),
            find_conflicts(actual, carried_plan(plan, actual.links), state.record),
            tuple(network.name for network in self._networks),
            switched=tuple(switched),
            filtered=actual.ingress.filtered,
        )

    def _follows_gateway(self, step: Step) -> bool:
        """Nobody undoes anything here: it is the network that changes, as often as it does."""
        if isinstance(step, AddRoute):
            return step.route in self._rerouted
        return self._is_resteered and isinstance(step, ExtendSteering | TrimSteering)

    def _run(self, step: Step, executor: Executor) -> None:
        if isinstance(step, SyncIngress):
            self._program.attach(step.program, step.filtered)
        elif isinstance(step, ExtendSteering):
            self._steering.attach(step.program)
        try:
            executor.run(step)
        except KernelError as error:
            # Somebody put a route of theirs over ours. In main that is for people to decide; this table is ours.
            if (
                error.errno != errno.EEXIST
                or not isinstance(step, AddRoute)
                or step.route.table == TABLE_MAIN
            ):
                raise
            executor.run(AddRoute(step.route, step.route))

    def _save(self, state: State, wanted: State) -> State:
        """Only where it differs: an fsync takes longer than most repairs.

        Whoever is not served now suffers more than who would miss the record after a crash: where it cannot be
        written (full, read-only), it stays in memory until it can.
        """
        written = self._unwritten[0] if self._unwritten else state
        if state == wanted and self._unwritten is None:
            return state
        try:
            self._directory.save(wanted)
        except DatapathError as error:
            if self._unwritten is None:
                self._log.error("state_not_written", error=str(error), hint=error.hint)
            self._unwritten = (written, wanted)
        else:
            self._unwritten = None
        return wanted

    def _with_unwritten(self, state: State) -> State:
        """The state that could not be written, unless somebody has written another since."""
        if self._unwritten is None:
            return state
        written, wanted = self._unwritten
        if state != written:
            self._unwritten = None
            return state
        return wanted

    def _follow_program(self, plan: Plan, look: Look) -> None:
        synced = any(isinstance(step, SyncIngress | ExtendSteering | TrimSteering) for step in look.done)
        if synced or self._program_may_differ:
            self._program.follow(plan.attached)
            with contextlib.suppress(KernelError):  # a device that is missing: there will be another look
                self._steering.follow(plan.steering)
            self._program_may_differ = False


def _differs_only_in(part: str, facts: Facts, before: Facts | None) -> bool:
    """For what may change often, and needs no new plan."""
    if before is None or getattr(facts, part) == getattr(before, part):
        return False
    return facts.model_copy(update={part: getattr(before, part)}) == before


def _done(state: State, plan: Plan, record: Record) -> State:
    """After the last step; marks that an apply was killed over have been carried over, and are so only once."""
    if not plan.mark_changes:
        return dataclasses.replace(state, record=record)
    return dataclasses.replace(state, record=record, ids=id_facts(plan.ids), fwmark_mask=plan.fwmark_mask)


def _waiting(networks: tuple[Network, ...], plan: Plan, actual: Actual) -> tuple[str, ...]:
    missing = waiting_devices(plan, actual.links)
    return tuple(
        network.name
        for network in networks
        if network.device in missing or (network.vlan is not None and network.vlan.parent in missing)
    )
