"""Student's t, for intervals of few values; no more than the standard library."""

from __future__ import annotations

import math


def student_cdf(value: float, freedom: int) -> float:
    """P(T ≤ value) of Student's t with a whole number of degrees of freedom.

    Source: 26.7.3 and 26.7.4 of Abramowitz and Stegun, Handbook of Mathematical Functions (1964).
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom}: Student's t needs one degree of freedom or more, so two values or more")
    angle = math.atan2(value, math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range((freedom - odd) // 2):
        total += term
        term *= square * ((2 * step + 2) / (2 * step + 3) if odd else (2 * step + 1) / (2 * step + 2))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def student_quantile(share: float, freedom: int) -> float:
    """Where ``student_cdf`` reaches ``share``, by halving."""
    if not 0 < share < 1:
        raise ValueError(f"share={share}: a quantile is of a share between 0 and 1")
    low, high = -1.0, 1.0
    while student_cdf(low, freedom) > share:
        low *= 2
    while student_cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2
