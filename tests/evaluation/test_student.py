"""Student's t against printed tables and short formulas."""

import math

import pytest

from seecal.evaluation.student import student_cdf, student_quantile

# Upper 2.5 % points of Student's t, as printed in tables (Fisher and Yates, Statistical Tables, table III)
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262, 10: 2.228, 20: 2.086}
TABLE |= {30: 2.042, 120: 1.980, 149: 1.976}


@pytest.mark.parametrize(("freedom", "value"), TABLE.items())
def test_quantiles_of_student_are_those_of_the_tables(freedom, value):
    assert student_quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)
    assert student_quantile(0.025, freedom) == pytest.approx(-value, abs=6e-4)
    assert student_cdf(student_quantile(0.9, freedom), freedom) == pytest.approx(0.9)


def test_student_where_it_has_a_short_formula():
    for value in (-2.0, -0.3, 0.0, 1.0, 5.0):
        assert student_cdf(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi)  # Cauchy's
        assert student_cdf(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)))
        assert student_cdf(value, 3) + student_cdf(-value, 3) == pytest.approx(1)
    with pytest.raises(ValueError, match="one degree of freedom or more"):
        student_cdf(1.0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        student_quantile(1.0, 3)
