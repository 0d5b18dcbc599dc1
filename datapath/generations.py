# SPDX-License-Identifier: Apache-2.0
"""Past policies: what was in force, when, and how one differs from the other."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any

from datapath.errors import InputError
from datapath.state import StateDirectory

#: Generations that are kept; the oldest go first.
KEPT = 20
_FOLDER = "history"
_NAME = re.compile(r"(?P<number>\d{6})\.json\Z")


@dataclass(frozen=True, slots=True)
class Generation:
    """One policy that was put in force.

    Attributes:
        number: counts up with every change.
        applied_at: UTC, ISO 8601.
        plan: the compiled plan as text.
    """

    number: int
    applied_at: str
    policy_name: str
    policy: str
    plan: str

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "applied_at": self.applied_at,
            "policy_name": self.policy_name,
            "policy": self.policy,
            "plan": self.plan,
        }


class History:
    """The generations of one state directory."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self._folder = directory.path / _FOLDER

    def add(self, generation: Generation) -> None:
        """Keep one more, and drop the oldest.

        Raises:
            DatapathError: it cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        text = json.dumps(generation.as_json(), indent=1) + "\n"
        self._directory.write(f"{_FOLDER}/{generation.number:06}.json", text)
        for number in self.numbers()[:-KEPT]:
            (self._folder / f"{number:06}.json").unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """Numbers of all kept generations, oldest first."""
        if not self._folder.is_dir():
            return []
        matches = (_NAME.match(path.name) for path in self._folder.iterdir())
        return sorted(int(match["number"]) for match in matches if match)

    def get(self, number: int) -> Generation:
        """One generation.

        Raises:
            InputError: it is not kept, or its file is damaged.
        """
        path = self._folder / f"{number:06}.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return Generation(**document)
        except FileNotFoundError as error:
            kept = ", ".join(map(str, self.numbers())) or "none"
            raise InputError(f"there is no generation {number}", hint=f"kept: {kept}") from error
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged: {error}", hint="remove it") from error

    def diff(self, number: int) -> str:
        """What the policy of a generation changed against the one kept before it, as a unified diff."""
        earlier = [kept for kept in self.numbers() if kept < number]
        new = self.get(number)
        old = self.get(earlier[-1]) if earlier else Generation(0, "", "", "", "")
        return "".join(
            difflib.unified_diff(
                old.policy.splitlines(keepends=True),
                new.policy.splitlines(keepends=True),
                f"generation {old.number}",
                f"generation {new.number}",
            )
        )
