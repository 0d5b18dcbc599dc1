# SPDX-License-Identifier: Apache-2.0
"""What is lost or misrouted while policies change, by kind of change.

    python -m tools.bench.changes [--applies 12] [--rate 1500] [--only NAME] [--json FILE] [--wrong ORDER]

Needs root. Builds a lab of its own: two networks with clients, both families, DNAT as kube-proxy makes it. While the
policies of a kind are applied back to back, every flow that all of them serve is watched: numbered datagrams and
echoes at a fixed rate, new connections all the time, TCP transfers whose bytes are compared. Prints one line a kind;
the exit status is 1 where anything was lost. What it counts is in `tools.lab.flows`.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from datapath.errors import PolicyError
from datapath.policy import parse_policy
from tools.bench import wrong_orders
from tools.bench.applier import Applier
from tools.bench.change_kinds import Kind, backend_kinds, kinds, prepare
from tools.lab import command
from tools.lab.flows import Outcome, Traffic, all_flows
from tools.lab.lab import Lab
from tools.lab.topology import network

#: What stands at the top level of every policy of a run, by the name that is printed.
MODES: Final[dict[str, dict[str, Any]]] = {
    "ebpf": {"backend": "ebpf"},
    "nft": {"backend": "nft"},
    "direct": {"backend": "ebpf", "steering": "direct"},
}
#: Every so many applies, one by the installed command instead of its code in a process that stays.
_BY_COMMAND: Final = 25
_LOSSES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One kind's line.

    Attributes:
        operations: acts of the kernel, of all applies together.
        blamed: where in the engine's course losses fell.
    """

    mode: str
    kind: str
    applies: int
    operations: int
    outcome: Outcome
    blamed: tuple[str, ...] = ()


class Bench:
    """A lab with its node, on which kinds of changes are tried. A context manager.

    Args:
        folder: for state and policy files.
        wrong: one of `wrong_orders.ORDERS`.

    Attributes:
        state: the state directory.
    """

    def __init__(self, folder: Path, *, wrong: str = "") -> None:
        self._folder = folder
        self.state = folder / "state"
        self._wrong = wrong
        self.lab = Lab(networks=[network(0), network(1)], datagrams=False)

    def __enter__(self) -> Self:
        self.lab.__enter__()
        prepare(self.lab)
        self._applier = Applier(self.lab, self._folder, wrong=self._wrong)
        return self

    def __exit__(self, *error: object) -> None:
        self._applier.__exit__(None, None, None)
        self.lab.close()

    def kinds(self, *modes: str) -> Iterator[tuple[str, Kind]]:
        """Every kind in these modes that this version supports, by mode; the changes of backend last."""
        for mode in modes:
            for kind in kinds(self.lab, **MODES[mode]):
                if _is_supported(kind):
                    yield mode, kind
        for kind in backend_kinds(self.lab):
            yield "both", kind

    def traffic(self, kind: Kind, *, rate: int = 1500) -> Traffic:
        """Put the first of the kind's policies in force and return the flows that all of them serve, to be entered."""
        self._applier.apply(kind.policies[0])
        self._applier.points.clear()
        return Traffic(self.lab, [f for f in all_flows(self.lab.networks) if kind.serves(f)], rate=rate)

    def run(self, mode: str, kind: Kind, *, applies: int, rate: int = 1500) -> Result:
        """Apply the kind's policies in turn, as often as said, and return what happened to the flows meanwhile."""
        operations = 0
        with self.traffic(kind, rate=rate) as traffic:
            traffic.wait_turns()
            for number in range(1, applies + 1):
                policy = kind.policies[number % len(kind.policies)]
                if number % _BY_COMMAND == 0:
                    command.apply(self.lab, self.state, policy)
                else:
                    self._applier.apply(policy)
                    operations += self._applier.steps
            traffic.wait_turns()
        return Result(mode, kind.name, applies, operations, traffic.outcome, self._blame(traffic.outcome))

    def _blame(self, outcome: Outcome) -> tuple[str, ...]:
        """After which operation, and before which, the first losses were sent."""
        points = self._applier.points
        moments = [moment for moment, _ in points]
        found = []
        for moment, flow in outcome.lost_at[:_LOSSES_SHOWN]:
            place = bisect.bisect(moments, moment)
            before = points[place - 1][1] if place else "the first apply"
            after = points[place][1] if place < len(points) else "the end"
            found.append(f"{flow}: sent after [{before}], before [{after}]")
        return tuple(found)


def _is_supported(kind: Kind) -> bool:
    try:
        for policy in kind.policies:
            parse_policy(policy.encode(), "policy.yaml")
    except PolicyError:
        return False
    return True


_HEADER: Final = (
    f"{'mode':6} {'kind of change':32} {'applies':>7} {'acts':>6} {'packets':>8} {'lost':>5} {'twice':>5}"
    f" {'misrouted':>9} {'TCP turns':>9} {'resent':>6} {'stalls':>6} {'machine':>7}"
)


def line(result: Result) -> str:
    """One line of the table."""
    out = result.outcome
    text = (
        f"{result.mode:6} {result.kind:32} {result.applies:7} {result.operations:6} {out.packets:8} {out.lost:5}"
        f" {out.doubled:5} {out.misrouted:9} {out.turns:9} {out.resent:6} {out.timeouts:6} {out.machine:7}"
    )
    details = [*out.failed[:_LOSSES_SHOWN], *result.blamed]
    return "\n".join([text, *(f"       ! {detail}" for detail in details)])


def total(results: Sequence[Result]) -> str:
    """The last line."""
    outcomes = [result.outcome for result in results]
    return (
        f"{len(results)} kinds, {sum(r.applies for r in results)} applies, {sum(o.packets for o in outcomes)}"
        f" packets: {sum(o.lost for o in outcomes)} lost, {sum(o.misrouted for o in outcomes)} misrouted,"
        f" {sum(o.doubled for o in outcomes)} doubled, {sum(o.resent for o in outcomes)} TCP segments resent"
    )


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--applies", type=int, default=12, help="of each kind (default: 12)")
    parser.add_argument("--rate", type=int, default=1500, help="numbered packets a second (default: 1500)")
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--only", help="only kinds whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--wrong", choices=sorted(wrong_orders.ORDERS), help="apply in a wrong order")
    arguments = parser.parse_args()
    results = []
    print(_HEADER, flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="datapath-bench-") as name,
        Bench(Path(name), wrong=arguments.wrong or "") as bench,
    ):
        for mode, kind in bench.kinds(*arguments.modes):
            if arguments.only is None or arguments.only in kind.name:
                results.append(bench.run(mode, kind, applies=arguments.applies, rate=arguments.rate))
                print(line(results[-1]), flush=True)
    print(total(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    return 0 if all(result.outcome.is_clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
