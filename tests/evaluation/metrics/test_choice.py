"""The letter of an answer, by three rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.choice import choice, choice_mmt, choice_scienceqa, letter_of
from seecal.evaluation.metrics.table import METRICS


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("b", ""),
        ("I think Donald", "D"),
        ("The answer is (B).", "B"),
        ("A or B", "A"),  # the start before the end
        ("Is it A or B", "B"),  # the end
        ("It is (A), not B: no", "A"),  # (A) before B:
        ("(A) or (C) here", "C"),  # the last of a kind
        ("the answer is C because of B here", "B"),  # the last letter behind the phrase
        ("正解: 答案是C吧", "C"),
        ("Apple", "A"),
        ("Apple Cat", "C"),
        ("", ""),
        ("...", ""),
        ("E", ""),  # no option of MMStar
        ("none of them", ""),
    ],
)
def test_mmstar(text, letter):
    assert letter_of(text) == letter
    for true in "ABCD":
        assert choice(text, [true]) == (letter == true)


def test_the_true_letter_may_be_written_small():
    assert choice("C", [" c "]) == 1


def test_mmstars_figure_is_the_mean_of_its_categories():
    scores, groups = [1.0, 1.0, 1.0, 0.0], ["x", "x", "x", "y"]
    assert METRICS["choice"].figure(scores, groups) == 50
    assert METRICS["choice"].figure(scores) == 75
    assert METRICS["choice_mmt"].figure(scores, groups) == 75


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(I)", "I"),
        ("H", "H"),
        ("It is B.", "B"),
        ("A B C", "C"),  # the last
        ("(A) or (B)", "A"),  # neither stands between blanks: the first
        ("x B. y", "B"),
        ("I see a cat", "I"),
    ],
)
def test_mmt(text, letter):
    for true in "ABCDEFGHI":
        assert choice_mmt(text, [true]) == (letter == true)


def test_mmt_draws_an_option_where_there_is_no_letter_the_same_in_every_run():
    options = {"A": "cat", "B": "dog", "C": "", "D": None}
    hits = [choice_mmt("none", ["A"], {**options, "id": f"r{number}"}) for number in range(400)]
    assert hits == [choice_mmt("none", ["A"], {**options, "id": f"r{number}"}) for number in range(400)]
    assert 150 < sum(hits) < 250, "one of two"
    assert not any(choice_mmt("none", ["C"], {**options, "id": f"r{number}"}) for number in range(50))


@pytest.mark.parametrize(
    ("text", "score"),
    [("B", 1), ("b", 1), (" B\n", 1), ("B. dog", 1), ("B.", 1), ("b. dog", 0), ("(B)", 0), ("The answer is B", 0),
     ("B dog", 0), ("", 0), ("A. B", 0)],
)  # fmt: skip
def test_scienceqa(text, score):
    assert choice_scienceqa(text, ["B"]) == score


@given(st.text(alphabet="ABCDab .:()\n,is", max_size=30))
def test_any_text(text):
    letter = letter_of(text)
    assert letter in ("", *"ABCD")
    assert letter == "" or letter in text
    assert (letter == "") == (not set(text) & set("ABCD"))
    assert sum(choice(text, [one]) for one in "ABCD") == (letter != "")
    assert sum(choice_mmt(text, [one]) for one in "ABCDEFGHI") == 1
