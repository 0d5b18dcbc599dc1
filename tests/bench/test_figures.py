# SPDX-License-Identifier: Apache-2.0
"""From samples to what a reader sees: statistics, tables, targets, pages."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench import report, tables, targets
from tools.bench.statistics import Summary, median_of_ratios, ratio_of_minima


def cell(
    variant: str,
    samples: list[int],
    *,
    networks: int = 1,
    family: int = 4,
    profile: str = "r",
    problem: str = "",
) -> dict[str, Any]:
    return {
        "variant": variant,
        "networks": networks,
        "family": family,
        "profile": profile,
        "packets": 1000,
        "batch": 64,
        "samples": samples,
        "problem": problem,
        "late": 0,
    }


def result(*cells: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "machine": {"kernel": "6.1", "mitigations": {"spectre_v2": "Mitigation: Retpolines"}},
        "forwarding": {"repetitions": 3, "cells": list(cells), "unavailable": []},
        **parts,
    }


def test_summary_and_ratios() -> None:
    assert str(Summary.of([30, 10, 20, 40])) == "10/25/40"
    assert ratio_of_minima([30, 20], [10, 40]) == 2.0
    # The third repetition was disturbed for both alike: the median of ratios does not see it.
    assert median_of_ratios([20, 22, 90], [10, 11, 45]) == 2.0
    assert ratio_of_minima([20, 22, 90], [10, 11, 45]) == 2.0


def test_ratios_of_different_repetitions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples, 3 of the base"):
        median_of_ratios([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_a_table_shows_figures_and_what_has_none() -> None:
    found = result(
        cell("base", [100, 110, 120]),
        cell("ebpf-rules", [150, 140, 160]),
        cell("ebpf-rules", [141, 150, 160], networks=100),
        cell("classic-nft", [], problem="misrouted: 256 of 256 left by the default route"),
        cell("classic-legacy", [], problem="of 256 frames arrived: none; expected: pod 256"),
    )
    (table,) = tables.forwarding_tables(found["forwarding"])
    assert table.columns == ["", "N=1", "N=100"]
    by_title = {row[0]: list(row[1:]) for row in table.rows}
    assert by_title["datapath, eBPF, steering: rules"] == [
        "140/150/160 (1.40; 1.33)",
        "141/150/160 (1.41; 1.36)",
    ]
    assert by_title["classic recipe, iptables-nft"] == ["misrouted", ""]
    assert by_title["classic recipe, iptables-legacy"] == ["lost", ""]
    assert len(report.problems(found)) == 2


@pytest.mark.parametrize(
    ("least", "state"),
    [
        (130, targets.State.AIM),
        (131, targets.State.MUST),
        (142, targets.State.MUST),
        (143, targets.State.MISSED),
    ],
)
def test_a_target_is_judged_by_its_limits(least: int, state: targets.State) -> None:
    found = result(cell("base", [100, 120]), cell("ebpf-rules", [least, 200]))
    judged = {item.name: item for item in targets.judge(found)}
    assert judged["policy cost, 1 network, rules"].state is state
    assert judged["policy cost, 1 network, direct"].state is targets.State.UNKNOWN


def test_the_worse_family_decides() -> None:
    found = result(
        cell("base", [100]),
        cell("base", [100], family=6),
        cell("ebpf-rules", [110]),
        cell("ebpf-rules", [150], family=6),
    )
    judged = next(targets.judge(found))
    assert judged.state is targets.State.MISSED
    assert {label: round(value, 6) for label, value in judged.figures} == {"IPv4": 0.1, "IPv6": 0.5}


def test_cells_that_were_repeated_more_often_are_judged() -> None:
    found = result(cell("base", [100]), cell("ebpf-rules", [150]))
    found["again"] = result(cell("base", [100]), cell("base2", [101]), cell("ebpf-rules", [130]))[
        "forwarding"
    ]
    judged = {item.name: item.state for item in targets.judge(found)}
    assert judged["policy cost, 1 network, rules"] is targets.State.AIM
    assert [round(value, 6) for _, value in targets.noise(found)] == [0.01]
    assert "| 130/130/130 (1.30; 1.30) |" in report.fill(
        "<!-- bench:begin again -->\n<!-- bench:end -->\n", found
    )


def test_growth_with_networks_is_against_one_network() -> None:
    found = result(cell("base", [100]), cell("ebpf-rules", [120]), cell("ebpf-rules", [126], networks=4094))
    judged = {item.name: item for item in targets.judge(found)}
    assert judged["cost(4094) / cost(1), rules"].state is targets.State.MUST


def test_a_ratio_is_to_the_base_with_as_many_devices() -> None:
    found = result(
        cell("base", [100]),
        cell("base", [110], networks=4094),
        cell("ebpf-rules", [120]),
        cell("ebpf-rules", [132], networks=4094),
        cell("ebpf-rules", [130], networks=100),
    )
    forwarding = tables.Forwarding(found["forwarding"])
    ratios = [forwarding.ratio("ebpf-rules", count, 4, "r") for count in (1, 100, 4094)]
    assert ratios == pytest.approx([1.2, 1.3, 1.2])


def test_lost_packets_of_any_change_miss_the_target() -> None:
    changes = [{"outcome": {"lost": 0, "misrouted": 0}}, {"outcome": {"lost": 0, "misrouted": 1}}]
    states = [list(targets.judge(result(changes=kinds)))[-1].state for kinds in (changes[:1], changes)]
    assert states == [targets.State.AIM, targets.State.MISSED]


def test_a_page_is_filled_between_its_markers_and_again() -> None:
    page = "# Page\n<!-- bench:begin noise -->\nold\n<!-- bench:end -->\nkept\n"
    found = result(cell("base", [100]), cell("base2", [101]))
    once = report.fill(page, found)
    assert "+1.0 %" in once
    assert "old" not in once
    assert once.startswith("# Page\n")
    assert once.endswith("<!-- bench:end -->\nkept\n")
    assert report.fill(once, found) == once


def test_a_page_may_ask_for_what_this_run_did_not_measure_but_not_for_anything() -> None:
    page = "<!-- bench:begin {} -->\n<!-- bench:end -->\n"
    assert "Not measured in this run." in report.fill(page.format("tcp"), result())
    with pytest.raises(report.ReportError, match="marker speed"):
        report.fill(page.format("speed"), result())


def test_control_figures_are_the_least_in_milliseconds() -> None:
    rows = [
        {
            "who": "datapath, ebpf",
            "networks": 4094,
            "times": {"load from nothing": [0.5, 0.39], "no-op apply": [0.2]},
        },
        {"who": "datapath, ebpf", "networks": 4094, "times": {"daemon: add one network": [0.004]}},
        {"who": "datapath, nft", "networks": 4094, "times": {}, "problem": "refused"},
    ]
    found = result(control={"rows": rows})
    judged = {item.name: item.state for item in targets.judge(found)}
    assert judged["load 4094 networks from nothing, both families"] is targets.State.AIM
    assert judged["no-op apply at 4094"] is targets.State.MISSED
    assert judged["add one network at 4094 in the daemon, file event to kernel"] is targets.State.AIM
    (table,) = report.control_tables(found["control"])
    assert ["load from nothing", "390/445/500"] in table.rows
    assert report.problems(found) == ["control plane, datapath, nft, 4094 networks: refused"]
