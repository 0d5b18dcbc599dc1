# SPDX-License-Identifier: Apache-2.0
"""Results as tables: rows of text, for a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tools.bench.frames import PROFILES
from tools.bench.statistics import Summary, median_of_ratios, ratio_of_minima
from tools.bench.variants import BASE, TITLES

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, names of columns, rows."""

    title: str
    columns: Row
    rows: Sequence[Row]

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, *self.rows)]
        lines.insert(1, f"|---|{'---:|' * (len(self.columns) - 1)}")
        return "\n".join([f"**{self.title}**", "", *lines, ""])

    def text(self) -> str:
        """Aligned, for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.columns, *self.rows)
        ]
        return "\n".join([self.title, *lines, ""])


class Forwarding:
    """The cells of a forwarding run, to be looked up."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.cells: Final[list[dict[str, Any]]] = result["cells"]
        self.unavailable: Final[list[dict[str, Any]]] = result["unavailable"]
        self._by_key = {
            (cell["variant"], cell["networks"], cell["family"], cell["profile"]): cell for cell in self.cells
        }

    def samples(self, variant: str, networks: int, family: int, profile: str) -> list[int]:
        """Empty where there is no figure."""
        cell = self._by_key.get((variant, networks, family, profile))
        return cell["samples"] if cell and not cell["problem"] else []

    def base(self, networks: int, family: int, profile: str) -> list[int]:
        """The base's samples of the same repetitions: on a node with as many devices, or else with the fewest."""
        for count in (networks, *self.networks(BASE)):
            if samples := self.samples(BASE, count, family, profile):
                return samples
        return []

    def ratio(self, variant: str, networks: int, family: int, profile: str) -> float | None:
        """Minimum against the base's minimum."""
        samples, base = self.samples(variant, networks, family, profile), self.base(networks, family, profile)
        return ratio_of_minima(samples, base) if samples and base else None

    def networks(self, variant: str | None = None) -> list[int]:
        """The numbers of networks that were measured."""
        return sorted({cell["networks"] for cell in self.cells if variant in {None, cell["variant"]}})

    def variants(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(cell["variant"] for cell in self.cells))


def _figure(forwarding: Forwarding, cell: dict[str, Any]) -> str:
    if cell["problem"]:
        return "misrouted" if cell["problem"].startswith("misrouted") else "lost"
    samples, base = cell["samples"], forwarding.base(cell["networks"], cell["family"], cell["profile"])
    if not base:
        return str(Summary.of(samples))
    paired = f"{median_of_ratios(samples, base):.2f}" if len(base) == len(samples) else "-"
    return f"{Summary.of(samples)} ({ratio_of_minima(samples, base):.2f}; {paired})"


def forwarding_tables(result: dict[str, Any]) -> Iterator[Table]:
    """One table per profile and family: rows are variants, columns numbers of networks."""
    forwarding = Forwarding(result)
    for letter, profile in PROFILES.items():
        for family in (4, 6):
            cells = [c for c in forwarding.cells if (c["profile"], c["family"]) == (letter, family)]
            if not cells:
                continue
            counts = sorted({cell["networks"] for cell in cells})
            rows = []
            for name in dict.fromkeys(cell["variant"] for cell in cells):
                found = {
                    cell["networks"]: _figure(forwarding, cell) for cell in cells if cell["variant"] == name
                }
                rows.append([TITLES.get(name, name), *(found.get(count, "") for count in counts)])
            yield Table(
                f"{profile.title}, IPv{family}: ns min/median/max (ratio of minima to base; median of paired ratios)",
                ["", *(f"N={count}" for count in counts)],
                rows,
            )


def notes(result: dict[str, Any]) -> list[str]:
    """What has no figure, and why."""
    forwarding = Forwarding(result)
    lines = [
        f"{item['variant']}, {item['networks']} networks: {item['reason']}" for item in forwarding.unavailable
    ]
    lines += [
        f"{cell['variant']}, {cell['networks']} networks, IPv{cell['family']}, {cell['profile']}: {cell['problem']}"
        for cell in forwarding.cells
        if cell["problem"]
    ]
    late = [
        f"{cell['variant']}, {cell['networks']} networks, IPv{cell['family']}, {cell['profile']}:"
        f" {cell['late']} frames arrived after the clock had stopped"
        for cell in forwarding.cells
        if cell["late"] * 200 > cell["packets"] * max(1, len(cell["samples"]))
    ]
    return lines + late
