"""AUROC and its interval over groups of observations; no more than numpy."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Observations:
    """Values, each with its word and its group.

    Attributes:
        values: [N] float.
        words: [N] integers; only values of the same word are compared.
        groups: [N] integers, 0 or more: which record or drawing each is of.
    """

    values: np.ndarray
    words: np.ndarray
    groups: np.ndarray

    def __post_init__(self) -> None:
        shapes = {np.shape(one) for one in (self.values, self.words, self.groups)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"values, words and groups have the shapes {sorted(shapes)}: all must be [N]")

    def of_word(self, word: int) -> Observations:
        here = self.words == word
        return Observations(self.values[here], self.words[here], self.groups[here])


def matched_auroc(
    high: Observations, low: Observations, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(AUROC inside words, low end, high end of its 95 % interval).

    The share of pairs of the same word in which the one of ``high`` is above the one of ``low``, ties counting half. A
    word counts by its number of pairs, so one that is in ``high`` or in ``low`` alone does not count at all. What is left
    is what a score knows beyond which word it is.

    The interval is a percentile bootstrap that draws whole groups: a pair counts as often as its group was drawn times as
    often as its other group was, or as its one group was, if it has one.

    Returns:
        Three nan where no word is in both.
    """
    count = 1 + max((int(one.groups.max()) for one in (high, low) if len(one.groups)), default=0)
    won, pairs = np.zeros((count, count)), np.zeros((count, count))
    for word in np.intersect1d(high.words, low.words):
        one, other = high.of_word(word), low.of_word(word)
        above = one.values[:, None] > other.values[None, :]
        equal = one.values[:, None] == other.values[None, :]
        place = (one.groups[:, None], other.groups[None, :])
        np.add.at(won, place, above + 0.5 * equal)
        np.add.at(pairs, place, 1)
    if not pairs.any():
        return float("nan"), float("nan"), float("nan")
    inside = np.diag(np.diag(won)), np.diag(np.diag(pairs))
    groups = np.unique(np.concatenate([high.groups, low.groups]))
    draw, found = np.random.default_rng(seed), []
    for _ in range(draws):
        times = np.bincount(groups[draw.integers(0, len(groups), len(groups))], minlength=count).astype(float)
        wins, all_pairs = (
            times @ (matrix - alone) @ times + times @ np.diag(alone)
            for matrix, alone in zip((won, pairs), inside, strict=True)
        )
        if all_pairs:
            found.append(wins / all_pairs)
    begin, end = np.percentile(found, [2.5, 97.5]) if found else (float("nan"), float("nan"))
    return float(won.sum() / pairs.sum()), float(begin), float(end)


def grouped_share(hits: np.ndarray, group: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """(share of hits, low end, high end of its 95 % interval), groups drawn whole."""
    groups = np.unique(group)
    sums = np.array([[hits[group == one].sum(), (group == one).sum()] for one in groups], dtype=float)
    draw = np.random.default_rng(seed)
    found = [sums[draw.integers(0, len(groups), len(groups))].sum(0) for _ in range(draws)]
    shares = np.array([hit / count for hit, count in found])
    begin, end = np.percentile(shares, [2.5, 97.5])
    return float(hits.mean()), float(begin), float(end)
