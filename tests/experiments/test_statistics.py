"""AUROC against counting pairs, inside words and over all, and its intervals."""

import itertools

import numpy as np
import pytest
from experiments.statistics import Observations, auroc, grouped_auroc, grouped_share, matched_auroc


def observations(values, words, groups=None):
    groups = range(len(values)) if groups is None else groups
    return Observations(np.array(values, float), np.array(words, int), np.array(groups, int))


def made_up(count=60, words=7, groups=11, seed=0):
    """Right and wrong tokens of a few words; small whole values, so that many are equal."""
    draw = np.random.default_rng(seed)
    return [
        observations(draw.integers(0, 5, count) + more, draw.integers(0, words, count), draw.integers(0, groups, count))
        for more in (1, 0)
    ]


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


# ---- Inside words ----


def pairs_of(high, low):
    """(group of one, group of the other, 1, 0.5 or 0) of every pair of the same word, one after the other."""
    for value, word, group in zip(high.values, high.words, high.groups, strict=True):
        for other, its_word, its_group in zip(low.values, low.words, low.groups, strict=True):
            if word == its_word:
                yield group, its_group, 1.0 if value > other else 0.5 if value == other else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_matched_auroc_counts_the_pairs_of_each_word(seed):
    high, low = made_up(seed=seed)
    wins = [win for _, _, win in pairs_of(high, low)]
    assert 0 < len(wins) < len(high.values) * len(low.values)
    assert matched_auroc(high, low, draws=2)[0] == pytest.approx(np.mean(wins))
    assert matched_auroc(low, high, draws=2)[0] == pytest.approx(1 - np.mean(wins))


@pytest.mark.parametrize(("count", "seed"), [(60, 0), (9, 1), (9, 2)])
def test_the_interval_is_that_of_groups_drawn_whole(count, seed):
    """Also of groups that are in one of the two alone, and of draws that leave no pair."""
    high, low = made_up(count, words=3, seed=seed)
    alone = set(low.groups) - set(high.groups), set(high.groups) - set(low.groups)
    assert all(alone) == (count == 9)
    pairs = list(pairs_of(high, low))
    groups = np.unique(np.concatenate([high.groups, low.groups]))
    draw, found = np.random.default_rng(3), []
    for _ in range(200):
        drawn = list(groups[draw.integers(0, len(groups), len(groups))])
        counts = [drawn.count(one) * (drawn.count(other) if one != other else 1) for one, other, _ in pairs]
        if sum(counts):
            found.append(np.average([win for *_, win in pairs], weights=counts))
    _, begin, end = matched_auroc(high, low, draws=200, seed=3)
    assert (begin, end) == pytest.approx(np.percentile(found, [2.5, 97.5]))


def test_known_answers():
    words = [0, 0, 1, 1]
    above, below, equal = observations([2, 3, 9, 8], words), observations([0, 1, 5, 6], words), [4, 4, 7, 7]
    assert matched_auroc(above, below) == (1, 1, 1)
    assert matched_auroc(below, above) == (0, 0, 0)
    assert matched_auroc(observations(equal, words), observations(equal, words)) == (0.5, 0.5, 0.5)
    # Word 0 has four pairs and wins one and a half, word 1 has one and wins it
    high, low = observations([1, 2, 5], [0, 0, 1]), observations([2, 3, 4], [0, 0, 1])
    assert matched_auroc(high, low)[0] == pytest.approx((0.5 + 1) / 5)


def test_a_score_that_only_knows_words_is_at_one_half():
    """Right words are common ones, wrong words are rare ones, and the score is the word's frequency."""
    frequency = {"plant": 5.0, "dish": 4.0, "zither": 1.0, "oboe": 2.0}
    names = list(frequency)

    def of(words):
        return observations([frequency[word] for word in words], [names.index(word) for word in words])

    right, wrong = of(["plant", "dish"] * 10), of(["zither", "oboe"] * 10)
    assert auroc(right.values, wrong.values) == 1
    assert np.isnan(matched_auroc(right, wrong)).all()  # no word is both: nothing can be said
    right, wrong = of(["plant", "dish"] * 20 + ["zither"]), of(["zither", "oboe"] * 20 + ["plant"])
    assert auroc(right.values, wrong.values) > 0.95
    assert matched_auroc(right, wrong) == (0.5, 0.5, 0.5)


def test_words_hide_from_auroc_what_is_inside_them():
    """Each word is 0.1 higher where it is right, and words lie far apart."""
    words = np.arange(50)
    high, low = observations(words + 0.1, words), observations(words, words)
    assert matched_auroc(high, low) == (1, 1, 1)
    assert auroc(high.values, low.values) == pytest.approx(0.51)


def test_copies_of_a_group_make_the_interval_no_narrower():
    high, low = made_up()
    copies = [Observations(*(np.repeat(one, 10) for one in (of.values, of.words, of.groups))) for of in (high, low)]
    assert matched_auroc(*copies, draws=50) == pytest.approx(matched_auroc(high, low, draws=50))


def test_what_cannot_be_compared():
    one, other = observations([1], [0]), observations([2], [1])
    assert np.isnan(matched_auroc(one, other)).all()
    assert np.isnan(matched_auroc(one, observations([], []))).all()
    with pytest.raises(ValueError, match=r"shapes .*must be \[N\]"):
        observations([1, 2], [0])
    with pytest.raises(ValueError, match="shapes"):
        Observations(np.float64(1), np.int64(1), np.int64(1))
