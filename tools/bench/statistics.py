# SPDX-License-Identifier: Apache-2.0
"""Minimum, median, maximum, and two kinds of ratios to a base that was measured in the same repetitions."""

from __future__ import annotations

import statistics as stdlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the samples of one cell."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Of at least one sample.

        Raises:
            ValueError: there is none.
        """
        if not samples:
            raise ValueError("no samples")
        return cls(min(samples), stdlib.median(samples), max(samples))

    def __str__(self) -> str:
        return f"{self.minimum:.0f}/{self.median:.0f}/{self.maximum:.0f}"


def ratio_of_minima(samples: Sequence[float], base: Sequence[float]) -> float:
    """The least disturbed run against the least disturbed run of the base."""
    return min(samples) / min(base)


def median_of_ratios(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median of what each repetition says for itself: drift of the machine cancels out.

    Raises:
        ValueError: they are not of the same repetitions.
    """
    if len(samples) != len(base):
        raise ValueError(f"{len(samples)} samples, {len(base)} of the base")
    return stdlib.median(sample / other for sample, other in zip(samples, base, strict=True))
