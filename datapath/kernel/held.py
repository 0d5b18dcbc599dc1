# SPDX-License-Identifier: Apache-2.0
"""The daemon's hold on the loaded eBPF program: whoever detaches it does not make us compile it again.

A program that is attached nowhere and held by nobody is gone, and compiling takes a third of a second.
"""

from __future__ import annotations

import contextlib
from typing import Generic, TypeVar

from datapath.errors import KernelError
from datapath.kernel import bpf
from datapath.kernel.bpf import attachments, steering
from datapath.kernel.bpf.loaded import LoadedProgram
from datapath.kernel.bpf.steering import LoadedSteering
from datapath.plan.ingress import IngressProgram
from datapath.plan.steering import SteeringProgram
from datapath.plan.tc import Direction

_Program = TypeVar("_Program", bound=LoadedProgram)


class _Held(Generic[_Program]):
    """At most one program, kept open."""

    def __init__(self, program_class: type[_Program]) -> None:
        self._class = program_class
        self._loaded: _Program | None = None

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def _hold(self, program_id: int) -> None:
        if self._loaded is not None and self._loaded.program_id == program_id:
            return
        self.close()
        # Replaced in this moment: an event or the next look tells.
        with contextlib.suppress(KernelError):
            self._loaded = self._class.open(program_id)


class HeldProgram(_Held[bpf.LoadedIngress]):
    """Keeps the program open that serves now."""

    def __init__(self) -> None:
        super().__init__(bpf.LoadedIngress)

    def follow(self, desired: IngressProgram) -> None:
        """Hold what is attached now, provided that it is all as desired."""
        state = bpf.observe_ingress()
        ids = {state.attached[name] for name in desired.attachments if name in state.attached}
        if len(ids) != 1 or bpf.compare_ingress(desired, state).reload:
            return
        (program_id,) = ids
        self._hold(program_id)

    def attach(self, desired: IngressProgram, filtered: frozenset[str]) -> None:
        """Put the held program back where it is missing or was replaced; nothing where it is not the right one.

        Args:
            desired: what it must know.
            filtered: with tcx, the devices that get or keep a filter all the same.

        Raises:
            ConflictError: somebody else's filter is in our place.
            KernelError: a device is gone, or the kernel refused.
        """
        if self._loaded is None:
            return
        state = bpf.observe_ingress()
        if not bpf.compare_ingress(desired, state).reload:
            return
        held = self._loaded.program_id
        actual = bpf.ActualProgram(
            program_id=held, meta=self._loaded.read_meta(), image=self._loaded.read_image()
        )
        everywhere = bpf.IngressState(
            ifindexes=state.ifindexes,
            attached=dict.fromkeys(desired.attachments, held),
            programs={held: actual},
        )
        if bpf.compare_ingress(desired, everywhere).reload:
            return
        missing = [name for name in desired.attachments if state.attached.get(name) != held]
        bpf.attach_all(self._loaded, missing, filtered)


class HeldSteering(_Held[LoadedSteering]):
    """The same for the egress program."""

    def __init__(self) -> None:
        super().__init__(LoadedSteering)

    def follow(self, desired: SteeringProgram) -> None:
        """Hold what is attached now, provided that it is all as desired."""
        program_id = steering.compare_steering(desired, steering.observe_steering()).program_id
        if not desired.attachments:
            self.close()
        if program_id is not None:
            self._hold(program_id)

    def attach(self, desired: SteeringProgram) -> None:
        """Put the held program back where no program of ours is left; its maps are compared afterwards.

        Raises:
            ConflictError: somebody else's filter is in our place.
            KernelError: a device is gone, or the kernel refused.
        """
        if self._loaded is None or steering.observe_steering().attached:
            return
        for name in desired.attachments:
            attachments.attach(self._loaded.program_fd, name, Direction.EGRESS)
