# SPDX-License-Identifier: Apache-2.0
"""What the project promises about speed, and what a run says about it."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tools.bench.tables import Forwarding, Table
from tools.bench.variants import BASE

_ROUNDING: Final = 1e-9


class State(enum.StrEnum):
    """How far a target is met."""

    AIM = "aim"
    MUST = "must"
    MISSED = "missed"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Judged:
    """One target and what was measured; the worst of several figures counts.

    Attributes:
        must, aim: upper limits.
        figures: by what they are of.
        unit: ``%`` for ratios minus one.
    """

    name: str
    unit: str
    must: float
    aim: float
    figures: tuple[tuple[str, float], ...]

    @property
    def state(self) -> State:
        if not self.figures:
            return State.UNKNOWN
        # 1.3 - 1 is a little more than 0.3.
        worst = max(value for _, value in self.figures) - _ROUNDING
        if worst <= self.aim:
            return State.AIM
        return State.MUST if worst <= self.must else State.MISSED

    def row(self) -> Sequence[str]:
        """For a table."""
        shown = ", ".join(f"{label} {self._shown(value)}" for label, value in self.figures)
        return [self.name, self._shown(self.must), self._shown(self.aim), shown or "-", self.state.value]

    def _shown(self, value: float) -> str:
        if self.unit == "%":
            return f"{value * 100:+.1f} %"
        return f"{value:.3g}{' ' + self.unit if self.unit else ''}"


def judge(result: dict[str, Any]) -> Iterator[Judged]:
    """Every target against a run."""
    yield from _forwarding(_most_repeated(result))
    yield from _control(result.get("control") or {"rows": []})
    yield from _idle(result.get("idle") or [])
    yield _changes(result.get("changes"))


def _most_repeated(result: dict[str, Any]) -> Forwarding:
    return Forwarding(result.get("again") or result.get("forwarding") or {"cells": [], "unavailable": []})


def _forwarding(found: Forwarding) -> Iterator[Judged]:
    largest = max(found.networks(), default=0)

    def costs(variant: str, networks: int, profile: str) -> tuple[tuple[str, float], ...]:
        ratios = ((family, found.ratio(variant, networks, family, profile)) for family in (4, 6))
        return tuple((f"IPv{family}", ratio - 1) for family, ratio in ratios if ratio)

    def ratios(variant: str, profile: str) -> tuple[tuple[str, float], ...]:
        return tuple((label, cost + 1) for label, cost in costs(variant, largest, profile))

    def spoofed(variant: str) -> tuple[tuple[str, float], ...]:
        samples = ((family, found.samples(variant, largest, family, "s")) for family in (4, 6))
        return tuple((f"IPv{family}", min(values) / 1000) for family, values in samples if values)

    def growth(variant: str) -> tuple[tuple[str, float], ...]:
        pairs = (
            (f, found.ratio(variant, largest, f, "r"), found.ratio(variant, 1, f, "r"))
            for f in (4, 6)
            if largest > 1
        )
        return tuple((f"IPv{family}", many / one) for family, many, one in pairs if many and one)

    rules, direct = "ebpf-rules", "ebpf-direct"
    yield Judged("policy cost, 1 network, rules", "%", 0.42, 0.30, costs(rules, 1, "r"))
    yield Judged(f"policy cost, {largest} networks, rules", "%", 0.50, 0.35, costs(rules, largest, "r"))
    yield Judged("policy cost, 1 network, direct", "%", 0.15, 0.08, costs(direct, 1, "r"))
    yield Judged(f"policy cost, {largest} networks, direct", "%", 0.15, 0.08, costs(direct, largest, "r"))
    yield Judged(f"cost({largest}) / cost(1), rules", "", 1.06, 1.03, growth(rules))
    yield Judged(f"cost({largest}) / cost(1), direct", "", 1.06, 1.03, growth(direct))
    yield Judged(
        f"traffic that is not ours, {largest} networks, rules", "%", 0.40, 0.30, costs(rules, largest, "u")
    )
    yield Judged(
        f"traffic that is not ours, {largest} networks, direct", "%", 0.03, 0.01, costs(direct, largest, "u")
    )
    yield Judged(f"spoofed packet dropped, {largest} networks", "µs", 0.5, 0.40, spoofed(rules))
    yield Judged(f"new flow, {largest} networks, rules", "", 1.35, 1.25, ratios(rules, "n"))
    yield Judged(f"new flow, {largest} networks, direct", "", 1.12, 1.05, ratios(direct, "n"))


def _control(result: dict[str, Any]) -> Iterator[Judged]:
    ours = [row for row in result["rows"] if row["who"] == "datapath, ebpf" and row["times"]]
    largest = max((row["networks"] for row in ours), default=0)

    def least(name: str) -> tuple[tuple[str, float], ...]:
        times = [row["times"].get(name, []) for row in ours if row["networks"] == largest]
        return tuple(("", min(values)) for values in times if values)

    def milliseconds(name: str) -> tuple[tuple[str, float], ...]:
        return tuple((label, value * 1000) for label, value in least(name))

    yield Judged(
        f"load {largest} networks from nothing, both families", "s", 1.0, 0.4, least("load from nothing")
    )
    name = f"add one network at {largest} in the daemon, file event to kernel"
    yield Judged(name, "ms", 20, 5, milliseconds("daemon: add one network"))
    yield Judged(f"no-op apply at {largest}", "ms", 150, 50, milliseconds("no-op apply"))


def _idle(rows: Sequence[dict[str, Any]]) -> Iterator[Judged]:
    row = max(rows, key=lambda row: int(row["networks"]), default=None)
    of = f"idle daemon, {row['networks'] if row else 0} networks"
    yield Judged(f"{of}, memory", "MB", 90, 60, (("", row["rss_mb"]),) if row else ())
    yield Judged(f"{of}, CPU", "%", 0.002, 0.002, (("", row["cpu"]),) if row else ())


def _changes(kinds: Sequence[dict[str, Any]] | None) -> Judged:
    bad = [kind["outcome"]["lost"] + kind["outcome"]["misrouted"] for kind in kinds or []]
    figures = ((f"{len(bad)} kinds of changes:", float(sum(bad))),) if bad else ()
    return Judged("lost or misrouted packets, all changes", "", 0, 0, figures)


def table(result: dict[str, Any], *, with_unknown: bool = True) -> Table:
    """All targets with their state, or only those that the run says something about."""
    rows = [judged.row() for judged in judge(result) if with_unknown or judged.state is not State.UNKNOWN]
    return Table("Targets", ["target", "must", "aim", "measured", "state"], rows)


def noise(result: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """What identical copies of the base differ from it: no difference below this means anything."""
    found = _most_repeated(result)
    copies = [name for name in found.variants() if name.startswith(BASE) and name != BASE]
    ratios = (
        (
            f"{name}, IPv{cell['family']}, {cell['profile']}",
            found.ratio(name, 1, cell["family"], cell["profile"]),
        )
        for name in copies
        for cell in found.cells
        if cell["variant"] == name
    )
    return tuple((label, ratio - 1) for label, ratio in ratios if ratio)
