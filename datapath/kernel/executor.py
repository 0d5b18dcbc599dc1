# SPDX-License-Identifier: Apache-2.0
"""Carry out steps. One step is one act; what fails says which one it was."""

from __future__ import annotations

from types import TracebackType
from typing import Self, assert_never

from datapath.kernel import conntrack, ingress, sysctl, transaction
from datapath.kernel.rtnl import Rtnl
from datapath.points import reached
from datapath.reconcile.steps import (
    AddLink,
    AddRoute,
    AddRule,
    DeleteLink,
    DeleteRoute,
    DeleteRule,
    ForgetConnections,
    NftTransaction,
    SetLinkUp,
    SetSysctl,
    Step,
    SyncIngress,
    TranslateConnections,
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
        elif isinstance(step, SyncIngress) and step.program.networks:
            ingress.verify(step.program)

    def run(self, step: Step) -> None:  # noqa: C901, PLR0912  (one branch a kind of step)
        """Carry out one step.

        Raises:
            KernelError: the kernel refused; the step has changed nothing.
        """
        reached(step.describe())
        match step:
            case SetSysctl(key, new):
                sysctl.write(key, new)
            case AddLink(link):
                self._rtnl.add_vlan(link)
            case DeleteLink(link):
                self._rtnl.delete_link(link.name)
            case SetLinkUp(name):
                self._rtnl.set_up(name)
            case AddRoute(route, replaces):
                self._rtnl.add_route(route, replace=replaces is not None)
            case DeleteRoute(route):
                self._rtnl.delete_route(route)
            case AddRule(rule):
                self._rtnl.add_rule(rule)
            case DeleteRule(rule):
                self._rtnl.delete_rule(rule)
            case NftTransaction(text):
                transaction.apply(text)
            case SyncIngress(program, clsact):
                ingress.sync(program, clsact=clsact)
            case ForgetConnections(fwmark, fwmask):
                conntrack.forget(fwmark, fwmask)
            case TranslateConnections(change):
                conntrack.translate(change)
            case _:
                assert_never(step)
