"""Means over seeds with intervals, and paired tests. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
ALPHA = 0.05
FEWEST = 3  # seeds, below which nothing is called significant


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None  # of its 95 % interval (Student's t); none of one seed
    count: int


@dataclass(frozen=True)
class Paired(Estimate):
    """A mean difference between two systems on the same seeds."""

    p: float | None  # two-sided, of no difference (paired t-test); none of one seed

    @property
    def significant(self) -> bool:
        """Whether there is a difference beyond doubt: p below .05 over three seeds or more."""
        return self.p is not None and self.p < ALPHA and self.count >= FEWEST


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of values of independent seeds.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("there is no value to take the mean of")
    return Estimate(fmean(values), _half(values), len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """Ours minus theirs over the seeds that both have; none without any.

    Differences that are all 0 have p = 1. Of others that are all equal, as of accuracies over a few questions, nothing
    can be said: their spread is no estimate of how far the next one may lie.
    """
    from scipy.stats import t

    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    differences = [ours[seed] - theirs[seed] for seed in both]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Paired(mean, None, count, None)
    error = stdev(differences) / math.sqrt(count)
    if error == 0:
        return Paired(mean, None if mean else 0.0, count, None if mean else 1.0)
    return Paired(mean, _half(differences), count, float(2 * t.sf(abs(mean) / error, count - 1)))


def _half(values: Sequence[float]) -> float | None:
    from scipy.stats import t

    if len(values) < 2:
        return None
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))
