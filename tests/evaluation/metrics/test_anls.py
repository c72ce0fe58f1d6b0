"""DocVQA's similarity: the measured examples, and what must hold for any texts."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.anls import anls


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("abxy", ["abcd"], 0.5),  # the edge counts
        ("abxyz", ["abcd"], 0),
        ("abcx", ["abcd"], 0.75),
        ("abcx", ["zzzz", "abcd", "abxy"], 0.75),
        ("", [""], 1),
        ("", ["a"], 0),
        ("a", [""], 0),
        ("HELLO  World ", ["hello world"], 1),
        ("a b", ["a     c"], 1 - 1 / 7),  # the length is that of the text with all its blanks
        ("ß", ["s"], 0.5),  # and that of the capitals, SS
    ],
)
def test_examples(prediction, references, score):
    assert anls(prediction, references) == pytest.approx(score)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_texts(prediction, reference):
    score = anls(prediction, [reference])
    assert score == 0 or 0.5 <= score <= 1
    assert anls(prediction, [reference, prediction]) == 1
    assert score == pytest.approx(anls(reference, [prediction]))


def test_without_rapidfuzz_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r"anls needs rapidfuzz: run pip install 'seecal\[eval\]'"):
        anls("a", ["b"])
