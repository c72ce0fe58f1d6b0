"""The difference of two ways to train on the same held-out items, with an interval and what it allows to say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..evaluation import over_seeds


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
    """First minus second, with the wider interval of :mod:`seecal.evaluation.over_seeds`.

    With one seed it is over items, and about these two models. With several it is over seeds and items, and about
    trainings like these.

    Args:
        first, second: [seeds, items] of the two arms, the same seeds and items in both.

    Raises:
        ValueError: other shapes.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"arms of the shapes {first.shape} and {second.shape}: both must be [seeds, items], not empty")
    values_SN = first - second
    # With one seed every item stands for a seed of its own, with that one item
    found = over_seeds.paired(list(values_SN if len(values_SN) > 1 else values_SN.T), draws=draws, seed=seed)
    counts = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    p = _sign_test(values_SN.sum(0)) if counts else float("nan")
    return Difference(float(first.mean()), float(second.mean()), found.estimate, found.low, found.high, p)


def _sign_test(values: np.ndarray) -> float:
    """Two-sided p of as uneven a split into items above and below zero, if either were as likely."""
    above, below = int((values > 0).sum()), int((values < 0).sum())
    both, fewer = above + below, min(above, below)
    return min(1.0, 2 * sum(math.comb(both, k) for k in range(fewer + 1)) / 2**both)
