"""Paired intervals: against scipy's and a closed form, what they cover, and when a difference is called one."""

import math

import numpy as np
import pytest

from seecal.demo.paired import Difference, _sign_test, paired
from seecal.evaluation.student import student_quantile


@pytest.mark.parametrize(("above", "below"), [(6, 0), (5, 0), (10, 3), (0, 0), (4, 4)])
def test_the_sign_test_is_the_binomial_one(above, below):
    values = np.array([1.0] * above + [-1.0] * below + [0.0] * 7)
    both = above + below
    tail = sum(math.comb(both, k) * 0.5**both for k in range(max(above, below), both + 1))
    assert _sign_test(values) == pytest.approx(min(1.0, 2 * tail))
    stats = pytest.importorskip("scipy.stats", reason="scipy is not among what seecal needs")
    if both:
        assert _sign_test(values) == pytest.approx(stats.binomtest(above, both).pvalue)


@pytest.mark.parametrize("items", [10, 40, 150])
def test_of_one_seed_the_interval_is_students_over_items(items):
    values = np.random.default_rng(3).normal(0.2, 1, items)
    found = paired(values[None], np.zeros((1, items)), draws=20000)
    half = student_quantile(0.975, items - 1) * values.std(ddof=1) / math.sqrt(items)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.12 * half)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
def test_it_holds_the_truth_as_often_as_it_says(seeds):
    """Of one seed the truth is that of its two models."""
    rng, held, tried = np.random.default_rng(0), 0, 300
    for _ in range(tried):
        seed = rng.normal(0, 0.3 if seeds > 1 else 0, (seeds, 1))
        values = seed + rng.normal(0, 0.5, (1, 60)) + rng.normal(0, 0.5, (seeds, 60))
        found = paired(values, np.zeros_like(values), draws=400)
        held += found.low <= 0 <= found.high
    assert held / tried > 0.92


def test_of_two_seeds_it_is_no_wider_than_it_has_to_be():
    """Where items differ and trainings do not, two seeds say nearly as much as one."""
    item = np.random.default_rng(2).normal(0, 1, (1, 60))
    values = item + np.array([[0.01], [-0.01]])
    one, two = (paired(each, np.zeros_like(each)) for each in (item, values))
    assert two.high - two.low < 3 * (one.high - one.low)


def test_it_is_paired():
    """What is common to both arms is not in the interval."""
    rng = np.random.default_rng(1)
    hard, small = rng.normal(0, 10, (1, 80)), rng.normal(0.1, 0.05, (1, 80))
    found = paired(hard + small, hard)
    assert 0.08 < found.low < found.high < 0.12
    assert found.verdict == 1
    assert paired(hard, hard + small).verdict == -1
    assert paired(hard + rng.normal(0, 1, (1, 80)), hard).verdict == 0


def test_few_right_answers_more_are_no_difference():
    """4 of 150 all one way: the bootstrap alone would nearly leave zero out, a coin gives that once in eight."""
    first, second = np.zeros((1, 150)), np.zeros((1, 150))
    first[0, :5] = 1
    found = paired(first, second)
    assert found.sign_p == pytest.approx(0.0625)
    assert found.low > 0
    assert found.verdict == 0
    first[0, :12] = 1
    assert paired(first, second).verdict == 1


@pytest.mark.parametrize(
    ("low", "high", "sign_p", "expected"),
    [
        (0.1, 0.2, math.nan, 1),
        (-0.2, -0.1, 0.01, -1),
        (0.1, 0.2, 0.06, 0),
        (0.0, 0.2, math.nan, 0),
        (math.nan, math.nan, math.nan, 0),
        (-0.1, 0.2, 0.001, 0),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(low, high, sign_p, expected):
    assert Difference(0.5, 0.4, 0.1, low, high, sign_p).verdict == expected


def test_one_item_has_no_interval_and_equal_arms_no_difference():
    one = paired(np.ones((1, 1)), np.zeros((1, 1)))
    assert math.isnan(one.low)
    assert one.verdict == 0
    same = paired(np.ones((2, 30)), np.ones((2, 30)))
    assert (same.low, same.high, same.verdict) == (0, 0, 0)


@pytest.mark.parametrize("shapes", [((1, 3), (1, 4)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"both must be \[seeds, items\]"):
        paired(*map(np.zeros, shapes))
