# SPDX-License-Identifier: Apache-2.0
"""The eBPF side as reconciliation sees it: one comparison, one act, one set of counters."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from datapath.errors import KernelError
from datapath.kernel import bpf, tc
from datapath.kernel.bpf.loaded import verify_if_needed
from datapath.plan.ingress import IngressProgram
from datapath.plan.tc import Hook
from datapath.reconcile.actual import ActualIngress

#: What the preflight verified: the very program that is attached after it, so it is compiled once.
_verified: list[bpf.LoadedIngress] = []


def observe(
    desired: IngressProgram,
    ifindexes: Mapping[str, int] | None = None,
    qdiscs: Callable[[], frozenset[int]] = tc.clsact_devices,
) -> ActualIngress:
    """What is attached, and in which way it is not as desired; devices and qdiscs as they were read, if they were."""
    state = bpf.observe_ingress(ifindexes, qdiscs())
    stays = False
    try:
        diff = bpf.compare_ingress(desired, state)
        differences, stays = _describe(diff), not diff.reload
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
        # A VLAN device that the same change will make first.
        differences = (str(error),)
    return ActualIngress(
        attached=frozenset(state.attached),
        differences=differences,
        clsact=state.clsact,
        foreign=frozenset(name for name, _ in state.conflicts),
        hook=state.hook,
        ahead=state.ahead,
        filtered=state.filtered,
        taken=state.taken,
        stays=stays,
    )


def _describe(diff: bpf.IngressDiff) -> tuple[str, ...]:
    found = []
    if diff.reload:
        found.append(f"a new program is needed: {diff.reload}")
    if diff.update is not None:
        found.append(f"the maps of program {diff.update} differ")
    if diff.attach and not diff.reload:
        found.append(f"not attached as it should be to {', '.join(diff.attach)}")
    if diff.detach:
        found.append(f"attached to {', '.join(diff.detach)}")
    return tuple(found)


def verify(desired: IngressProgram) -> None:
    """Put the program through the verifier if it would have to be loaded.

    Raises:
        EbpfError: it does not compile, or the kernel refuses it.
    """
    loaded = verify_if_needed(
        lambda: bpf.compare_ingress(desired, bpf.observe_ingress()).reload,
        lambda: bpf.verify_ingress(desired),
    )
    if loaded is not None:
        _keep(loaded)


def _keep(loaded: bpf.LoadedIngress) -> None:
    while _verified:
        _verified.pop().close()
    _verified.append(loaded)


def sync(desired: IngressProgram, *, clsact: frozenset[str], filtered: frozenset[str] = frozenset()) -> None:
    """Make maps and attachments as desired: in place where the program can stay, else a new one aside.

    Args:
        desired: what the program must know; no networks detach it everywhere.
        clsact: devices whose clsact qdisc we made; it goes where we need it no more, if nobody else uses it.
        filtered: with tcx, the devices that get or keep a filter all the same.

    Raises:
        ConflictError: somebody else's filter is in our place.
        KernelError: the kernel refused; devices before it in the order are done already.
    """
    state = bpf.observe_ingress()
    diff = bpf.compare_ingress(desired, state)
    if diff.reload:
        with bpf.load_ingress(desired, _verified.pop() if _verified else None) as loaded:
            bpf.switch(loaded, state, diff.attach, filtered)
    else:
        _update_in_place(desired, state, diff, filtered)
    bpf.detach(*diff.detach)
    needed = frozenset(desired.attachments) if state.hook is Hook.CLSACT else filtered
    tc.remove_clsact(*sorted(clsact - needed))


def _update_in_place(
    desired: IngressProgram, state: bpf.IngressState, diff: bpf.IngressDiff, filtered: frozenset[str]
) -> None:
    if diff.update is not None:
        bpf.update_entries(diff.update, desired, state)
    if diff.attach:
        program_id = next(state.attached[name] for name in desired.attachments if name in state.attached)
        with bpf.LoadedIngress.open(program_id) as loaded:
            bpf.attach_all(loaded, diff.attach, filtered)


def attached_program() -> int | None:
    """Id of our program, None where none is attached."""
    return min(bpf.observe_ingress().programs, default=None)


def read_counters() -> bpf.SlotCounters:
    """Counts by slot and verdict of what is attached now; empty where nothing is."""
    totals: bpf.SlotCounters = {}
    for program_id in bpf.observe_ingress().programs:
        for slot, counters in bpf.read_counters(program_id).items():
            known = totals.setdefault(slot, {})
            for verdict, counter in counters.items():
                known[verdict] = known.get(verdict, bpf.Counter()) + counter
    return totals
