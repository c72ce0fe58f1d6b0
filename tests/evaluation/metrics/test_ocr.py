"""OCRBench: a reference inside the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.ocr import KINDS, ocr
from seecal.evaluation.metrics.table import METRICS


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The sign says STOP.", ["stop"], 1),
        ("sto p", ["stop"], 0),
        ("a\nb", ["a b"], 1),
        ("a  b", ["a b"], 0),
        ("Ｓｔｏｐ　ｈｅｒｅ", ["stop here"], 1),
        ("stop", ["Ｓｔｏｐ"], 1),
        ("½", ["1/2"], 0),  # nothing else is folded
        ("b", ["a", "b"], 1),
        ("", ["a"], 0),
    ],
)
def test_examples(prediction, references, score):
    assert ocr(prediction, references) == score
    assert ocr(prediction, references, {"dataset": "SROIE"}) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("x ^ { 2 } + 1", "x^{2}", 1),
        ("X^{2}", "x^{2}", 0),
        ("x^{2\n}", "x^{ 2}", 1),
        ("ｘ^{2}", "x^{2}", 0),
    ],
)
def test_formulas_keep_their_capitals_and_lose_their_blanks(prediction, reference, score):
    assert ocr(prediction, [reference], {"dataset": "HME100k"}) == score


def test_the_figure_is_the_count_of_the_thousand_and_begins_anew_each_time():
    """lmms-eval keeps its counts in the module: there a second evaluation adds up."""
    groups = [kind for kind, count in KINDS.items() for _ in range(count)]
    assert len(groups) == 1000
    right = [number % 4 < 2 for number in range(1000)]
    metric = METRICS["ocr"]
    for _ in range(2):
        scores = metric.scores(["yes" if one else "no" for one in right], [["yes"]] * 1000, [{}] * 1000)
        assert metric.figure(scores, groups) == pytest.approx(500)


def test_an_unknown_kind_of_question_is_a_group_like_any_other():
    assert METRICS["ocr"].by_group([1.0, 0.0], ["Signs", "Signs"]) == {"Signs": 500}


@given(st.text(max_size=20), st.text(max_size=5), st.sampled_from([None, {"dataset": "HME100k"}]))
def test_any_text(text, before, record):
    assert ocr(before + text, [text], record) == 1
    assert ocr(text, [text + "\u0001x"], record) == 0
