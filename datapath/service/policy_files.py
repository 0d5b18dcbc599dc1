# SPDX-License-Identifier: Apache-2.0
"""The policy file and its drop-ins, as one policy.

A drop-in (`*.yaml` in the policy directory) holds `version: 1` and `networks:`, nothing else. Its networks come
behind those of the policy file, in the order of the files' names. Problems have the position in the file that
they are in.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datapath.errors import InputError, PolicyError, PolicyPath, Problem
from datapath.kernel.lease import is_being_written
from datapath.policy import LoadedPolicy, PolicySource, load_policy, parse_policy
from datapath.policy.loader import read_source
from datapath.policy.yamlfile import Document

_DROP_IN_KEYS = frozenset({"version", "networks"})
_PATTERN = "*.yaml"
_LINE = 110


@dataclass(frozen=True, slots=True)
class _Part:
    """One file: its networks are those from `first` on in the whole."""

    source: PolicySource
    document: Document
    first: int


class _MergedSource(PolicySource):
    """The text of the whole policy; problems are shown where they are in the files."""

    def __init__(self, filename: str, text: str, parts: Sequence[_Part]) -> None:
        super().__init__(filename, text)
        self._parts = parts

    def error(self, problems: Sequence[Problem]) -> PolicyError:
        by_part: defaultdict[int, list[Problem]] = defaultdict(list)
        for problem in problems:
            number, path = self._place(problem.path)
            by_part[number].append(Problem(path, problem.message, problem.hint, problem.on_key))
        rendered = [self._parts[number].source.render(by_part[number]) for number in sorted(by_part)]
        return PolicyError(tuple(problems), "\n".join(rendered))

    def _place(self, path: PolicyPath) -> tuple[int, PolicyPath]:
        if len(path) < 2 or path[0] != "networks" or not isinstance(path[1], int):
            return 0, path
        number = max(index for index, part in enumerate(self._parts) if part.first <= path[1])
        return number, ("networks", path[1] - self._parts[number].first, *path[2:])


class PolicyFiles:
    """A policy file, and a directory of drop-ins if there is one.

    Args:
        policy: the file.
        drop_ins: the directory; it may be missing or empty.
    """

    def __init__(self, policy: Path, drop_ins: Path | None = None) -> None:
        self._policy = policy
        self._drop_ins = drop_ins

    def load(self) -> LoadedPolicy:
        """Read all files.

        Raises:
            InputError: a file cannot be read.
            PolicyError: the policy cannot be used; it has all the problems.
        """
        others = self._drop_in_files()
        return _merge([self._policy, *others]) if others else load_policy(self._policy)

    def directories(self) -> frozenset[Path]:
        """Where a change of the files shows: also where symbolic links lead to (ConfigMaps are two deep)."""
        found = {self._policy.absolute().parent, self._policy.resolve().parent}
        if self._drop_ins is not None:
            found |= {self._drop_ins.absolute(), self._drop_ins.absolute().parent}
            found |= {path.resolve().parent for path in self._drop_in_files()}
        return frozenset(found)

    def fingerprint(self) -> tuple[tuple[str, int, int, int, int], ...]:
        """Changes whenever a file is saved, replaced, added, removed, or becomes readable."""
        found = []
        for path in [self._policy, *self._drop_in_files()]:
            try:
                status = path.stat()
            except OSError:
                found.append((str(path), 0, 0, 0, 0))
            else:
                found.append(
                    (str(path), status.st_ino, status.st_mtime_ns, status.st_size, status.st_ctime_ns)
                )
        return tuple(found)

    def are_being_written(self) -> bool:
        """Whether somebody has one of the files open for writing: half a policy may be a policy, too."""
        return any(is_being_written(path) for path in [self._policy, *self._drop_in_files()])

    def _drop_in_files(self) -> list[Path]:
        if self._drop_ins is None:
            return []
        # Editors keep their copies under names with a dot in front.
        return sorted(path for path in self._drop_ins.glob(_PATTERN) if not path.name.startswith("."))


def _merge(paths: Sequence[Path]) -> LoadedPolicy:
    parts: list[_Part] = []
    errors: list[PolicyError] = []
    first = 0
    for path in paths:
        try:
            source, document = _read(path)
            if parts:
                _refuse_other_keys(source, document)
        except PolicyError as error:
            errors.append(error)
            continue
        parts.append(_Part(source, document, first))
        first += len(_networks(document))
    if not errors:
        errors = list(_duplicates(parts))
    if errors:
        raise _together(errors)
    data: dict[str, Any] = dict(parts[0].document.data)
    data["networks"] = [network for part in parts for network in _networks(part.document)]
    text = f"# merged from: {', '.join(os.fspath(path) for path in paths)}\n"
    text += yaml.safe_dump(data, sort_keys=False, width=_LINE, allow_unicode=True)
    source = _MergedSource(str(paths[0]), text, parts)
    try:
        loaded = parse_policy(text.encode(), str(paths[0]))
    except PolicyError as error:
        raise source.error(error.problems) from None
    return LoadedPolicy(loaded.policy, source)


def _read(path: Path) -> tuple[PolicySource, Document]:
    try:
        source, document = read_source(path)
    except InputError as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError((Problem((), str(error), error.hint),), str(error)) from None
    if document.problems:
        raise source.error(document.problems)
    if not isinstance(document.data, dict):
        raise source.error([Problem((), "a policy is a mapping", "begin with `version: 1`")])
    return source, document


def _networks(document: Document) -> list[Any]:
    networks = document.data.get("networks")
    return networks if isinstance(networks, list) else []


def _refuse_other_keys(source: PolicySource, document: Document) -> None:
    problems = [
        Problem((key,), "a drop-in file holds only networks", "move it to the policy file", on_key=True)
        for key in document.data
        if key not in _DROP_IN_KEYS
    ]
    if document.data.get("version") != 1:
        problems.append(Problem(("version",), "this program reads version 1", "begin with `version: 1`"))
    if not isinstance(document.data.get("networks", []), list):
        problems.append(Problem(("networks",), "networks is a list", "begin each network with `- name:`"))
    if problems:
        raise source.error(problems)


def _duplicates(parts: Sequence[_Part]) -> Iterator[PolicyError]:
    """A name may be in one file only; the policy's own check knows no files."""
    seen: dict[str, tuple[int, str]] = {}
    for number, part in enumerate(parts):
        for index, network in enumerate(_networks(part.document)):
            name = network.get("name") if isinstance(network, dict) else None
            if not isinstance(name, str):
                continue
            path = ("networks", index, "name")
            position = part.source.locate(path)
            where = f"{part.source.filename}:{position.line}:{position.column}"
            owner, taken = seen.setdefault(name, (number, where))
            if owner != number:
                message = f"the name {name} is taken at {taken}"
                yield part.source.error([Problem(path, message, "names are unique over all files")])


def _together(errors: Sequence[PolicyError]) -> PolicyError:
    problems = tuple(problem for error in errors for problem in error.problems)
    return PolicyError(problems, "\n".join(error.rendered for error in errors))
