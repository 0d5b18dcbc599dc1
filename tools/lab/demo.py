# SPDX-License-Identifier: Apache-2.0
"""What `make demo` shows: the broken return path, the classic recipe, and the policy, with real traffic each time."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.lab import classic, command
from tools.lab.cells import Cell, Way, elsewhere_cells, inside_cells, same_ports, vlan_cells
from tools.lab.dnat import Dnat
from tools.lab.dump import difference, dump_namespace
from tools.lab.lab import Lab
from tools.lab.probe import ProbeResult, probe_all
from tools.lab.topology import VIP_BACKENDS, network

_GROUPS = (
    ("Clients that came in by the VLAN", (Way.ROUTER, Way.ON_LINK)),
    ("Pods and nodes that ask each VIP: served inside, never sent out of the VLAN", (Way.INSIDE,)),
    ("Pods and the node, to the rest of the world: by the default gateway, as ever", (Way.GATEWAY,)),
)
_NOTE = """
The way shown is that of the packets that left the node, counted at the other ends of its links. The classic
recipe asks for the VIP as source when a reply is routed; with DNAT a reply still has the pod's address then, and
replies of the node's own sockets never get their mark back.
"""
_CLIENTS = {
    "client": "outside client",
    "client_vlan": "client on the VLAN's subnet",
    "client_overlap": "client of eth0's subnet",
    "pod_a": "the serving pod",
    "pod_b": "another pod",
    "node": "the node",
    "pod_remote": "pod on another node",
}
_LABEL, _WIDTH = 46, 22


@dataclass
class Column:
    """One run of the whole matrix.

    Attributes:
        wrong: packets of clients that were dropped at the default gateway.
    """

    title: str
    results: list[ProbeResult] = field(default_factory=list)
    wrong: int = 0

    @property
    def failed(self) -> list[ProbeResult]:
        """The cells that do not hold."""
        return [r for r in self.results if not r.ok]


def run_matrix(lab: Lab, title: str, *, seconds: float) -> Column:
    """Run every cell in the lab as it is now; `seconds` is how long an answer to a client on a VLAN may take."""
    column = Column(title)
    groups = (
        (vlan_cells(lab.networks), seconds),
        (inside_cells(lab.networks), 1.0),
        (elsewhere_cells(), 1.0),
    )
    for cells, patience in groups:
        column.results += probe_all(lab, cells, seconds=patience)
        column.wrong += lab.by_gateway.wrong_way()
    return column


def demo(dnat: Dnat, recipe: classic.Tool) -> int:
    """Show everything; return the exit status: 0 if the policy makes every cell hold and leaves nothing behind."""
    started = time.monotonic()
    say = _Terminal(colour=sys.stdout.isatty())
    print("datapath: replies leave the way their requests came in, and nothing else gets in.\n")
    print(
        f"A node with eth0 (default route) and eth0.100 (where the VIPs are), pods, and DNAT as {dnat} makes it,"
    )
    print(
        "in network namespaces of this kernel. Every line below is TCP, UDP and ICMP echo, over IPv4 and IPv6.\n"
    )
    with Lab(dnat=dnat) as lab, tempfile.TemporaryDirectory(prefix="datapath-demo-") as folder:
        state = Path(folder, "state")
        before = dump_namespace(lab.node)
        columns = [run_matrix(lab, "no policy", seconds=0.5)]
        with Lab(dnat=dnat) as other:
            classic.apply(other, recipe)
            columns.append(run_matrix(other, "classic recipe", seconds=0.5))
        say.heading("$ cat policy.yaml")
        print(lab.policy())
        say.heading("$ datapath apply policy.yaml")
        print(command.apply(lab, state, lab.policy()))
        columns.append(run_matrix(lab, "datapath", seconds=1.0))
        _table(columns, say)
        say.heading("$ datapath status")
        status = command.datapath(lab, state, "status")
        print(status.stdout + status.stderr)
        say.heading("$ datapath teardown")
        print(command.teardown(lab, state).strip().splitlines()[-1])
        left = difference(before, dump_namespace(lab.node))
    columns[-1].results += _equal_clients(dnat, say)
    return _verdict(columns[-1], status.returncode, left, say, time.monotonic() - started)


def _equal_clients(dnat: Dnat, say: _Terminal) -> list[ProbeResult]:
    """Two clients with the same address, on two VLANs that have the same VIPs, ask from the same ports at once."""
    networks = [network(0), network(1, same_clients=True, same_vips=True)]
    cells = [cell for cell in vlan_cells(networks) if cell.client in (n.role("client") for n in networks)]
    with (
        Lab(dnat=dnat, networks=networks) as lab,
        tempfile.TemporaryDirectory(prefix="datapath-demo-") as state,
    ):
        command.apply(lab, Path(state), lab.policy(network_extra="    isolate_clients: true\n"))
        results = probe_all(lab, same_ports(cells))
    say.heading(
        "\nThe same client address and port on two VLANs at once, to the same VIPs: `isolate_clients: true`"
    )
    for backend in VIP_BACKENDS:
        text, good = _summary([result for result in results if result.cell.backend is backend])
        print(f"  both clients > {backend}".ljust(_LABEL) + (say.good if good else say.bad)(text))
    return results


def _verdict(ours: Column, status: int, left: str, say: _Terminal, seconds: float) -> int:
    for result in ours.failed:
        print(say.bad(f"FAILED {result.cell}: {result.detail}"))
    if status != 0:
        print(say.bad(f"FAILED datapath status: exit status {status}"))
    if left:
        print(say.bad("FAILED teardown left changes on the node:") + "\n" + left)
    else:
        print(
            "rules, routes, links, qdiscs, programs, nftables, iptables and sysctls are as they were before"
        )
    print(
        f"\n{len(ours.results) - len(ours.failed)} of {len(ours.results)} cells hold with the policy ({seconds:.0f} s)"
    )
    return 1 if ours.failed or left or status != 0 else 0


class _Terminal:
    """Marks that are coloured on a terminal only."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def good(self, text: str) -> str:
        """Return a text that says that something is right."""
        return self._paint("32", text)

    def bad(self, text: str) -> str:
        """Return a text that says that something is wrong."""
        return self._paint("31", text)

    def heading(self, text: str) -> None:
        """Print a line that stands out."""
        print(self._paint("1", text), flush=True)


