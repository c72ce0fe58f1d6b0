"""A difference of two ways to train, over seeds and items: paired, with intervals that hold with few seeds.

Two intervals are given, because each alone can mislead. Student's t over the seeds' means knows nothing of the items that
all seeds share. A bootstrap over seeds and items, its percentiles widened for the few seeds, cannot leave what was drawn:
of 2 or 3 seeds its ends are the lowest and the highest draw. From the lower low end to the higher high end both are held.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .student import student_cdf, student_quantile

LEVEL = 0.95
_NONE = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Paired:
    """A mean difference, arm minus baseline, with 95 % intervals.

    Attributes:
        estimate: mean over seeds of each one's mean over items (over cells of that, where it is pooled).
        bootstrap: (low, high), seeds and items drawn anew; nan with fewer than two seeds.
        student: (low, high) of Student's t over the seeds' means; nan with fewer than two seeds.
        p: two-sided, nan likewise: the larger of that t's and of the t with the bootstrap's spread. Seeds that happen to
            agree, two with the same number right, say, would else make any difference certain.
        seeds, items: how many pairs of trainings, and how many items a training was measured on (the mean).
    """

    estimate: float
    bootstrap: tuple[float, float]
    student: tuple[float, float]
    p: float
    seeds: int
    items: float

    @property
    def low(self) -> float:
        """The lower of both low ends."""
        return min(self.bootstrap[0], self.student[0])

    @property
    def high(self) -> float:
        return max(self.bootstrap[1], self.student[1])

    def verdict(self, level: float | None = None) -> str:
        """ "above" or "below" zero where both intervals agree, "null" where one holds zero, "unknown" without intervals.

        Args:
            level: p after a correction over several comparisons; above 0.05 it is a null whatever the intervals are.
        """
        if math.isnan(self.low) or math.isnan(self.high):
            return "unknown"
        if self.low <= 0 <= self.high or (level is not None and not level <= 1 - LEVEL):
            return "null"
        return "above" if self.low > 0 else "below"


def paired(differences: Sequence[np.ndarray], crossed: bool = True, draws: int = 4000, seed: int = 0) -> Paired:
    """Of one cell: two arms and nothing else that differs.

    Args:
        differences: one array [items] a seed, arm minus baseline; items that count for nothing are nan.
        crossed: the items are the same ones in every seed, so they are drawn once for all of them.

    Raises:
        ValueError: as of :func:`pooled`.
    """
    return pooled([differences], crossed, draws, seed)


def pooled(cells: Sequence[Sequence[np.ndarray]], crossed: bool = True, draws: int = 4000, seed: int = 0) -> Paired:
    """The mean over cells, each counting the same. Seeds are drawn within a cell; the cells themselves are not drawn, so
    nothing is said of other cells.

    Args:
        cells: of each cell what :func:`paired` takes.

    Raises:
        ValueError: no cell, or one without a seed; items that are crossed and differ in number.
    """
    if not cells or not all(len(cell) for cell in cells):
        raise ValueError("no differences: a cell needs a training of either arm with the same seed")
    means = [np.array([np.nanmean(one) for one in cell]) for cell in cells]
    estimate = float(np.mean([one.mean() for one in means]))
    seeds, items = sum(map(len, cells)), float(np.mean([len(one) for cell in cells for one in cell]))
    if min(map(len, cells)) < 2:
        return Paired(estimate, _NONE, _NONE, float("nan"), seeds, items)
    student, p, freedom = _student(means, estimate)
    drawn = np.mean(
        [
            _draws([np.asarray(one, float) for one in cell], crossed, draws, (seed, place))
            for place, cell in enumerate(cells)
        ],
        axis=0,
    )
    # Percentiles are too narrow for few seeds: the mean of n drawn anew spreads by sqrt((n - 1) / n) of what it should, and
    # nothing stands for t. Hesterberg, What Teachers Should Know About the Bootstrap (2015), "expanded percentile".
    count = min(map(len, cells))
    widening = math.sqrt(count / (count - 1))
    tail = NormalDist().cdf(-widening * student_quantile(0.5 + LEVEL / 2, freedom))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    p = max(p, _p(estimate, widening * float(drawn.std()), freedom))
    return Paired(estimate, (float(low), float(high)), student, p, seeds, items)


def _p(estimate: float, error: float, freedom: int) -> float:
    """Two-sided p of Student's t, of its standard error ``error``; without any 0, or 1 where nothing differs either."""
    return 2 * student_cdf(-abs(estimate) / error, freedom) if error else float(estimate == 0)


def _student(means: Sequence[np.ndarray], estimate: float) -> tuple[tuple[float, float], float, int]:
    """(interval, p, degrees of freedom) of the mean of the cells' means; Welch and Satterthwaite's, rounded down."""
    parts = np.array([one.var(ddof=1) / len(one) for one in means])
    total = parts.sum()
    if total == 0:
        freedom = len(means[0]) - 1
        return (estimate, estimate), _p(estimate, 0.0, freedom), freedom
    freedom = int(total**2 / sum(part**2 / (len(one) - 1) for part, one in zip(parts, means, strict=True)) + 1e-9)
    error = math.sqrt(total) / len(means)
    half = student_quantile(0.5 + LEVEL / 2, freedom) * error
    return (estimate - half, estimate + half), _p(estimate, error, freedom), freedom


def _draws(cell: Sequence[np.ndarray], crossed: bool, draws: int, seed: tuple[int, int]) -> np.ndarray:
    """[draws] means of seeds and items drawn anew."""
    count, rng = len(cell), np.random.default_rng((*seed, 1))
    chosen = rng.integers(0, count, (draws, count))
    if crossed:
        lengths = {len(one) for one in cell}
        if len(lengths) > 1:
            raise ValueError(f"seeds with {sorted(lengths)} items: those are not the same items. Set crossed=False")
        items, values_SI = lengths.pop(), np.asarray(cell)
        times_DI = _times(items, draws, seed)
        kept_SI = ~np.isnan(values_SI)
        sums_DS = times_DI @ np.where(kept_SI, values_SI, 0).T
        of_seed_DS = sums_DS / np.maximum(times_DI @ kept_SI.T, 1)
        return np.take_along_axis(of_seed_DS, chosen, 1).mean(1)
    # Each drawn seed draws items of its own
    found = np.empty((draws, count))
    for number, one in enumerate(cell):
        places = np.argwhere(chosen == number)
        times = rng.multinomial(len(one), [1 / len(one)] * len(one), len(places))
        kept = ~np.isnan(one)
        weight = times[:, kept].sum(1)
        found[places[:, 0], places[:, 1]] = times[:, kept] @ one[kept] / np.maximum(weight, 1)
    return found.mean(1)


@functools.lru_cache(maxsize=32)  # for all comparisons of a page, which may as well see the same draws
def _times(items: int, draws: int, seed: tuple[int, int]) -> np.ndarray:
    """[draws, items]: how often each item is drawn."""
    return np.random.default_rng((*seed, 2)).multinomial(items, [1 / items] * items, draws).astype(float)
