"""Kinds of tokens, words, and what stands out."""

import numpy as np
import pytest

from seecal.scoring.read import RecordScores
from seecal.scoring.summary import EDGES, KINDS, Summary, answers_of, kinds_of


def record(tokens, deltas, *, seen=None, turns=None):
    """Tokens of one answer (or of ``turns``); "" is the token that ends it."""
    turns = turns or [0] * len(tokens)
    starts, stops, at = [], [], {}
    for token, turn in zip(tokens, turns, strict=True):
        starts.append(at.get(turn, 0))
        at[turn] = starts[-1] + len(token)
        stops.append(at[turn])
    columns = {
        "turn": np.array(turns), "token": np.array([token or "<|end|>" for token in tokens], dtype=object),
        "start": np.array(starts), "stop": np.array(stops), "delta": np.array(deltas, dtype=np.float32),
        "has_contrast": np.array([True] * len(tokens) if seen is None else seen),
    }  # fmt: skip
    return RecordScores("data.json", 0, "r0", columns)


def test_kinds():
    tokens = ["The", " ast", "ronaut", " has", " 3", " (", "red", ")", " hats", ".", ""]
    found = [KINDS[kind] for kind in kinds_of(answers_of(record(tokens, [0.0] * len(tokens))))]
    assert found == [
        "function words", "other words", "other words", "function words", "numbers", "punctuation", "other words",
        "punctuation", "other words", "punctuation", "end of turn",
    ]  # fmt: skip


def test_an_emoji_in_bytes_and_several_turns():
    made = answers_of(record(["👩", "", "🚀", "a", ""], [0.0] * 5, turns=[0, 0, 0, 1, 1]))
    assert made.texts == ["👩🚀", "a"]
    assert made.turns == [0, 1]
    assert [KINDS[kind] for kind in kinds_of(made)] == [
        "punctuation", "punctuation", "punctuation", "function words", "end of turn",
    ]  # fmt: skip


def test_words_are_means_of_their_tokens_and_come_often_enough():
    summary = Summary(1.0, 5.0)
    for number in range(3):
        one = record(["Ast", "ronaut", " and", " sky", ""], [4.0, 2.0, -1.5, 9.0, 0.0])
        summary.add(number, one, answers_of(one))
    one = record(["rare"], [50.0])
    summary.add(3, one, answers_of(one))
    high, low = summary.words.extremes(3)
    assert high == [("sky", 3, 9.0), ("astronaut", 3, 3.0), ("and", 3, -1.5)]
    assert low == high[::-1]
    assert [(number, token) for _, number, token in summary.against] == [(0, 2), (1, 2), (2, 2)]


def test_tokens_without_an_image_count_nowhere():
    summary = Summary(1.0, 5.0)
    one = record(["red", " cat", ""], [-9.0, 6.0, 1.0], seen=[False, True, True])
    summary.add(0, one, answers_of(one))
    assert (summary.tokens, summary.seen) == (3, 2)
    assert summary.against == []
    (row,) = summary.rows(summary.by_source)
    assert row == {"name": "data.json", "tokens": 2, "mean": 3.5, "against": 0, "at_alpha": 0.5, "at_beta": 0.5}
    assert summary.by_source["data.json"].sum() == 2
    none = record(["a"], [0.0], seen=[False])
    summary.add(1, none, answers_of(none))
    assert summary.seen == 2


def test_what_lies_beyond_the_picture_is_in_its_outermost_bins():
    summary = Summary(1.0, 5.0)
    one = record(["a", " b", " c"], [-99.0, 99.0, 15.0])
    summary.add(0, one, answers_of(one))
    counts = summary.by_source["data.json"]
    assert (counts[0], counts[-1], counts.sum()) == (1, 2, 3)
    assert len(counts) == len(EDGES) - 1


def test_only_the_most_contradictory_tokens_are_kept():
    summary = Summary(1.0, 5.0)
    for number in range(200):
        one = record(["x"], [-2.0 - number / 10])
        summary.add(number, one, answers_of(one))
    kept = summary.against
    assert [number for _, number, _ in kept] == list(range(199, 139, -1))
    assert kept[0][0] == pytest.approx(-21.9, abs=1e-4)
