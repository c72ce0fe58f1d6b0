"""AUROC against counting pairs, its interval, and rows that are not made twice."""

import itertools

import numpy as np
import pytest
from experiments.rows import Rows, rounded
from experiments.statistics import auroc, grouped_auroc, grouped_share


def test_auroc_counts_pairs():
    draw = np.random.default_rng(0)
    high, low = draw.integers(0, 6, 40) + 1.0, draw.integers(0, 6, 30) + 0.0
    pairs = [(one > other) + 0.5 * (one == other) for one, other in itertools.product(high, low)]
    assert auroc(high, low) == pytest.approx(np.mean(pairs))
    assert auroc(low, high) == pytest.approx(1 - np.mean(pairs))
    assert np.isnan(auroc(high, high[:0]))


def test_the_interval_is_over_groups():
    """Ten copies of every observation say no more than one."""
    draw = np.random.default_rng(1)
    high, low = draw.normal(1, 1, 60), draw.normal(0, 1, 60)
    group = np.arange(60)
    _, begin, end = grouped_auroc(high, group, low, group)
    copies = [np.repeat(one, 10) for one in (high, group, low, group)]
    _, again, ended = grouped_auroc(*copies)
    assert (again, ended) == pytest.approx((begin, end), abs=1e-9)
    assert begin < auroc(high, low) < end
    share = grouped_share((high > 1).astype(float), group)
    assert share[1] < share[0] < share[2]


def test_rows_are_kept(tmp_path):
    rows = Rows("a", tmp_path)
    assert not rows.has(model="m")
    rows.add({"model": "m", **rounded((0.123456, float("nan"), 1.0))})
    assert Rows("a", tmp_path).all == [{"model": "m", "estimate": 0.1235, "low": None, "high": 1.0}]
    assert Rows("a", tmp_path).has(model="m")
