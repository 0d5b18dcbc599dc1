# SPDX-License-Identifier: Apache-2.0
"""The last question to which the answer was that all is well: a node is asked it again and again."""

from __future__ import annotations

import weakref
from typing import Any, Final, Generic, TypeVar

from datapath.plan.model import Plan
from datapath.reconcile.actual import Actual, Record

_Answer = TypeVar("_Answer")


_questions: Final[list[Unchanged[Any]]] = []


def forget_unchanged() -> None:
    """Free what is kept between two questions."""
    for question in _questions:
        question.forget()


class Unchanged(Generic[_Answer]):
    """One question about an actual state, a plan and a record. It keeps no plan alive."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Plan], Actual, Record, _Answer] | None = None
        _questions.append(self)

    def of(self, actual: Actual, desired: Plan, record: Record) -> _Answer | None:
        """The answer, where everything is as it was: the plan the very same, all else equal."""
        if self._known is None:
            return None
        plan, before, remembered, answer = self._known
        if plan() is not desired or not _is_same(actual, before) or record != remembered:
            return None
        return answer

    def keep(self, actual: Actual, desired: Plan, record: Record, answer: _Answer) -> None:
        self._known = (weakref.ref(desired), actual, record, answer)

    def forget(self) -> None:
        """Something is to be done: what was is not asked for again."""
        self._known = None


def _is_same(one: Actual, other: Actual) -> bool:
    # What is as desired is the plan's own set; to compare two sets of thousands would take longer than the answer.
    return one.routes is other.routes and one.rules is other.rules and one == other
