# SPDX-License-Identifier: Apache-2.0
"""No packet of a flow that both the old and the new policy serve is lost, doubled or misrouted by a change.

The long form, with a table, is `python -m tools.bench.changes`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tools.bench.changes import Bench, Result, line
from tools.lab import command

pytestmark = [pytest.mark.root, pytest.mark.bpf]

APPLIES = 2
#: In which nftables does something else than beside eBPF; the long form does all in both modes.
NFT_KINDS = {"network added, removed", "VIPs", "mark", "mask", "reverse_path", "track"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A lab with two networks whose clients are served all the time."""
    with Bench(tmp_path_factory.mktemp("changes")) as built:
        yield built


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ebpf", "nft", "direct", "both"])
def test_no_kind_of_change_loses_or_misroutes_a_packet(bench: Bench, mode: str) -> None:
    chosen = [
        kind
        for found, kind in bench.kinds(*{mode} - {"both"})
        if found == mode and (mode != "nft" or kind.name in NFT_KINDS)
    ]
    results = [bench.run(mode, kind, applies=APPLIES) for kind in chosen]
    assert [line(result) for result in results if not is_served(result)] == []


def is_served(result: Result) -> bool:
    """TCP resends a segment now and then on a machine whose CPUs are busy; it never does without a loss for long."""
    out = result.outcome
    return out.packets > 0 and not (out.lost or out.doubled or out.misrouted or out.timeouts or out.failed)


def test_a_change_by_the_installed_command_loses_nothing(bench: Bench) -> None:
    kind = next(kind for _, kind in bench.kinds("nft") if kind.name == "rules.priority")
    with bench.traffic(kind) as traffic:
        traffic.wait_turns()
        for policy in reversed(kind.policies):
            command.apply(bench.lab, bench.state, policy)
        traffic.wait_turns()
    assert traffic.outcome.is_clean, traffic.outcome


#: A wrong order, and a change in which it must show.
WRONG = {
    "table-made-anew": "track",
    "program-detached-first": "VIPs",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", WRONG)
def test_a_wrong_order_is_seen(order: str) -> None:
    """Else the tests above would show nothing."""
    argv = [sys.executable, "-m", "tools.bench.changes", "--modes", "ebpf", "--applies", "4"]
    done = subprocess.run(
        [*argv, "--wrong", order, "--only", WRONG[order]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "1 kinds, 4 applies" in done.stdout
    assert "0 lost, 0 misrouted" not in done.stdout