def _table(columns: Sequence[Column], say: _Terminal) -> None:
    print(" " * _LABEL + "".join(c.title.ljust(_WIDTH) for c in columns).rstrip())
    for title, ways in _GROUPS:
        say.heading(title)
        for row in dict.fromkeys(
            (_row(r.cell), r.cell.expect) for r in columns[0].results if r.cell.expect in ways
        ):
            line = f"  {row[0]}".ljust(_LABEL)
            for column in columns:
                text, good = _summary([r for r in column.results if (_row(r.cell), r.cell.expect) == row])
                line += (say.good if good else say.bad)(text.ljust(_WIDTH))
            print(line.rstrip())
    counts = "".join(str(c.wrong).ljust(_WIDTH) for c in columns).rstrip()
    say.heading("Replies dropped at the default gateway".ljust(_LABEL) + counts)
    print(_NOTE)


def _row(cell: Cell) -> str:
    by_vlan = cell.expect in (Way.ROUTER, Way.ON_LINK)
    return f"{_CLIENTS[cell.client]} > {cell.backend}" if by_vlan else _CLIENTS[cell.client]


def _summary(results: Sequence[ProbeResult]) -> tuple[str, bool]:
    """Return a table cell: all right, or how many are not and which way their packets took."""
    bad = [r for r in results if not r.ok]
    ways = sorted({way for r in bad or results for way in r.ways} or {Way.NOWHERE})
    if not bad:
        return f"✓ {', '.join(ways)}", True
    count = "" if len(bad) == len(results) else f" {len(bad)} of {len(results)}:"
    return f"✗{count} {', '.join(ways)}", False
