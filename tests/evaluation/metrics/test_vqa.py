"""VQA's soft accuracy: the measured examples, and what must hold for any texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.vqa import normalised, vqa


@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_so_many_of_ten_people(equal, score):
    answers = ["red"] * equal + [f"other {number}" for number in range(10 - equal)]
    assert vqa("red", answers) == pytest.approx(score)


def test_people_are_compared_as_the_prediction_is():
    assert vqa("a STOP sign.", ["stop sign", "The stop sign", "STOP, sign", "stop sign?", "x"]) == 1


def test_without_answers_and_with_a_single_one():
    assert vqa("red", []) == 0
    assert vqa("red", ["red"]) == 0  # nobody else said so
    assert vqa("red", ["red", "red"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("$5.00", "$5.00"),
        ("1,000", "1000"),
        ("Coca-Cola", "coca cola"),
        ("N.Y.", "ny"),
        ("dont", "don't"),
        ("couldn'tve couldnt've", "couldn't've couldn't've"),
        ("ow's'at 'ows'at", "ow 's'at 'ow's'at"),  # 's is parted before
        ("somebody'd", "somebodyd"),
        ("its well were", "its well were"),
        ("none zero one ten eleven", "0 0 1 10 eleven"),
        ("The a An cat", "cat"),
        ("dog's", "dog 's"),
        ("a\nb\tc", "b c"),
        ("a/b", "b"),
        ("x/y", "x y"),
        ("x/ y/z", "x yz"),
        ("1;2 12.5.", "1 2 12.5"),
        ("2. 3", "2 3"),
        ("what? yes!", "what yes"),
        ("it; is-it (so) [1] {2} \"3\" <4> =5 +6 \\7 _8 @9 `0`", "it is it so 1 2 3 4 5 6 7 8 9 0"),
        ("", ""),
        ("...", ""),
        ("." * 33, "."),  # the field removes 32 periods
        ("9,,9 x-y", "99 x y"),
    ],
)  # fmt: skip
def test_texts(text, becomes):
    assert normalised(text) == becomes


@given(st.lists(st.text(max_size=12), min_size=1, max_size=12), st.text(max_size=12))
def test_any_texts(answers, prediction):
    score = vqa(prediction, answers)
    assert 0 <= score <= 1
    assert vqa(prediction, answers[::-1]) == pytest.approx(score)
    assert vqa(prediction, [prediction] * 4) == 1
