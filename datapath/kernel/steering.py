# SPDX-License-Identifier: Apache-2.0
"""The egress program as reconciliation sees it: one comparison, two halves of a change, one set of counters."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from datapath.errors import KernelError
from datapath.kernel import tc
from datapath.kernel.bpf import attachments, steering
from datapath.kernel.bpf.loaded import Counter, verify_if_needed
from datapath.kernel.bpf.steering import LoadedSteering, SteeringDiff
from datapath.kernel.bpf.steering_tables import resolve_steering
from datapath.plan.steering import SteeringProgram
from datapath.plan.tc import Direction
from datapath.reconcile.actual import ActualSteering


def observe(
    desired: SteeringProgram,
    ifindexes: Mapping[str, int] | None = None,
    qdiscs: Callable[[], frozenset[int]] = tc.clsact_devices,
) -> ActualSteering:
    """What is attached, what is missing and what is too much; devices and qdiscs as they were read, if they were."""
    if not desired.attachments and not attachments.may_be_attached(Direction.EGRESS):
        return ActualSteering(hook=attachments.preferred_hook())
    state = steering.observe_steering(ifindexes, qdiscs())
    try:
        missing, surplus = _describe(steering.compare_steering(desired, state))
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
        # A VLAN device that the same change will make first.
        missing, surplus = (str(error),), ()
    return ActualSteering(
        attached=frozenset(state.attached),
        missing=missing,
        surplus=surplus,
        clsact=state.clsact,
        foreign=frozenset(name for name, _ in state.conflicts),
        hook=state.hook,
        ahead=state.ahead,
    )


def _describe(diff: SteeringDiff) -> tuple[tuple[str, ...], tuple[str, ...]]:
    missing, surplus = [], []
    if diff.reload:
        missing.append(f"a new egress program is needed: {diff.reload}")
    elif diff.attach:
        missing.append(f"not attached as it should be to the egress of {', '.join(diff.attach)}")
    if diff.additions:
        missing.append(f"the maps of egress program {diff.program_id} lack entries")
    if diff.removals:
        surplus.append(f"the maps of egress program {diff.program_id} hold entries that are not wanted")
    if diff.detach:
        surplus.append(f"attached to the egress of {', '.join(diff.detach)}")
    return tuple(missing), tuple(surplus)


def verify(desired: SteeringProgram) -> None:
    """Put the program through the verifier if it would have to be loaded.

    Raises:
        EbpfError: it does not compile, or the kernel refuses it.
    """
    verify_if_needed(
        lambda: steering.compare_steering(desired, steering.observe_steering()).reload,
        lambda: steering.verify_steering(desired),
    )


def extend(desired: SteeringProgram) -> None:
    """The first half: everything desired is there, and everything that was.

    Raises:
        ConflictError: somebody else's filter is in our place.
        KernelError: the kernel refused; devices before it in the order are done already.
    """
    state = steering.observe_steering()
    diff = steering.compare_steering(desired, state)
    if diff.reload:
        with steering.load_steering(desired, state) as loaded:
            steering.switch_steering(loaded, state, diff.attach)
        return
    if diff.program_id is None:
        return
    with LoadedSteering.open(diff.program_id) as kept:
        if diff.additions:
            kept.write_tables(resolve_steering(desired, state.ifindexes), only_add=True)
        for ifname in diff.attach:
            attachments.attach(kept.program_fd, ifname, Direction.EGRESS)


def trim(desired: SteeringProgram, *, clsact: frozenset[str]) -> None:
    """The second half: what is not desired goes.

    Args:
        desired: what the program must know; no networks detach it everywhere.
        clsact: devices whose clsact qdisc we made and need no more; it goes if nobody else uses it.

    Raises:
        KernelError: the kernel refused.
    """
    state = steering.observe_steering()
    diff = steering.compare_steering(desired, state)
    attachments.detach(*diff.detach, direction=Direction.EGRESS)
    tc.remove_clsact(*sorted(clsact))
    if diff.program_id is not None and diff.removals:
        with LoadedSteering.open(diff.program_id) as kept:
            kept.write_tables(resolve_steering(desired, state.ifindexes))


def read_counters() -> dict[int, Counter]:
    """Steered packets by slot, of what is attached now; empty where nothing is."""
    totals: dict[int, Counter] = {}
    for program_id in steering.observe_steering().tables:
        with LoadedSteering.open(program_id) as loaded:
            for slot, counter in loaded.read_counters().items():
                totals[slot] = totals.get(slot, Counter()) + counter
    return totals
