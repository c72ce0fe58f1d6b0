"""The difference of two ways to train on the same held-out items, with an interval and what it allows to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..evaluation.student import student_quantile

_Z = 1.959964  # the normal's 97.5 % quantile


@dataclass(frozen=True)
class Difference:
    """Mean of one arm, of the other, of their difference (first minus second), and the ends of its 95 % interval.

    ``sign_p``: two-sided p of the sign test over items, nan where the values are no counts of right answers.
    """

    first: float
    second: float
    mean: float
    low: float
    high: float
    sign_p: float = float("nan")

    @property
    def verdict(self) -> int:
        """1 or -1: the first arm is higher or lower; 0: the interval does not show that, or there is none.

        Of right answers the sign test has to agree: where few items differ, a bootstrap's interval is too short.
        """
        if math.isnan(self.low) or math.isnan(self.high) or self.low <= 0 <= self.high or self.sign_p > 0.05:
            return 0
        return 1 if self.low > 0 else -1


def paired(first: np.ndarray, second: np.ndarray, draws: int = 4000, seed: int = 0) -> Difference:
    """First minus second, by a bootstrap.

    With one seed the items are drawn, and the interval is about these two models. With several the seeds are drawn too,
    and it is about trainings like these. Percentiles are too narrow for few of what is drawn, so their distance from the
    mean is stretched by ``sqrt(n / (n - 1))`` and by Student's t over the normal's quantile. Source: the "expanded
    percentile interval" of Hesterberg, What Teachers Should Know About the Bootstrap (2015), by a factor, not a level.

    Args:
        first, second: [seeds, items] of the two arms, the same seeds and items in both.

    Raises:
        ValueError: other shapes.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"arms of the shapes {first.shape} and {second.shape}: both must be [seeds, items], not empty")
    values_SN = first - second
    seeds, items = values_SN.shape
    estimate, n = float(values_SN.mean()), seeds if seeds > 1 else items
    low = high = float("nan")
    if n > 1:
        rng = np.random.default_rng(seed)
        times_DN = rng.multinomial(items, [1 / items] * items, draws) / items
        chosen_DS = rng.integers(0, seeds, (draws, seeds))
        means_D = np.take_along_axis(times_DN @ values_SN.T, chosen_DS, 1).mean(1)
        wider = math.sqrt(n / (n - 1)) * student_quantile(0.975, n - 1) / _Z
        low, high = (estimate + wider * (end - estimate) for end in np.quantile(means_D, [0.025, 0.975]).tolist())
    counts = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    p = _sign_test(values_SN.sum(0)) if counts else float("nan")
    return Difference(float(first.mean()), float(second.mean()), estimate, low, high, p)


def _sign_test(values: np.ndarray) -> float:
    """Two-sided p of as uneven a split into items above and below zero, if either were as likely."""
    above, below = int((values > 0).sum()), int((values < 0).sum())
    both, fewer = above + below, min(above, below)
    return min(1.0, 2 * sum(math.comb(both, k) for k in range(fewer + 1)) / 2**both)
