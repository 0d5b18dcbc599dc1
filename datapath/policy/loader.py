# SPDX-License-Identifier: Apache-2.0
"""From a file to a policy that can be used, or to all of its problems with their positions."""

from __future__ import annotations

import copy
import hashlib
import marshal
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from datapath.errors import InputError, PolicyPath, Problem
from datapath.policy.addresses import kind
from datapath.policy.crosscheck import cross_check
from datapath.policy.egress import Egress
from datapath.policy.model import NETWORKS_MAX, Marks, Network, Node, Policy
from datapath.policy.probe import Probe
from datapath.policy.readable import Readable
from datapath.policy.source import PlacedProblem, PolicySource, Position, split_lines
from datapath.policy.translate import nearest_key, problems_of
from datapath.policy.yamlfile import BrokenYamlError, Document, Unusable, read_yaml

if TYPE_CHECKING:
    from pathlib import Path

#: Far more than 4,095 networks need (about 800 kB).
FILE_BYTES_MAX = 4 * 1024 * 1024

#: What YAML does not allow; also what no terminal should be sent.
_CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy without problems, and its text for problems that are found later.

    Attributes:
        policy: every default filled in.
        source: positions and rendering.
    """

    policy: Policy
    source: PolicySource


def load_policy(path: Path) -> LoadedPolicy:
    """Read a policy file.

    Raises:
        InputError: the file cannot be read.
        PolicyError: the policy cannot be used; it has all the problems.
    """
    return parse_policy(_read_bytes(path), str(path))


def read_source(path: Path) -> tuple[PolicySource, Document]:
    """Read one file of several that make a policy together: its data and positions, not validated.

    Raises:
        InputError: the file cannot be read.
        PolicyError: it is no YAML.
    """
    decoded = _decode(_read_bytes(path), str(path))
    try:
        document = read_yaml(decoded)
    except BrokenYamlError as broken:
        raise PolicySource(str(path), decoded).error(broken.problems) from None
    return PolicySource(str(path), decoded, document.place), document


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells the loader that there is more.
            return file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"cannot read the policy {str(path)!r}: {reason}",
            hint="give the path of a policy file that you may read",
        ) from None


def parse_policy(text: bytes, filename: str) -> LoadedPolicy:
    """Read a policy from the bytes of a file.

    Args:
        text: UTF-8, with or without a byte order mark.
        filename: for messages only.

    Raises:
        PolicyError: the policy cannot be used; it has all the problems.
    """
    decoded = _decode(text, filename)
    digest = hashlib.sha256(text).digest()
    if _KNOWN.checked is not None and _KNOWN.text == digest:
        return LoadedPolicy(_KNOWN.checked, PolicySource(filename, decoded, lambda: read_yaml(decoded).place))
    try:
        document = read_yaml(decoded)
    except BrokenYamlError as broken:
        raise PolicySource(filename, decoded).error(broken.problems) from None
    source = PolicySource(filename, decoded, document.place)
    version = document.data.get("version") if isinstance(document.data, dict) else None
    if type(version) is int and version != 1:
        # The rest follows other rules: its problems would mislead.
        raise source.error(
            [Problem(("version",), f"version {version} is not known", "this program reads version 1")]
        )
    policy, problems = _validate(document)
    if policy is None or problems:
        raise source.error(problems)
    _KNOWN.text = digest
    return LoadedPolicy(policy, source)


def _decode(text: bytes, filename: str) -> str:
    if len(text) > FILE_BYTES_MAX:
        raise PolicySource(filename, "").error(
            [PlacedProblem((), f"the file is larger than {FILE_BYTES_MAX >> 20} MiB", "is this the policy?")]
        )
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        shown = text.decode("utf-8-sig", "backslashreplace")
        before = split_lines(text[: error.start].decode("utf-8-sig"))
        position = Position(len(before), len(before[-1]) + 1)
        problem = PlacedProblem(
            (), f"not UTF-8: byte {text[error.start]:#04x}", "save the file as UTF-8", position=position
        )
        raise PolicySource(filename, shown).error([problem]) from None
    control = _CONTROL.search(decoded)
    if control:
        before = split_lines(decoded[: control.start()])
        position = Position(len(before), len(before[-1]) + 1)
        problem = PlacedProblem(
            (),
            f"the control character U+{ord(control.group()):04X} is not allowed",
            "remove it",
            position=position,
        )
        raise PolicySource(filename, decoded).error([problem])
    return decoded


def _validate(document: Document) -> tuple[Policy | None, list[Problem]]:
    """The policy, if the shape of everything is right, and all problems."""
    data = document.data
    problems: list[Problem] = list(document.problems)
    if not isinstance(data, dict):
        if not isinstance(data, Unusable):
            hint = "begin with `version: 1` and add `networks:`"
            problems.append(Problem((), f"a policy is a mapping, not {kind(data)}", hint))
        return None, problems
    _KNOWN.text = b""
    try:
        policy = _KNOWN.policy(data)
    except ValidationError as error:
        unusable = {problem.path for problem in document.problems}
        found = [p for p in problems_of(error) if not _is_below(p.path, unusable)]
        problems += found
        return None, [*problems, *cross_check(_readable_part(data, found))]
    if not problems and policy is _KNOWN.checked:
        return policy, []
    problems += cross_check(Readable.of(policy))
    _KNOWN.checked = None if problems else policy
    return policy, problems


class _Known:
    """The last policy that was right. A daemon reads the same one again, or one with most of its networks.

    An item that says the same is the same network, with all that was worked out about it. Found by its plain data;
    what has no plain data (`UNUSABLE`) is never found.

    Attributes:
        checked: the policy, if nothing was wrong with it.
        text: digest of the text that said so: it need not be read as YAML again.
    """

    def __init__(self) -> None:
        self._networks: dict[bytes, Network] = {}
        self._data = b""
        self._policy: Policy | None = None
        self.checked: Policy | None = None
        self.text = b""

    def policy(self, data: dict[str, Any]) -> Policy:
        """As `Policy.model_validate`.

        Raises:
            ValidationError: as that.
        """
        items = data.get("networks")
        if not isinstance(items, list) or len(items) > NETWORKS_MAX:
            return Policy.model_validate(data)
        plain = _plain_key(data)
        whole = hashlib.sha256(plain).digest() if plain else b""
        if whole and whole == self._data and self._policy is not None:
            return self._policy
        keys = [_plain_key(item) for item in items]
        known = [
            self._networks.get(key, item) if key else item for key, item in zip(keys, items, strict=True)
        ]
        policy = Policy.model_validate({**data, "networks": known})
        self._networks = {key: found for key, found in zip(keys, policy.networks, strict=True) if key}
        self._data, self._policy = whole, policy
        return policy


_KNOWN = _Known()


def _plain_key(item: Any) -> bytes:
    """Equal only for equal items; empty for an item that is not all plain data."""
    try:
        # Of this version equal bytes are equal values of equal types; later ones refer back to equal objects.
        return marshal.dumps(item, 2)
    except ValueError:
        return b""


def _is_below(path: PolicyPath, parents: set[PolicyPath]) -> bool:
    return any(path[:depth] in parents for depth in range(1, len(path) + 1))


def _readable_part(data: dict[str, Any], problems: list[Problem]) -> Readable:
    """What can be checked further although other parts of the file are wrong.

    An unknown key counts as the one that was probably meant: `gatway` must not also give
    "there is no gateway".
    """
    wrong: dict[int, list[PolicyPath]] = {}
    beyond_repair = set()
    for problem in problems:
        path = problem.path
        if path[:1] != ("networks",) or len(path) < 2 or not isinstance(path[1], int):
            continue
        if problem.on_key and len(path) > 2:
            wrong.setdefault(path[1], []).append(path)
        else:
            beyond_repair.add(path[1])
    networks = []
    items = data.get("networks")
    for index, item in enumerate(items[:NETWORKS_MAX] if isinstance(items, list) else ()):
        if index in beyond_repair:
            continue
        network = _try(Network, _repaired(item, wrong[index]) if index in wrong else item)
        if network is not None:
            networks.append((index, network))
    return Readable(
        networks=tuple(networks),
        node=_try(Node, data.get("node", {})),
        marks=_try(Marks, data.get("marks", {})),
        egress=tuple(_each(Egress, data.get("egress"))),
        probes=tuple(_each(Probe, data.get("probes"))),
        top=data,
    )


def _try(model: type[_Model], data: Any) -> _Model | None:
    try:
        return model.model_validate(data)
    except ValidationError:
        return None


def _each(model: type[_Model], items: Any) -> list[tuple[int, _Model]]:
    if not isinstance(items, list):
        return []
    return [(i, value) for i, item in enumerate(items) if (value := _try(model, item)) is not None]


def _repaired(network: Any, unknown: list[PolicyPath]) -> Any:
    network = copy.deepcopy(network)
    for path in unknown:
        mapping = network
        for step in path[2:-1]:
            mapping = mapping[step]
        key = str(path[-1])
        value = mapping.pop(key)
        meant = nearest_key(key, path[:-1])
        if meant is not None:
            mapping.setdefault(meant, value)
    return network
