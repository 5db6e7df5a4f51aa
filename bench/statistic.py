"""Medians, percentiles, and ratios of medians with their uncertainty. Pure.

Medians, because a run that the machine disturbed should count as one run. The interval of a ratio comes from the
bootstrap (Efron, 1979): draw the rounds again, with replacement, and see where the middle 95 % of the ratios lie. Whole
rounds are drawn, since what is compared within a round met the same machine.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import msgspec

_DRAWS = 2000
_SEED = 1  # the same samples give the same interval


class Ratio(msgspec.Struct, frozen=True):
    """A ratio of medians and the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """median(ours) / median(theirs), where `ours[i]` and `theirs[i]` were measured in the same round."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} values, expected one of each from every round")
    draw = random.Random(_SEED)
    rounds = range(len(ours))
    drawn = []
    for _ in range(_DRAWS):
        chosen = draw.choices(rounds, k=len(ours))
        drawn.append(median([ours[i] for i in chosen]) / median([theirs[i] for i in chosen]))
    return Ratio(median(ours) / median(theirs), percentile(drawn, 2.5), percentile(drawn, 97.5))
