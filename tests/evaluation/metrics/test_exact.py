"""Equality, blanks at the ends aside."""

import pytest

from seecal.evaluation.metrics.exact import exact


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("red", ["red"], 1),
        (" red\n", ["red "], 1),
        ("red", ["blue", "red"], 1),
        ("Red", ["red"], 0),
        ("red.", ["red"], 0),
        ("a  b", ["a b"], 0),
        ("", ["red"], 0),
        ("", [""], 1),
    ],
)
def test_examples(prediction, references, score):
    assert exact(prediction, references) == score
