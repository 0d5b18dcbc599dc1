# SPDX-License-Identifier: Apache-2.0
"""Everything that a run says, as tables; and the pages that show them, between markers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tools.bench import tables, targets
from tools.bench.statistics import Summary
from tools.bench.tables import Table
from tools.bench.variants import BASE, TITLES

#: What a page may ask for, whether or not a run has it.
_SECTIONS: Final = (
    "targets",
    "machine",
    "noise",
    "forwarding",
    "again",
    "control",
    "programs",
    "tcp",
    "idle",
    "changes",
    "problems",
)
_MARKER: Final = re.compile(r"(<!-- bench:begin (?P<name>[\w-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)


_ROOT: Final = Path(__file__).parents[2]
_PROBLEM_MAX: Final = 240
_ABSENT: Final = "Not measured in this run.\n"


class ReportError(Exception):
    """A page asks for what no result can give; the text names it."""


def control_tables(result: dict[str, Any]) -> Iterator[Table]:
    """One table per contestant: operations against numbers of networks."""
    for who in dict.fromkeys(row["who"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["who"] == who]
        counts = sorted({row["networks"] for row in rows})
        operations = dict.fromkeys(name for row in rows for name in row["times"])
        body = []
        for operation in operations:
            cells = [operation]
            for count in counts:
                samples = [
                    value * 1000
                    for row in rows
                    if row["networks"] == count
                    for value in row["times"].get(operation, [])
                ]
                cells.append(_milliseconds(samples))
            body.append(cells)
        if body:
            yield Table(f"Control plane, {who}: ms, min/median/max", ["", *(f"N={c}" for c in counts)], body)


def _milliseconds(samples: list[float]) -> str:
    if not samples:
        return "-"
    found = Summary.of(samples)
    if len(samples) == 1:
        return f"{found.minimum:.3g}" if found.minimum < 1000 else f"{found.minimum:.0f}"
    return "/".join(
        f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in (found.minimum, found.median, found.maximum)
    )


def program_table(result: dict[str, Any]) -> Table:
    """Cost of our programs, less that of the one that does nothing."""
    rows = []
    for row in result["rows"]:
        own, nothing = min(row["samples"]), min(row["nothing"])
        title = f"{row['program']} ({TITLES[row['variant']]}), {row['packet']}, IPv{row['family']}"
        rows.append([title, str(row["networks"]), str(own), str(nothing), str(own - nothing)])
    return Table(
        "eBPF programs by themselves (BPF_PROG_TEST_RUN): ns, least of the rounds",
        ["", "networks", "program", "nothing", "difference"],
        rows,
    )


def tcp_tables(result: dict[str, Any]) -> Iterator[Table]:
    """One table per family: variants against loads, medians."""
    for family in sorted({row["family"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["family"] == family]
        loads = dict.fromkeys((row["load"], row["unit"]) for row in rows)
        body = []
        for variant, count in dict.fromkeys((row["variant"], row["networks"]) for row in rows):
            cells = [f"{TITLES[variant]}, N={count}"]
            for load, _ in loads:
                found = [
                    r for r in rows if (r["variant"], r["networks"], r["load"]) == (variant, count, load)
                ]
                cells += [_rate(row) for row in found]
            body.append(cells)
        yield Table(
            f"TCP on one CPU, IPv{family}: median",
            ["", *(f"{load}, {unit}" for load, unit in loads)],
            body,
        )


def _rate(row: dict[str, Any]) -> str:
    return f"{Summary.of(row['samples']).median:.2f}" if row["samples"] and not row["problem"] else "failed"


def idle_table(rows: list[dict[str, Any]]) -> Table:
    """The daemon that has nothing to do."""
    body = [
        [str(r["networks"]), f"{r['rss_mb']:.1f}", f"{r['cpu'] * 100:.3f} %", f"{r['seconds']:.0f}"]
        for r in rows
    ]
    return Table("Idle daemon", ["networks", "memory (RSS), MB", "CPU", "watched, s"], body)


def changes_table(kinds: list[dict[str, Any]]) -> Table:
    """What became of packets while policies changed."""
    rows = [
        [
            f"{kind['mode']}: {kind['kind']}",
            str(kind["applies"]),
            str(kind["outcome"].get("packets", "-")),
            str(kind["outcome"]["lost"]),
            str(kind["outcome"]["misrouted"]),
        ]
        for kind in kinds
    ]
    return Table("Packets during changes", ["", "applies", "packets", "lost", "misrouted"], rows)


def machine_table(result: dict[str, Any]) -> Table:
    """Where and when; mitigations in one line."""
    facts = dict(result["machine"])
    facts["mitigations"] = "; ".join(f"{name}: {text}" for name, text in facts.get("mitigations", {}).items())
    return Table("Machine", ["", ""], [[name, str(value).replace("|", "/")] for name, value in facts.items()])


def noise_table(result: dict[str, Any]) -> Table:
    """Copies of the base against it."""
    rows = [[label.partition(", ")[2], f"{value * 100:+.1f} %"] for label, value in targets.noise(result)]
    return Table(
        f"Noise: identical copies of the variant {BASE}, difference of minima", ["", "difference"], rows
    )


def sections(result: dict[str, Any]) -> dict[str, list[Table]]:
    """All tables by the name of their marker."""
    found: dict[str, list[Table]] = {"targets": [targets.table(result)], "machine": [machine_table(result)]}
    if result.get("forwarding"):
        found["noise"] = [noise_table(result)]
        found["forwarding"] = list(tables.forwarding_tables(result["forwarding"]))
    if result.get("again"):
        found["again"] = list(tables.forwarding_tables(result["again"]))
    if result.get("control"):
        found["control"] = list(control_tables(result["control"]))
    if (result.get("programs") or {"rows": []})["rows"]:
        found["programs"] = [program_table(result["programs"])]
    if result.get("tcp"):
        found["tcp"] = list(tcp_tables(result["tcp"]))
    if result.get("idle"):
        found["idle"] = [idle_table(result["idle"])]
    if result.get("changes"):
        found["changes"] = [changes_table(result["changes"])]
    return found


def problems(result: dict[str, Any]) -> list[str]:
    """What has no figure, and why; one line each, without what is true on this machine only."""
    return [" ".join(line.replace(f"{_ROOT}/", "").split())[:_PROBLEM_MAX] for line in _problems(result)]


def _problems(result: dict[str, Any]) -> list[str]:
    lines = tables.notes(result["forwarding"]) if result.get("forwarding") else []
    for row in (result.get("control") or {"rows": []})["rows"]:
        if row.get("problem"):
            lines.append(f"control plane, {row['who']}, {row['networks']} networks: {row['problem']}")
    for row in (result.get("programs") or {"unavailable": []})["unavailable"]:
        lines.append(f"eBPF programs, {row['variant']}, {row['networks']} networks: {row['reason']}")
    lines += [f"the part {name} failed: {text}" for name, text in result.get("failed", {}).items()]
    return lines


def as_text(result: dict[str, Any]) -> str:
    """All of it for a terminal; the targets last, where they are read."""
    found = sections(result)
    wanted = [name for name in found if name not in {"targets", "machine"}]
    parts = [table.text() for name in wanted for table in found[name]]
    parts += [f"no figure: {line}" for line in problems(result)]
    # A single part says nothing about most targets.
    goals = targets.table(result, with_unknown={"forwarding", "control"} <= found.keys())
    return "\n".join([*parts, "", goals.text()] if goals.rows else parts)


def fill(page: str, result: dict[str, Any]) -> str:
    """A page with the text between its markers replaced.

    Raises:
        ReportError: a marker has a name that means nothing.
    """
    found = {name: "\n".join(table.markdown() for table in group) for name, group in sections(result).items()}
    found["problems"] = "".join(f"- {line}\n" for line in problems(result)) or "None.\n"

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in _SECTIONS:
            raise ReportError(f"there is nothing by the name of the marker {name}")
        return f"{match[1]}{found.get(name, _ABSENT)}{match[3]}"

    return _MARKER.sub(replace, page)


def write(page: Path, result: dict[str, Any]) -> None:
    """Fill a page in place; see `fill`."""
    page.write_text(fill(page.read_text(encoding="utf-8"), result), encoding="utf-8")
