# SPDX-License-Identifier: Apache-2.0
"""The text of a policy file: where things are in it, and how its problems are shown."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from datapath.errors import PolicyError, PolicyPath, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: A terminal's width, and what a cut line keeps before the column of its problem.
LINE_CELLS = 120
LINE_CELLS_BEFORE = 60

#: More than this helps nobody; `PolicyError.problems` has them all.
RENDERED_MAX = 200

#: What YAML 1.1 (and so libyaml's line numbers) takes for the end of a line.
_LINE_BREAK = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,60}")


class Position(NamedTuple):
    """Line and column of a character, both from 1."""

    line: int = 1
    column: int = 1


START = Position()


@dataclass(slots=True)
class Place:
    """Where a value of the file is, and the values inside it.

    Attributes:
        position: its first character.
        keys: of a mapping: the position of each key.
        children: of a mapping or a list: the places inside.
    """

    position: Position
    keys: dict[str | int, Position] | None = None
    children: dict[str | int, Place] | None = None


_NOWHERE = Place(START)


@dataclass(frozen=True, slots=True)
class PlacedProblem(Problem):
    """A problem that has a position of its own, because nothing was built from that part of the file."""

    position: Position = START


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would act upon."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def render_path(path: PolicyPath) -> str:
    """A path as a user writes it: ``networks[0].vips[1]``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{step[:60]!r}]"
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a file as YAML counts them, without their ends."""
    return _LINE_BREAK.split(text)


class PolicySource:
    """A policy file as text, with the positions of everything that was read from it."""

    def __init__(self, filename: str, text: str, root: Place | Callable[[], Place] = _NOWHERE) -> None:
        """Positions may come later: only problems need them."""
        self.filename = filename
        self.text = text
        self._positions = root

    @cached_property
    def _lines(self) -> list[str]:
        return split_lines(self.text)

    @cached_property
    def _root(self) -> Place:
        return self._positions if isinstance(self._positions, Place) else self._positions()

    def locate(self, path: PolicyPath, on_key: bool = False) -> Position:
        """Position of a value, or of its key.

        A path that is not in the file (a default, say) has the position of its nearest parent that is.
        """
        place, depth = self._nearest(path)
        if on_key and 0 < depth == len(path):
            parent, _ = self._nearest(path[:-1])
            return parent.keys.get(path[-1], place.position) if parent.keys else place.position
        return place.position

    def line_of(self, path: PolicyPath) -> int:
        """Line of a value, from 1."""
        return self.locate(path).line

    def has(self, path: PolicyPath) -> bool:
        """The file itself holds this path."""
        return self._nearest(path)[1] == len(path)

    def sort(self, problems: Sequence[Problem]) -> tuple[Problem, ...]:
        """The problems in the order of the file, each once."""
        unique = dict.fromkeys(problems)
        return tuple(sorted(unique, key=lambda p: (self.position_of(p), render_path(p.path), p.message)))

    def position_of(self, problem: Problem) -> Position:
        """Where a problem is."""
        if isinstance(problem, PlacedProblem):
            return problem.position
        return self.locate(problem.path, problem.on_key)

    def error(self, problems: Sequence[Problem]) -> PolicyError:
        """The exception for these problems, in file order and rendered."""
        ordered = self.sort(problems)
        return PolicyError(ordered, self.render(ordered))

    def render(self, problems: Sequence[Problem]) -> str:
        """The problems in file order for a terminal: position, message, line, caret and hint of each."""
        ordered = self.sort(problems)
        blocks = [self._render_one(problem) for problem in ordered[:RENDERED_MAX]]
        if len(ordered) > RENDERED_MAX:
            blocks.append(
                f"{printable(self.filename)}: {len(ordered) - RENDERED_MAX} more problems are not shown"
            )
        return "\n".join(blocks)

    def _nearest(self, path: PolicyPath) -> tuple[Place, int]:
        place = self._root
        for depth, step in enumerate(path):
            child = place.children.get(step) if place.children else None
            if child is None:
                return place, depth
            place = child
        return place, len(path)

    def _shown_path(self, path: PolicyPath) -> PolicyPath:
        # `gateway: 192.0.2.1` is a list of one in the model but not in the file.
        while path and isinstance(path[-1], int) and not self.has(path):
            path = path[:-1]
        return path

    def _render_one(self, problem: Problem) -> str:
        position = self.position_of(problem)
        where = render_path(self._shown_path(problem.path))
        message = f"{where}: {problem.message}" if where else problem.message
        lines = [f"{self.filename}:{position.line}:{position.column}: error: {message}"]
        lines = [printable(line) for line in lines]
        if position.line <= len(self._lines):
            lines += _excerpt(self._lines[position.line - 1], position.column)
        if problem.hint:
            lines.append(f"hint: {printable(problem.hint)}")
        return "\n".join(lines)


def _cells(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _excerpt(line: str, column: int) -> list[str]:
    """The line, cut around the column if it is long, and a caret below the column.

    Tabs stay tabs in both lines, so that they are aligned with any tab width.
    """
    start, end = 0, len(line)
    if end > LINE_CELLS:
        start = max(0, column - 1 - LINE_CELLS_BEFORE)
        end = min(len(line), start + LINE_CELLS)
    lead = "..." if start else ""
    tail = "..." if end < len(line) else ""
    text, padding = lead, " " * len(lead)
    for index in range(start, end):
        character = line[index]
        as_shown = "\t" if character == "\t" else printable(character)
        text += as_shown
        if index < column - 1:
            padding += "\t" if character == "\t" else " " * sum(map(_cells, as_shown))
    return [f"  {text.rstrip()}{tail}", f"  {padding}^"] if text.strip() else [f"  {padding}^"]
