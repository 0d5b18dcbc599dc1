# SPDX-License-Identifier: Apache-2.0
"""YAML text to plain data and positions, with bounds, and without the surprises of YAML 1.1.

Built from the parser's events: no recursion, so that neither deep nesting nor aliases can exhaust
anything, and five times faster than composing nodes for a file of 4,000 networks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from datapath.policy.addresses import RefusedError, shown
from datapath.policy.source import START, Place, PlacedProblem, Position

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datapath.errors import PolicyPath

DEPTH_MAX = 32

#: Values in the data, those of an alias counted each time: no "billion laughs", and an answer within
#: seconds when every one of them is wrong. 4,095 networks of two families have about 60,000.
VALUES_MAX = 250_000

#: Nobody reads more, and a file of four million commas has as many.
PROBLEMS_MAX = 1_000

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OLD_BOOLEANS = frozenset(
    form for word in ("yes", "no", "on", "off", "y", "n") for form in (word, word.capitalize(), word.upper())
)
_OCTAL = re.compile(r"[-+]?0o?[0-7_]+|[-+]?0[0-9]+")
_BINARY = re.compile(r"[-+]?0b[01_]+")
_UNDERSCORES = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
#: `1:30` is 90 in YAML 1.1; an IPv6 address has two or more colons next to each other, or seven.
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9]){1,6}")


class Unusable:
    """Stands for a value that already has a problem of its own, so that others are not reported for it."""

    __slots__ = ()


UNUSABLE = Unusable()


class BrokenYamlError(Exception):
    """The file cannot be read to its end.

    Attributes:
        problems: why not, and what was found before.
    """

    def __init__(self, problem: PlacedProblem, earlier: Sequence[PlacedProblem] = ()) -> None:
        super().__init__(problem.message)
        self.problems = (*earlier, problem)


@dataclass(slots=True)
class Document:
    """What a file says.

    Attributes:
        data: dicts with text keys, lists, text, integers, floats, booleans, and `UNUSABLE`.
        place: where it all is.
        problems: what was wrong with single values.
    """

    data: Any
    place: Place
    problems: list[PlacedProblem]


@dataclass(slots=True)
class _Frame:
    """A mapping or list whose end has not been seen."""

    data: Any
    position: Position
    anchor: str | None
    keys: dict[str | int, Position]
    children: dict[str | int, Place]
    size: int = 1
    depth: int = 1
    key: str | None = None
    key_position: Position = START
    expects_key: bool = False


def read_yaml(text: str) -> Document:
    """Read one document.

    Raises:
        BrokenYamlError: a syntax error, an empty file, a bound that is exceeded.
    """
    reader = _Reader()
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        raise BrokenYamlError(_syntax_problem(error), reader.problems) from None
    except BrokenYamlError as error:
        raise BrokenYamlError(error.problems[-1], reader.problems) from None
    except yaml.YAMLError as error:
        raise BrokenYamlError(PlacedProblem((), f"not YAML: {error}")) from None
    if reader.result is None:
        raise BrokenYamlError(
            PlacedProblem((), "the file is empty", "begin with `version: 1` and add `networks:`")
        )
    data, place = reader.result
    return Document(data, place, reader.problems)


def _syntax_problem(error: yaml.MarkedYAMLError) -> PlacedProblem:
    mark = error.problem_mark or error.context_mark
    position = Position(mark.line + 1, mark.column + 1) if mark else Position()
    message = f"not YAML: {error.problem or error.context}"
    if error.context and error.problem:
        begin = error.context_mark
        where = f" that begins in line {begin.line + 1}" if begin and mark and begin.line != mark.line else ""
        message += f" ({error.context}{where})"
    hint = "check the brackets, the quotes and the indentation here and above"
    if "character that cannot start any token" in message:
        hint = "YAML is indented with spaces, and text with special characters is quoted"
    return PlacedProblem((), message, hint, position=position)


class _Reader:
    """Builds data and places from events."""

    def __init__(self) -> None:
        self.result: tuple[Any, Place] | None = None
        self.problems: list[PlacedProblem] = []
        self._frames: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, Place, int, int]] = {}
        self._values = 0
        self._documents = 0

    def take(self, event: Any) -> None:
        """The next event of the parser."""
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._scalar(event)
        elif kind in (yaml.MappingStartEvent, yaml.SequenceStartEvent):
            self._open(event, kind is yaml.MappingStartEvent)
        elif kind in (yaml.MappingEndEvent, yaml.SequenceEndEvent):
            self._close()
        elif kind is yaml.AliasEvent:
            self._alias(event)
        elif kind is yaml.DocumentStartEvent:
            self._documents += 1
            if self._documents > 1:
                raise _broken(event, "a second document begins here", "keep one policy per file")

    def _path(self) -> PolicyPath:
        path: list[str | int] = []
        for frame in self._frames:
            if isinstance(frame.data, list):
                path.append(len(frame.data))
            elif frame.key is not None:
                path.append(frame.key)
        return tuple(path)

    def _problem(self, event: Any, message: str, hint: str) -> None:
        if len(self.problems) >= PROBLEMS_MAX:
            raise _broken(event, f"more than {PROBLEMS_MAX} problems before this one", "is this a policy?")
        self.problems.append(PlacedProblem(self._path(), message, hint, position=_at(event)))

    def _scalar(self, event: Any) -> None:
        frame = self._frames[-1] if self._frames else None
        if frame is not None and frame.expects_key:
            self._key(frame, event)
            return
        self._count(event, 1)
        try:
            value = _scalar_value(event)
        except RefusedError as refused:
            self._problem(event, str(refused), refused.hint)
            value = UNUSABLE
        self._add(value, Place(_at(event)), 1, 0, event.anchor)

    def _count(self, event: Any, values: int) -> None:
        self._values += values
        if self._values > VALUES_MAX:
            raise _broken(event, f"more than {VALUES_MAX} values, aliases included", "is this a policy?")

    def _key(self, frame: _Frame, event: Any) -> None:
        key = event.value
        frame.expects_key = False
        frame.key_position = _at(event)
        frame.key = None
        if event.implicit[0] and (key in _OLD_BOOLEANS or not _is_text(key)):
            self._problem(event, f"{shown(key)} cannot be a key", "keys are words, such as `vips`")
        elif key == "<<":
            self._problem(
                event, "merge keys (<<) are not supported", "write the keys out, or use an alias for a value"
            )
        elif key in frame.data:
            frame.key = key
            first = frame.keys[key]
            self._problem(event, f"duplicate key; the first one is in line {first.line}", "keep one of them")
            frame.key = None
        else:
            frame.key = key

    def _open(self, event: Any, mapping: bool) -> None:
        if event.tag is not None:
            self._problem(event, f"the tag {shown(event.tag)} is not supported", "remove it")
        if self._frames and self._frames[-1].expects_key:
            raise _broken(event, "a mapping or a list cannot be a key", "keys are words, such as `vips`")
        if len(self._frames) >= DEPTH_MAX:
            raise _too_deep(event)
        self._count(event, 1)
        self._frames.append(
            _Frame({} if mapping else [], _at(event), event.anchor, {}, {}, expects_key=mapping)
        )

    def _close(self) -> None:
        frame = self._frames.pop()
        self._add(
            frame.data,
            Place(frame.position, frame.keys, frame.children),
            frame.size,
            frame.depth,
            frame.anchor,
        )

    def _alias(self, event: Any) -> None:
        if self._frames and self._frames[-1].expects_key:
            self._frames[-1].expects_key = False
            self._frames[-1].key = None
            self._problem(event, "an alias cannot be a key", "write the key out")
            return
        known = self._anchors.get(event.anchor)
        if known is None:
            self._problem(
                event, f"the alias {shown(event.anchor)} has no anchor before it", "define it with & first"
            )
            self._add(UNUSABLE, Place(_at(event)), 1, 0, None)
            return
        data, place, size, depth = known
        if len(self._frames) + depth > DEPTH_MAX:
            raise _too_deep(event)
        self._count(event, size)
        # The same values once more, found at the alias and not at the anchor.
        self._add(data, Place(_at(event), place.keys, place.children), size, depth, None)

    def _add(self, data: Any, place: Place, size: int, depth: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = (data, place, size, depth)
        if not self._frames:
            self.result = (data, place)
            return
        frame = self._frames[-1]
        frame.size += size
        frame.depth = max(frame.depth, depth + 1)
        if isinstance(frame.data, list):
            frame.children[len(frame.data)] = place
            frame.data.append(data)
            return
        if frame.key is not None:
            frame.data[frame.key] = data
            frame.keys[frame.key] = frame.key_position
            frame.children[frame.key] = place
            frame.key = None
        frame.expects_key = True


def _too_deep(event: Any) -> BrokenYamlError:
    return _broken(event, f"nested deeper than {DEPTH_MAX} levels", "a policy needs about six")


def _broken(event: Any, message: str, hint: str) -> BrokenYamlError:
    return BrokenYamlError(PlacedProblem((), message, hint, position=_at(event)))


def _at(event: Any) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1)


def _scalar_value(event: Any) -> Any:
    if event.tag is not None:
        raise RefusedError(
            f"the tag {shown(event.tag)} is not supported", "remove it: the policy says what is what"
        )
    return _plain(event.value) if event.implicit[0] else event.value


def _is_text(value: str) -> bool:
    try:
        return isinstance(_plain(value), str)
    except RefusedError:
        return False


def _plain(text: str) -> Any:
    """An unquoted scalar.

    Raises:
        RefusedError: no value, or one that YAML 1.1 and 1.2 read differently.
    """
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text in _NULLS:
        raise RefusedError("has no value", "give it one, or remove the key")
    if text[0] not in "0123456789+-.yYnNoO":
        return text
    if _INTEGER.fullmatch(text):
        return _bounded(text)
    if text in _OLD_BOOLEANS:
        # `off` is a value of reverse_path: only the model knows, so it is left as text.
        return text
    for pattern, meaning in (
        (_OCTAL, "a number with a leading zero, octal for some programs"),
        (_BINARY, "a binary number for some programs"),
        (_SEXAGESIMAL, "a number to the base of 60 for some programs"),
        (_UNDERSCORES, "a number for some programs only"),
    ):
        if pattern.fullmatch(text):
            raise RefusedError(
                f"{shown(text)} is {meaning}", "write it as 123 or 0x7b, or quote it if it is text"
            )
    return float(text) if _FLOAT.fullmatch(text) else text


def _bounded(text: str) -> int:
    if len(text) > 40:
        raise RefusedError(f"{shown(text)} is too large", "no number in a policy has more than 32 bits")
    return int(text, 0)
