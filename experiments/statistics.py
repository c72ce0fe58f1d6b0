"""AUROC and its interval over groups of observations; no more than numpy."""

from __future__ import annotations

import numpy as np


def auroc(high: np.ndarray, low: np.ndarray) -> float:
    """The share of pairs in which one of ``high`` is above one of ``low``, ties counting half; nan if either is empty."""
    if not len(high) or not len(low):
        return float("nan")
    both = np.concatenate([high, low])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = ((2 * ends - counts + 1) / 2)[inverse]  # equal values share their mean rank
    return float((ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def grouped_auroc(
    high: np.ndarray, high_group: np.ndarray, low: np.ndarray, low_group: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(AUROC, low end, high end of its 95 % interval): a percentile bootstrap that draws whole groups.

    Args:
        high, low: the observations.
        high_group, low_group: which group (record) each is of, as integers.
    """
    estimate = auroc(high, low)
    groups = np.unique(np.concatenate([high_group, low_group]))
    highs = [high[high_group == group] for group in groups]
    lows = [low[low_group == group] for group in groups]
    draw, found = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = draw.integers(0, len(groups), len(groups))
        found.append(
            auroc(np.concatenate([highs[one] for one in chosen]), np.concatenate([lows[one] for one in chosen]))
        )
    kept = np.array(found)[~np.isnan(found)]
    if np.isnan(estimate) or not len(kept):
        return float("nan"), float("nan"), float("nan")
    begin, end = np.percentile(kept, [2.5, 97.5])
    return estimate, float(begin), float(end)


def grouped_share(hits: np.ndarray, group: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """(share of hits, low end, high end of its 95 % interval), groups drawn whole."""
    groups = np.unique(group)
    sums = np.array([[hits[group == one].sum(), (group == one).sum()] for one in groups], dtype=float)
    draw = np.random.default_rng(seed)
    found = [sums[draw.integers(0, len(groups), len(groups))].sum(0) for _ in range(draws)]
    shares = np.array([hit / count for hit, count in found])
    begin, end = np.percentile(shares, [2.5, 97.5])
    return float(hits.mean()), float(begin), float(end)
