"""The bootstrap: seeded, right where the answer is known, the same for two models and for their difference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seecal.evaluation.bootstrap import interval, paired


def test_the_interval_of_many_records_is_that_of_the_normal_distribution():
    scores = np.random.default_rng(0).random(2000)
    low, high = interval(scores, seed=1)
    error = 1.96 * scores.std() / 2000**0.5
    assert low == pytest.approx(scores.mean() - error, abs=error / 10)
    assert high == pytest.approx(scores.mean() + error, abs=error / 10)
    assert interval(scores, seed=1) == (low, high)
    assert interval(scores, seed=2) != (low, high)


def test_pairs_are_drawn_together():
    """Two models that differ by the same on every record differ for sure, however the records differ."""
    scores = np.random.default_rng(0).random(50)
    found = paired(scores + 0.1, scores)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p == pytest.approx(2 / 10_001)
    apart = interval(scores)
    assert apart[1] - apart[0] > 0.1


def test_no_difference_has_p_1_and_a_small_one_little():
    assert paired([1, 0, 1], [1, 0, 1]).p == 1
    random = np.random.default_rng(3)
    first, second = random.random(400), random.random(400)
    found = paired(first, second)
    z = (first - second).mean() / ((first - second).std() / 20)
    from statistics import NormalDist

    assert found.p == pytest.approx(2 * (1 - NormalDist().cdf(abs(z))), abs=0.03)


def test_groups_count_alike_whatever_their_size():
    scores, groups = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    found = paired(scores, [0.0] * 10, groups)
    assert found.value == pytest.approx(0.5)
    assert interval(scores, groups) == (0.5, 1.0)  # without b, where it is not drawn, there is a alone
    uneven = [0.0, 1.0, 0.2, 0.9]
    low, high = interval(uneven, ["a"] * 4)
    assert (low, high) == interval(uneven)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from("abc")), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_any_scores(rows):
    ours, theirs, groups = zip(*rows, strict=True)
    low, high = interval(ours, groups, resamples=100)
    assert min(ours) - 1e-9 <= low <= high <= max(ours) + 1e-9
    there, back = paired(ours, theirs, groups, resamples=100), paired(theirs, ours, groups, resamples=100)
    assert there.value == pytest.approx(-back.value)
    assert there.p == pytest.approx(back.p)
    assert 0 < there.p <= 1
    assert there.low == pytest.approx(-back.high)


def test_what_cannot_be_drawn_from():
    for call in (lambda: interval([]), lambda: paired([1], [1, 2]), lambda: interval([1], resamples=0)):
        with pytest.raises(ValueError):
            call()
