"""Equality, blanks at the ends aside."""

from __future__ import annotations

from collections.abc import Sequence


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references, else 0. Capitals and punctuation count."""
    return float(prediction.strip() in {reference.strip() for reference in references})
