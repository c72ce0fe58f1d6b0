"""Intervals and p over seeds and items: against a printed table, plain formulas, and how often they hold the truth."""

import math

import numpy as np
import pytest

from seecal.evaluation.over_seeds import Paired, paired, pooled


def test_the_interval_is_that_of_a_published_example():
    """The ten differences of hours of sleep in Student, The Probable Error of a Mean (1908): t = 4.062, p = 0.0028, and the
    interval 0.70 to 2.46 that R's manual prints for them (t.test(extra ~ group, paired = TRUE), data set sleep)."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = paired([np.full(3, one) for one in hours])
    assert found.estimate == pytest.approx(1.58)
    assert found.student == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert 0.002832 <= found.p == pytest.approx(0.002833, rel=0.25), (
        "the bootstrap's spread is nearly that of the seeds"
    )
    assert (found.seeds, found.items) == (10, 3)


def made_up(rng, seeds, items, effect=0.0, of_seed=0.5, of_item=1.0, noise=1.0, cells=1):
    """Differences with effects of seeds and of items, which are the same items in every seed."""
    item = rng.normal(0, of_item, items)
    drawn = [effect + rng.normal(0, of_seed) + item + rng.normal(0, noise, items) for _ in range(seeds * cells)]
    return [drawn[place * seeds : (place + 1) * seeds] for place in range(cells)]


@pytest.mark.parametrize(("seeds", "of_item"), [(5, 0.0), (5, 1.0), (8, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, of_item):
    """95 % is asked for. Student's holds it where items do not differ; the bootstrap over both also where they do."""
    rng, count = np.random.default_rng(0), 400
    inside = {"bootstrap": 0, "student": 0, "both": 0}
    for number in range(count):
        (cell,) = made_up(rng, seeds, 30, effect=0.7, of_item=of_item)
        found = paired(cell, draws=1000, seed=number)
        held = {name: getattr(found, name)[0] <= 0.7 <= getattr(found, name)[1] for name in ("bootstrap", "student")}
        held["both"] = found.low <= 0.7 <= found.high
        inside = {name: inside[name] + value for name, value in held.items()}
    assert inside["bootstrap"] / count >= 0.93
    assert inside["both"] / count >= 0.93
    if not of_item:
        assert inside["student"] / count == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(("of_seed", "of_item", "short"), [(1.0, 0.1, "bootstrap"), (0.05, 1.0, "student")])
def test_with_few_seeds_each_interval_alone_is_short_and_both_are_not(seeds, of_seed, of_item, short):
    rng, count, inside = np.random.default_rng(4), 600, np.zeros(2)
    for number in range(count):
        (cell,) = made_up(rng, seeds, 30, of_seed=of_seed, of_item=of_item, noise=0.1)
        found = paired(cell, draws=300, seed=number)
        low, high = getattr(found, short)
        inside += (low <= 0 <= high, found.low <= 0 <= found.high)
    alone, both = inside / count
    assert alone < 0.87
    assert both >= 0.92


def test_a_null_is_called_one_and_an_effect_is_found():
    rng = np.random.default_rng(1)
    nulls = [paired(*made_up(rng, 5, 30, of_item=0.3), draws=1000).verdict() for _ in range(200)]
    assert nulls.count("null") / 200 >= 0.93
    effects = [paired(*made_up(rng, 8, 200, effect=2.0, of_item=0.3), draws=1000).verdict() for _ in range(20)]
    assert effects == ["above"] * 20
    below = paired(*made_up(rng, 8, 200, effect=-2.0, of_item=0.3), draws=1000)
    assert below.verdict() == "below"
    assert below.verdict(0.2) == "null", "p after the correction is too high"
    assert below.verdict(0.01) == "below"


def test_pooling_is_the_mean_over_cells_and_narrower():
    rng = np.random.default_rng(2)
    cells = made_up(rng, 5, 50, effect=1.0, cells=6)
    found = pooled(cells)
    single = [paired(cell) for cell in cells]
    assert found.estimate == pytest.approx(np.mean([one.estimate for one in single]))
    assert found.seeds == 30
    assert found.high - found.low < np.mean([one.high - one.low for one in single])
    uneven = pooled([cells[0] * 3, cells[1]])
    assert uneven.estimate == pytest.approx(np.mean([single[0].estimate, single[1].estimate])), "a cell counts once"


def test_items_that_are_not_the_same_ones_and_items_that_are_nan():
    rng = np.random.default_rng(3)
    cell = [rng.normal(1, 1, count) for count in (20, 30, 25)]
    assert paired(cell, crossed=False).low < 1 < paired(cell, crossed=False).high
    with pytest.raises(ValueError, match=r"\[20, 25, 30\] items: those are not the same items"):
        paired(cell)
    whole = [rng.normal(1, 1, 20) for _ in range(4)]
    holes = [np.where(np.arange(20) < 3, np.nan, one) for one in whole]
    for crossed in (True, False):
        found, less = paired(holes, crossed), paired([one[3:] for one in whole], crossed)
        assert found.estimate == pytest.approx(less.estimate)
        assert (found.low, found.high) == pytest.approx((less.low, less.high), abs=0.15)


@pytest.mark.parametrize(("seeds", "apart"), [(2, 0.0), (2, 1e-9), (5, 0.0)])
def test_seeds_that_happen_to_agree_do_not_make_a_difference_certain(seeds, apart):
    """One item of thirty more is right in each: of other items it might be none. Student's t of the seeds says p = 0."""
    right = np.array([100.0] * 3 + [-100.0] * 2 + [0.0] * 25)
    found = paired([right + apart * seed for seed in range(seeds)])
    assert found.student[1] - found.student[0] < 1e-6
    assert found.low < 0 < found.high
    assert found.p > 0.3


def test_p_and_the_intervals_call_the_same_differences_clear():
    rng, agreed = np.random.default_rng(5), 0
    for number in range(200):
        found = paired(*made_up(rng, 5, 60, effect=1.0, of_item=2.0), draws=1000, seed=number)
        agreed += (found.p <= 0.05) == (found.verdict() == "above")
    assert agreed / 200 >= 0.92


def test_what_cannot_be_said():
    one = paired([np.ones(4)])
    assert one.estimate == 1
    assert one.verdict() == "unknown"
    assert math.isnan(one.p)
    for cells in ([], [[]], [[np.ones(3)], []]):
        with pytest.raises(ValueError, match="no differences"):
            pooled(cells)
    same = paired([np.zeros(5)] * 3)
    assert (same.low, same.high, same.p, same.verdict()) == (0, 0, 1, "null")
    assert Paired(1.0, (0.1, 2.0), (-0.1, 2.1), 0.06, 5, 10).verdict() == "null"
