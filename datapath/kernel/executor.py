# SPDX-License-Identifier: Apache-2.0
"""Carry out steps. One step is one act; what fails says which one it was."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self, assert_never

from datapath.errors import KernelError
from datapath.kernel import conntrack, conntrack_zones, ingress, steering, sysctl, transaction
from datapath.kernel.rtnl import FibChange, Rtnl, Verb
from datapath.points import reached
from datapath.reconcile.batches import FibStep
from datapath.reconcile.steps import (
    AddLink,
    AddRoute,
    AddRule,
    DeleteLink,
    DeleteRoute,
    DeleteRule,
    Enslave,
    ExtendSteering,
    ForgetConnections,
    MoveConnections,
    NftTransaction,
    Release,
    SetLinkUp,
    SetSysctl,
    Step,
    SyncIngress,
    TranslateConnections,
    TrimSteering,
)


class Executor:
    """Carries out steps in the current namespace. Use as a context manager."""

    def __init__(self) -> None:
        self._rtnl = Rtnl()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rtnl.__exit__(kind, error, trace)

    def check(self, step: Step) -> None:
        """Ask the kernel whether it would take the step, where it can be asked without changing anything.

        Raises:
            KernelError: it would not: nft's parser or kernel, or the eBPF verifier, said no.
        """
        if isinstance(step, NftTransaction) and not step.follows:
            transaction.check(step.text)
        elif isinstance(step, SyncIngress) and step.program.networks and not step.stays:
            ingress.verify(step.program)
        elif isinstance(step, ExtendSteering):
            steering.verify(step.program)

    def run(self, step: Step) -> None:  # noqa: C901, PLR0912  (one branch a kind of step)
        """Carry out one step.

        Raises:
            KernelError: the kernel refused; the step has changed nothing.
        """
        if isinstance(step, FibStep):
            self.run_batch((step,))
            return
        reached(step.describe)
        match step:
            case SetSysctl(key, new):
                sysctl.write(key, new)
            case AddLink(link):
                self._rtnl.add_link(link)
            case DeleteLink(link):
                self._rtnl.delete_link(link.name)
            case SetLinkUp(name):
                self._rtnl.set_up(name)
            case Enslave(slave):
                self._rtnl.enslave(slave)
            case Release(slave):
                self._rtnl.release(slave.device)
            case NftTransaction(text):
                transaction.apply(text)
            case SyncIngress(program, clsact, filtered):
                ingress.sync(program, clsact=clsact, filtered=filtered)
            case ExtendSteering(outward):
                steering.extend(outward)
            case TrimSteering(outward, clsact):
                steering.trim(outward, clsact=clsact)
            case ForgetConnections() | TranslateConnections() | MoveConnections():
                _change_connections(step)
            case _:
                assert_never(step)

    def run_batch(self, steps: Sequence[Step]) -> None:
        """Carry out steps that `reconcile.batches` puts together: rules and routes in one act of the kernel.

        Raises:
            KernelError: the first refusal. The steps after it have been carried out all the same, unless it came
                before the kernel was asked (a device is missing): then nothing was changed.
        """
        changes: list[FibChange] = []
        refused: list[KernelError] = []
        for step in steps:
            if not isinstance(step, FibStep):
                self.run(step)
                continue
            try:
                reached(step.describe)
            except KernelError as error:
                # Whoever listens refuses in the kernel's place, which goes on with the rest of the batch.
                refused.append(error)
            else:
                changes.append(_fib_change(step))
        if changes:
            self._rtnl.change(changes)
        if refused:
            raise refused[0]


def _change_connections(step: ForgetConnections | TranslateConnections | MoveConnections) -> None:
    match step:
        case ForgetConnections():
            conntrack.forget(step.fwmark, step.fwmask)
        case TranslateConnections():
            conntrack.translate(step.change)
        case MoveConnections():
            conntrack_zones.move(step.change)


def _fib_change(step: FibStep) -> FibChange:
    match step:
        case AddRoute(route, replaces):
            return FibChange(Verb.REPLACE if replaces is not None else Verb.ADD, route)
        case DeleteRoute(route):
            return FibChange(Verb.DELETE, route)
        case AddRule(rule):
            return FibChange(Verb.ADD, rule)
        case DeleteRule(rule):
            return FibChange(Verb.DELETE, rule)
        case _:
            assert_never(step)
