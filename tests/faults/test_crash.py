# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every point that the engine names: between any two kernel operations and file writes.

What both the old and the new policy serve is served afterwards, and the next apply or teardown completes. Of points
with the same name in a row, which fill a map of a program that nothing reaches yet, `make test` takes the first and the
last; test_every_fault.py takes all of them, without packets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.zygote import Zygote
from tests.netns.nodes import inside, quick_dump
from tests.sampling import ends_of_runs
from tools.lab import Lab, network, probe_all, vlan_cells
from tools.lab.cells import Cell, Proto
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(networks=[network(0), network(1)]) as built:
        yield built


@pytest.fixture(scope="module")
def zygote(lab: Lab) -> Iterator[Zygote]:
    with Zygote(lab.node) as running:
        yield running


@pytest.fixture(scope="module", params=["ebpf", "nft", "direct"])
def policies(
    request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """One network; and two, with another gateway table entry and sysctls: every kind of object changes.

    With nftables the mask changes, too; with eBPF that would compile the program twice a point.
    """
    folder = tmp_path_factory.mktemp("policies")
    whole = lab.policy()
    one, two = folder / "one.yaml", folder / "two.yaml"
    direct = request.param == "direct"
    backend = f"backend: {'ebpf' if direct else request.param}\nnetworks:"
    mask = "marks: {mask: 0x00000f00}\n" if request.param == "nft" else ""
    one.write_text(whole[: whole.rindex("  - name:")].replace("networks:", backend, 1))
    # From rules to direct steering: what answers take changes in the middle, and the old way goes completely.
    steering = "steering: direct\n" if direct else ""
    two.write_text(
        steering.join(("", whole.replace("networks:", mask + backend, 1) + "    strict_arp: true\n"))
    )
    return one, two


def served_by_both(lab: Lab) -> list[Cell]:
    """One TCP and one UDP request to each kind of backend of the network that stays."""
    name = lab.networks[0].name
    cells = [c for c in vlan_cells(lab.networks[:1]) if c.client == "client" and c.proto is not Proto.ICMP]
    assert cells, name
    return cells


def still_served(lab: Lab) -> list[str]:
    return [str(result) for result in probe_all(lab, served_by_both(lab)) if not result.ok]


def look(lab: Lab) -> dict[str, str]:
    """The node as far as we may have changed it, without a process for each part."""
    with inside(lab.node.name):
        sections = quick_dump([network.device for network in lab.networks])
    # A program that was loaded again has another id; the full dump at the end compares filters without it.
    return {name: text for name, text in sections.items() if name != "filters"}


def test_killed_at_every_point(lab: Lab, zygote: Zygote, policies: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = policies
    state = tmp_path / "state"
    before = dump_namespace(lab.node)

    def start_with_old() -> None:
        answer = zygote.ask("apply", state, policy=str(old))
        assert not answer["error"]

    start_with_old()
    assert still_served(lab) == []
    whole = zygote.ask("apply", state, policy=str(new))
    assert not whole["error"]
    assert len(whole["points"]) > 20, whole["points"]
    for number in ends_of_runs(whole["points"]):
        name = whole["points"][number]
        start_with_old()
        answer = zygote.ask("apply", state, policy=str(new), kill_at=number)
        assert answer == {"killed": True}, f"point {number}, {name}: {answer}"
        assert still_served(lab) == [], f"killed before: {name}"
        recovered = zygote.ask("apply", state, policy=str(new))
        assert not recovered["error"], f"killed before: {name}: {recovered['error']}"
        assert zygote.ask("drift", state)["drift"] == [], f"killed before: {name}"
    torn = zygote.ask("teardown", state)
    assert not torn["error"]
    assert difference(before, dump_namespace(lab.node)) == ""


def test_teardown_killed_at_every_point(
    lab: Lab, zygote: Zygote, policies: tuple[Path, Path], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    before, quick = dump_namespace(lab.node), look(lab)
    assert not zygote.ask("apply", state, policy=str(policies[1]))["error"]
    whole = zygote.ask("teardown", state)
    assert len(whole["points"]) > 8
    for number in ends_of_runs(whole["points"]):
        name = whole["points"][number]
        assert not zygote.ask("apply", state, policy=str(policies[1]))["error"]
        assert zygote.ask("teardown", state, kill_at=number) == {"killed": True}, name
        assert not zygote.ask("teardown", state)["error"], name
        assert difference(quick, look(lab)) == "", name
    assert difference(before, dump_namespace(lab.node)) == ""
