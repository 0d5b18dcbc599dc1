# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: cost against networks, what it is made of, control-plane times. Needs matplotlib (`make bench`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib import ticker

from tools.bench.statistics import Summary
from tools.bench.tables import Forwarding
from tools.bench.variants import BASE, FLOOR, TITLES

mpl.use("Agg")
# The same picture from the same figures: no dates, no random ids.
mpl.rcParams.update({"svg.hashsalt": "datapath", "font.size": 10, "svg.fonttype": "none"})

_COLOURS: Final = {
    BASE: "#555555",
    "classic-legacy": "#d95f02",
    "classic-nft": "#a6261d",
    "hand-nft": "#b8860b",
    "ebpf-rules": "#1b6ca8",
    "nft-rules": "#6baed6",
    "ebpf-direct": "#1b9e5a",
}
_MARKERS: Final = dict(zip(_COLOURS, "osD^vP*", strict=True))
#: From the bare harness to ours: what each step adds.
#: From so many times the shortest bar on, the axis is logarithmic.
_WIDE: Final = 30
_STEPS: Final = (
    FLOOR,
    "plain",
    BASE,
    "rp_filter",
    "ebpf-direct",
    "one-rule",
    "ebpf-rules",
    "nft-rules",
    "hand-nft",
)
_MORE_STEPS: Final = ("classic-legacy", "classic-nft")
_LOAD, _ONE_BY_ONE, _ADD = "#a6261d", "#d95f02", "#1b6ca8"
_PEER_OPERATIONS: Final = {
    "load from nothing (restore, ip -batch)": _LOAD,
    "load from nothing, one by one (estimated)": _ONE_BY_ONE,
    "add one network (12 commands)": _ADD,
}
#: Line style, and the colour of each operation.
_CONTESTANTS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "datapath, ebpf": (
        "-",
        {
            "load from nothing": _LOAD,
            "add one network": _ADD,
            "daemon: add one network": "#56b4e9",
            "remove one network": "#8856a7",
            "change one network": "#e78ac3",
            "heal one deleted rule": "#b8860b",
            "no-op apply": "#1b9e5a",
        },
    ),
    "classic, iptables-legacy": (":", _PEER_OPERATIONS),
    "classic, iptables-nft": ("--", _PEER_OPERATIONS),
}


def _save(figure: Any, folder: Path, name: str, suffixes: Sequence[str]) -> Iterator[Path]:
    for suffix in suffixes:
        path = folder / f"{name}.{suffix}"
        options = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 110}
        figure.savefig(path, bbox_inches="tight", **options)
        if suffix == "svg":
            _entitle(path, figure.axes[0].get_title())
        yield path
    plt.close(figure)


def _entitle(path: Path, title: str) -> None:
    """Say what it shows, for readers who cannot see it; matplotlib puts its own title where no browser looks."""
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"(<svg\b[^>]*>)", rf"\1\n <title>{title}</title>", text, count=1), encoding="utf-8"
    )


def _log_axes(axes: Any, counts: list[int]) -> None:
    """Both logarithmic, with plain numbers: networks to the right."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("networks")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)


def _cost_against_networks(found: Forwarding, family: int) -> Any:
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, colour in _COLOURS.items():
        points = [
            (count, min(samples) / 1000)
            for count in found.networks()
            if (samples := found.samples(name, count, family, "r"))
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, marker=_MARKERS[name], label=TITLES[name])
    _log_axes(axes, found.networks())
    axes.set_ylabel("µs per round trip of a small packet")
    axes.set_title(f"Cost per packet against the number of networks, IPv{family}")
    axes.legend(fontsize=8.5, loc="upper left")
    return figure


def _decomposition(found: Forwarding, family: int, count: int) -> Any:
    figure, axes = plt.subplots(figsize=(8, 4.2))
    names, values = [], []
    for name in (*_STEPS, *_MORE_STEPS):
        samples = found.samples(name, count if name in _COLOURS else 1, family, "r")
        if samples:
            names.append(TITLES[name])
            values.append(min(samples))
    base = min(found.base(count, family, "r"))
    colours = ["#1b6ca8" if name.startswith("datapath") else "#999999" for name in names]
    axes.barh(names, values, color=colours)
    axes.axvline(base, color="#555555", linestyle="--", linewidth=1)
    for row, value in enumerate(values):
        axes.text(value, row, f" {value} ns ({(value / base - 1) * 100:+.0f} %)", va="center", fontsize=8.5)
    axes.invert_yaxis()
    if max(values) > _WIDE * min(values):
        # What matters would be too short to be seen.
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 20)
    else:
        axes.set_xlim(0, max(values) * 1.25)
    axes.set_xlabel("round trip, ns (least of the repetitions); dashed: the base")
    axes.set_title(f"Cost of a round trip, {count:,} network{'s' if count > 1 else ''}, IPv{family}")
    return figure


def _control(result: dict[str, Any]) -> Any:
    """Colours are operations, lines are contestants."""
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for who, (style, operations) in _CONTESTANTS.items():
        for operation, colour in operations.items():
            points = sorted(
                (row["networks"], Summary.of(row["times"][operation]).minimum * 1000)
                for row in result["rows"]
                if row["who"] == who and operation in row["times"]
            )
            if points:
                label = f"{who}: {operation}"
                axes.plot(
                    *zip(*points, strict=True),
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=label,
                )
    _log_axes(axes, sorted({row["networks"] for row in result["rows"]}))
    axes.set_xlabel("networks, both families each")
    axes.set_ylabel("ms")
    axes.set_title("Control plane")
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return figure


def draw(result: dict[str, Any], folder: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every plot that the result has figures for; SVG for pages, PNG to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if result.get("forwarding"):
        found = Forwarding(result["forwarding"])
        for family in (4, 6):
            if found.base(1, family, "r"):
                written += _save(
                    _cost_against_networks(found, family), folder, f"perf-networks-ipv{family}", suffixes
                )
                for count in (1, found.networks()[-1]):
                    figure = _decomposition(found, family, count)
                    name = f"perf-parts-{'one' if count == 1 else 'many'}-ipv{family}"
                    written += _save(figure, folder, name, suffixes)
    if result.get("control") and any(row["times"] for row in result["control"]["rows"]):
        written += _save(_control(result["control"]), folder, "perf-control", suffixes)
    return written
