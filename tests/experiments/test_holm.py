"""Holm's correction, against R's."""

import math

import pytest
from experiments.holm import holm


def test_holm_is_that_of_a_known_example():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    nan = float("nan")
    found = holm([0.01, nan, 0.04])
    assert found[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(found[1])
    assert holm([]) == []
