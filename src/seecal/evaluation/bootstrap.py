"""How far a figure would move with other records of the same kind: the bootstrap, for one model and for two on the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Difference:
    """One model against another, on the records of both.

    Attributes:
        value: the one's figure less the other's.
        low, high: of its 95 % interval.
        p: how often, under the resampling, the sign turns round or the difference vanishes, both ways: the two-sided
            p-value; at least 2 / (resamples + 1).
    """

    value: float
    low: float
    high: float
    p: float


def interval(
    scores: Sequence[float], groups: Sequence[str] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of N scores over records drawn again with replacement.

    Args:
        groups: of each record; the figure is then the mean of the groups' means. A group that is not drawn is left out.
        seed: the same one draws the same.
        resamples: how often.

    Raises:
        ValueError: no scores, or fewer than one resample.
    """
    drawn = _drawn(np.asarray(scores, dtype=float), groups, seed, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def paired(
    scores: Sequence[float],
    others: Sequence[float],
    groups: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """The difference of two models' figures on the same N records, drawn again together.

    Raises:
        ValueError: two numbers of records, none, or fewer than one resample.
    """
    if len(scores) != len(others):
        raise ValueError(f"{len(scores)} scores against {len(others)}: they are not of the same records")
    of_records = np.asarray(scores, dtype=float) - np.asarray(others, dtype=float)
    drawn = _drawn(of_records, groups, seed, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    other_side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (other_side + 1) / (resamples + 1))
    return Difference(float(_means(of_records, _one_hot(groups, len(of_records)))[0]), float(low), float(high), p)


def _drawn(scores: Any, groups: Sequence[str] | None, seed: int, resamples: int) -> Any:
    """[resamples] figures of records drawn again."""
    if not len(scores):
        raise ValueError("no record has a score: there is nothing to draw from")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected 1 or more")
    one_hot = _one_hot(groups, len(scores))
    draws = _draws(len(scores), seed, resamples)
    return np.concatenate([_means(scores[rows], one_hot[rows]) for rows in draws])


def _draws(count: int, seed: int, resamples: int) -> Iterator[Any]:
    random, at_once = np.random.default_rng(seed), max(1, _AT_ONCE // count)
    for done in range(0, resamples, at_once):
        yield random.integers(count, size=(min(at_once, resamples - done), count))


def _one_hot(groups: Sequence[str] | None, count: int) -> Any:
    """[N, G]: to which group a record belongs."""
    if groups is None:
        return np.ones((count, 1))
    names = sorted(set(groups))
    return (np.asarray(groups)[:, None] == np.asarray(names)[None, :]).astype(float)


def _means(scores: Any, one_hot: Any) -> Any:
    """The mean of the groups' means of scores [..., N], groups [..., N, G]."""
    scores, one_hot = np.atleast_2d(scores), one_hot if one_hot.ndim == 3 else one_hot[None]
    if one_hot.shape[-1] == 1:
        return scores.mean(-1)
    counts = one_hot.sum(-2)
    sums = (scores[..., None] * one_hot).sum(-2)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return means.sum(-1) / (counts > 0).sum(-1)
