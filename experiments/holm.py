"""The correction of p over a grid of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence


def holm(values: Sequence[float]) -> list[float]:
    """p after Holm's correction, in the order given; nan stay nan and do not count.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = sorted((place for place, p in enumerate(values) if not math.isnan(p)), key=lambda place: values[place])
    found, least = [float("nan")] * len(values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * values[place]))
        found[place] = least
    return found
