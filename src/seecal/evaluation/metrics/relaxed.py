"""ChartQA's relaxed accuracy: numbers within 5 %, else the same text (lmms-eval ``chartqa/utils.py``)."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05  # of the reference; the edge counts


def relaxed(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references, or a number at most 5 % from one that is a number, else 0.

    A reference of 0 has no 5 %: it must be met as text. "x %" is x/100; "1,000" is no number; blanks count in texts.
    """
    return float(any(_agrees(prediction, reference) for reference in references))


def _agrees(prediction: str, reference: str) -> bool:
    said, wanted = _number(prediction), _number(reference)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
