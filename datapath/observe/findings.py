# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` found, as values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Severity(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its name, stable for scripts.
        seen: what there is.
        matters: what it does to users; empty where all is well.
        remedy: what to do; empty where nothing is to be done.
    """

    check: str
    severity: Severity
    seen: str
    matters: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        return {
            "check": self.check,
            "severity": str(self.severity),
            "seen": self.seen,
            "matters": self.matters,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def has_failed(self) -> bool:
        return any(finding.severity is Severity.FAIL for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.has_failed,
            "findings": [finding.as_json() for finding in self.findings],
        }

    def render(self) -> str:
        """For a terminal: one line a finding, and below it what is to be known of a bad one."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.severity:<4}  {finding.check}: {finding.seen}")
            if finding.matters:
                lines.append(f"      why it matters: {finding.matters}")
            if finding.remedy:
                lines.append(f"      what to do: {finding.remedy}")
        counts = {severity: sum(f.severity is severity for f in self.findings) for severity in Severity}
        lines.append(", ".join(f"{count} {severity}" for severity, count in counts.items()))
        return "\n".join(lines)


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding(check, Severity.OK, seen)


def warn(check: str, seen: str, matters: str, remedy: str) -> Finding:
    """It works, but not as well or as long as it should."""
    return Finding(check, Severity.WARN, seen, matters, remedy)


def fail(check: str, seen: str, matters: str, remedy: str) -> Finding:
    """Users suffer, or the next act would be refused."""
    return Finding(check, Severity.FAIL, seen, matters, remedy)
