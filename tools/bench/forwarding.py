# SPDX-License-Identifier: Apache-2.0
"""Cost per packet: every variant, profile and family in turn within each repetition, order reversed every other one.

Frames are generated, received, filtered, routed, reflected and counted in softirq on one CPU, inside one
BPF_PROG_TEST_RUN system call; the time is the kernel's own. Frames that did not arrive make a run invalid: nothing is
timed that was lost.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tools.bench import frames, variants
from tools.bench.frames import Place, Profile
from tools.bench.ground import Ground, Site, pin, site
from tools.bench.programs import Programs, loaded
from tools.bench.variants import UnavailableError, Variant
from tools.lab.netns import LabError
from tools.lab.topology import FAMILIES

#: One timed run: long enough for the clock, short enough to fall between two disturbances.
_RUN_NS: Final = 12_000_000
_PACKETS_MIN, _PACKETS_MAX = 128, 20_000
#: A batch must end before the kernel hands softirq work to a thread (2 ms), which would not be timed.
_BATCH_NS: Final = 400_000
_BATCH_MAX: Final = 64
_PROBE_PACKETS: Final = 64
_SETTLE_S: Final = 1.0
_KEY: Final = bytes(4)


@dataclass(slots=True)
class Cell:
    """One figure: a variant with so many networks, a family, a profile.

    Attributes:
        problem: why there is no figure, empty if there is one.
        late: frames that were still on their way when the clock had stopped, of all repetitions.
    """

    variant: Variant
    networks: int
    family: int
    profile: Profile
    packets: int = 0
    batch: int = _BATCH_MAX
    samples: list[int] = field(default_factory=list)
    problem: str = ""
    late: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "variant": self.variant.name,
            "networks": self.networks,
            "family": self.family,
            "profile": self.profile.letter,
            "packets": self.packets,
            "batch": self.batch,
            "samples": self.samples,
            "problem": self.problem,
            "late": self.late,
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    Attributes:
        profiles_between: at all numbers of networks but the least and the greatest; all of them if None.
    """

    networks: Sequence[int]
    variants: Sequence[str]
    profiles: Sequence[str]
    families: Sequence[int] = FAMILIES
    repetitions: int = 21
    profiles_between: Sequence[str] | None = None

    def profiles_at(self, count: int) -> Sequence[str]:
        """The profiles to measure with so many networks."""
        if self.profiles_between is None or count in {min(self.networks), max(self.networks)}:
            return self.profiles
        return self.profiles_between


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Frames counted at each place."""

    counts: tuple[int, ...]

    @classmethod
    def read(cls, programs: Programs) -> Arrivals:
        values = []
        for place in Place:
            raw = programs.arrived.lookup(int(place).to_bytes(4, sys.byteorder)) or b""
            values.append(sum(memoryview(raw).cast("Q")))
        return cls(tuple(values))

    def since(self, earlier: Arrivals) -> Arrivals:
        return Arrivals(tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True)))

    def at(self, place: Place) -> int:
        return self.counts[place]

    def __str__(self) -> str:
        seen = [f"{place.name.lower()} {self.at(place)}" for place in Place if self.at(place)]
        return ", ".join(seen) or "none"


def expected(variant: Variant, profile: Profile, family: int, packets: int) -> Arrivals:
    """Where so many frames must be counted, and nowhere else."""
    counts = dict.fromkeys(Place, 0)
    if variant.is_floor:
        counts[Place.NODE] = packets
    elif not variant.drops(profile, family):
        counts[profile.arrives] = packets
        if not profile.is_echo:
            counts[Place.POD] = packets
    return Arrivals(tuple(counts[place] for place in Place))


class Runner:
    """Sends the frames of a cell through a ground."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def run(self, ground: Ground, cell: Cell, packets: int, batch: int) -> tuple[int, Arrivals, int]:
        """One run.

        Returns:
            ns per frame; where frames arrived; how many did so only after the clock had stopped.
        """
        link = ground.link(cell.profile.enters)
        first = frames.frame(cell.profile, ground.network, cell.family, link.ether)
        if cell.profile.flows > frames.FEW_FLOWS and cell.variant.is_tracked:
            ground.node.run("conntrack", "-F")
        self._programs.config.update({_KEY: frames.flow_config(cell.profile, cell.family, first)})
        before = Arrivals.read(self._programs)

        def send() -> int:
            pin()
            return self._programs.send(first, link.ifindex, packets, batch)

        duration = ground.node.call(send)
        timed = Arrivals.read(self._programs).since(before)
        wanted = expected(cell.variant, cell.profile, cell.family, packets)
        arrived = timed
        deadline = time.monotonic() + _SETTLE_S
        while arrived != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
            arrived = Arrivals.read(self._programs).since(before)
        return duration, arrived, sum(arrived.counts) - sum(timed.counts)

    def measure(self, ground: Ground, cell: Cell) -> None:
        """Add a sample, or the problem that forbids one."""
        if cell.problem:
            return
        if not cell.packets and not self._calibrated(ground, cell):
            return
        duration, arrived, late = self.run(ground, cell, cell.packets, cell.batch)
        self._judge(cell, arrived, cell.packets)
        if not cell.problem:
            cell.samples.append(duration)
            cell.late += late

    def _calibrated(self, ground: Ground, cell: Cell) -> bool:
        """Choose the number of frames by what a few of them cost; the first ones also make the connections."""
        warm = frames.FEW_FLOWS
        _, arrived, _ = self.run(ground, cell, warm, 8)
        self._judge(cell, arrived, warm)
        if cell.problem:
            return False
        duration, _, _ = self.run(ground, cell, _PROBE_PACKETS, 8)
        limit = min(
            _PACKETS_MAX, cell.profile.flows if cell.profile.flows > frames.FEW_FLOWS else _PACKETS_MAX
        )
        cell.packets = max(_PACKETS_MIN, min(limit, _RUN_NS // max(duration, 1)))
        cell.batch = max(1, min(_BATCH_MAX, _BATCH_NS // max(duration, 1)))
        return True

    @staticmethod
    def _judge(cell: Cell, arrived: Arrivals, packets: int) -> None:
        wanted = expected(cell.variant, cell.profile, cell.family, packets)
        if arrived == wanted:
            return
        if arrived.at(Place.DEFAULT) > wanted.at(Place.DEFAULT):
            cell.problem = f"misrouted: {arrived.at(Place.DEFAULT)} of {packets} left by the default route"
        else:
            cell.problem = f"of {packets} frames arrived: {arrived}; expected: {wanted}"


@dataclass(slots=True)
class Bench:
    """Grounds and cells of one interleaved run."""

    programs: Programs
    grounds: dict[tuple[str, int], Ground]
    cells: list[Cell]
    unavailable: dict[tuple[str, int], str]
    say: Callable[[str], None]

    def run(self, repetitions: int) -> None:
        """Measure every cell so many times; those with DNAT last, because the rules are then in the others' way."""
        for with_dnat in (False, True):
            cells = [cell for cell in self.cells if cell.profile.with_dnat is with_dnat]
            if with_dnat and cells:
                for ground in self.grounds.values():
                    variants.install_dnat(ground)
                    # Connections without NAT stay without it.
                    with contextlib.suppress(LabError):
                        ground.node.run("conntrack", "-F")
            if cells:
                self._repeat(cells, repetitions, "with DNAT" if with_dnat else "plain")

    def _repeat(self, cells: list[Cell], repetitions: int, phase: str) -> None:
        runner = Runner(self.programs)
        kinds = list(dict.fromkeys((cell.profile.letter, cell.family) for cell in cells))
        began = time.monotonic()
        for repetition in range(repetitions):
            for kind in kinds:
                turn = [cell for cell in cells if (cell.profile.letter, cell.family) == kind]
                for cell in turn if repetition % 2 == 0 else reversed(turn):
                    runner.measure(self.grounds[cell.variant.name, cell.networks], cell)
            self.say(
                f"forwarding, {phase}: repetition {repetition + 1} of {repetitions}, {time.monotonic() - began:.0f} s"
            )


def _grounds(
    built: Site, programs: Programs, wanted: Wanted, say: Callable[[str], None]
) -> Iterator[tuple[Variant, int, Ground | str]]:
    known = {variant.name: variant for variant in (variants.floor(programs), *variants.VARIANTS)}
    for name in wanted.variants:
        variant = known[name]
        for count in wanted.networks if variant.has_networks else wanted.networks[:1]:
            began = time.monotonic()
            if count > variant.most_networks:
                yield variant, count, "its set-up takes minutes"
                continue
            ground = built.ground(count, all_devices=variant.has_networks)
            try:
                variant.install(ground)
            except UnavailableError as error:
                say(f"{name}, {count} networks: not available: {error}")
                yield variant, count, str(error)
                continue
            say(f"{name}, {count} networks: ready after {time.monotonic() - began:.1f} s")
            yield variant, count, ground


@contextlib.contextmanager
def bench(wanted: Wanted, say: Callable[[str], None]) -> Iterator[Bench]:
    """Everything in place for the wanted cells; nothing of it is left afterwards."""
    with loaded() as programs, site(programs) as built:
        made = Bench(programs, {}, [], {}, say)
        for variant, count, ground in _grounds(built, programs, wanted, say):
            if isinstance(ground, str):
                made.unavailable[variant.name, count] = ground
                continue
            made.grounds[variant.name, count] = ground
            made.cells += [
                Cell(variant, count, family, frames.PROFILES[letter])
                for letter in wanted.profiles_at(count)
                for family in wanted.families
            ]
        yield made


def measure(wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it; the result as it is written to JSON."""
    with bench(wanted, say) as made:
        made.run(wanted.repetitions)
        return {
            "repetitions": wanted.repetitions,
            "cells": [cell.as_json() for cell in made.cells],
            "unavailable": [
                {"variant": name, "networks": count, "reason": reason}
                for (name, count), reason in made.unavailable.items()
            ],
        }
