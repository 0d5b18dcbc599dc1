# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors in the words of someone who writes a policy."""

from __future__ import annotations

import difflib
import inspect
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import RefusedError, kind, shown
from datapath.policy.model import Policy

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ErrorDetails = dict[str, Any]


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """One problem per error; an error that only follows from another one is left out."""
    details: list[ErrorDetails] = [dict(e) for e in error.errors(include_url=False)]
    broken = {_path(d)[:depth] for d in details for depth in range(len(_path(d)))}
    meant = {
        (*path[:-1], nearest_key(str(path[-1]), path[:-1]))
        for path in (_path(d) for d in details if d["type"] == "extra_forbidden")
    }
    for detail in details:
        if detail["type"] == "too_short" and _path(detail) in broken:
            continue
        if detail["type"] == "missing" and _path(detail) in meant:
            continue
        yield _problem(detail)


def nearest_key(key: str, path: PolicyPath) -> str | None:
    """The known key that the user may have meant.

    Args:
        key: an unknown key.
        path: the mapping it is in.
    """
    known = known_keys(path)
    spelled = key.lower().replace("-", "_")
    if spelled in known:
        return spelled
    return next(iter(difflib.get_close_matches(spelled[:60], known, n=1, cutoff=0.6)), None)


def known_keys(path: PolicyPath) -> tuple[str, ...]:
    """The keys that a mapping of the policy may have, in the order of the reference."""
    model: type[BaseModel] = Policy
    for step in path:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(step)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return ()
        model = inner
    return tuple(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if inspect.isclass(annotation) and typing.get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for part in typing.get_args(annotation) if (m := _model_in(part))), None)


def _path(detail: ErrorDetails) -> PolicyPath:
    return tuple(detail["loc"])


def _problem(detail: ErrorDetails) -> Problem:
    path = _path(detail)
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, RefusedError):
        return Problem(path, str(cause), cause.hint)
    translate = _TRANSLATIONS.get(detail["type"])
    return translate(path, detail) if translate else Problem(path, detail["msg"])


def _missing(path: PolicyPath, _: ErrorDetails) -> Problem:
    return Problem(path[:-1], f"`{path[-1]}` is missing", _MISSING_HINTS.get(str(path[-1]), ""))


def _unknown(path: PolicyPath, _: ErrorDetails) -> Problem:
    key = str(path[-1])
    nearest = nearest_key(key, path[:-1])
    hint = f"did you mean `{nearest}`?" if nearest else f"known here: {', '.join(known_keys(path[:-1]))}"
    return Problem(path, "unknown key", hint, on_key=True)


def _choice(path: PolicyPath, detail: ErrorDetails) -> Problem:
    value = detail["input"]
    expected = str(detail["ctx"]["expected"])
    choices = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(value[:60], choices, n=1) if isinstance(value, str) else []
    hint = f"did you mean `{near[0]}`?" if near else f"use one of: {', '.join(choices)}"
    if isinstance(value, bool):
        return Problem(path, f"must be a word, not {kind(value)}", hint)
    return Problem(path, f"{shown(value)} is not a known value", hint)


def _expected(what: str, hint: str = "") -> Callable[[PolicyPath, ErrorDetails], Problem]:
    def translate(path: PolicyPath, detail: ErrorDetails) -> Problem:
        value = detail["input"]
        if isinstance(value, float) and what == "a whole number":
            return Problem(path, f"must be {what}, not {value}", hint)
        return Problem(path, f"must be {what}, not {kind(value)}", hint)

    return translate


def _bound(path: PolicyPath, detail: ErrorDetails) -> Problem:
    limits = detail["ctx"]
    if "ge" in limits:
        return Problem(path, f"{shown(detail['input'])} is too small", f"the smallest is {limits['ge']}")
    return Problem(path, f"{shown(detail['input'])} is too large", f"the largest is {limits['le']}")


def _too_short(path: PolicyPath, _: ErrorDetails) -> Problem:
    return Problem(path, "the list is empty", _MISSING_HINTS.get(str(path[-1]), "write at least one element"))


def _too_long(path: PolicyPath, detail: ErrorDetails) -> Problem:
    limits = detail["ctx"]
    hint = _TOO_LONG_HINTS.get(str(path[-1]), "one node cannot serve more")
    return Problem(path, f"more than {limits['max_length']} elements", hint)


_MISSING_HINTS = {
    "version": "begin the file with `version: 1`",
    "networks": "a policy has at least one network: `networks: [{name: ..., vlan: ..., vips: [...]}]`",
    "vips": "list the addresses that are served on this network",
    "name": "give the network a name",
    "parent": "name the trunk device, for example `parent: eth0`",
    "id": "give the VLAN id, 1 to 4094",
}

_TOO_LONG_HINTS = {
    "probes": "a few that stand for the others are enough: every change waits for all of them",
    "egress": "entries of one network and source address can be one, with more `sources` or a `set`",
}

_TRANSLATIONS: dict[str, Callable[[PolicyPath, ErrorDetails], Problem]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "enum": _choice,
    "literal_error": _choice,
    "int_type": _expected("a whole number", "write it like 100 or 0x64"),
    "bool_type": _expected("true or false", "write true or false, without quotes"),
    "string_type": _expected("text", "put it in quotes"),
    "tuple_type": _expected("a list", "write [a, b], or one `- a` per line"),
    "model_type": _expected("a mapping", "write `key: value` lines"),
    "model_attributes_type": _expected("a mapping", "write `key: value` lines"),
    "dict_type": _expected("a mapping", "write `key: value` lines"),
    "greater_than_equal": _bound,
    "less_than_equal": _bound,
    "too_short": _too_short,
    "too_long": _too_long,
}
