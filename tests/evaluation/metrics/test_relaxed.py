"""ChartQA's relaxed accuracy: the measured examples, and what must hold for any numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.relaxed import relaxed


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("10.5", "10", 1),
        ("10.51", "10", 0),
        ("9.5", "10", 1),
        ("9.49", "10", 0),
        ("-10.5", "-10", 1),
        ("10", "-10", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # a share of nothing
        ("0", "0.0", 0),
        ("0.0001", "0", 0),
        ("1,000", "1000", 0),
        ("50", "50%", 0),
        ("0.5", "50%", 1),
        ("50%", "0.51", 1),
        ("52%", "50%", 1),
        ("0%", "0", 0),
        ("nan", "5", 0),
        ("nan", "nan", 0),
        ("inf", "5", 0),
        ("5", "nan", 0),
        ("YES", "yes", 1),
        ("yes ", "yes", 0),  # blanks count
        (" 10 ", "10", 1),  # but not around numbers
        ("yes", "no", 0),
        ("", "no", 0),
        ("", "5", 0),
    ],
)
def test_examples(prediction, reference, score):
    assert relaxed(prediction, [reference]) == score


def test_one_of_several_is_enough():
    assert relaxed("7", ["yes", "7.2"]) == 1
    assert relaxed("7", ["yes", "[7]"]) == 0


@given(st.floats(min_value=0.01, max_value=1e9), st.floats(min_value=-0.049, max_value=0.049))
def test_any_number(number, share):
    assert relaxed(str(number * (1 + share)), [str(number)]) == 1
    assert relaxed(str(number * (1.06 + abs(share))), [str(number)]) == 0
    assert relaxed(str(-number), [str(number)]) == 0
