"""DocVQA's average normalised Levenshtein similarity (lmms-eval ``api/metrics.py``)."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 0.5  # what is less similar is wrong


def anls(prediction: str, references: Sequence[str]) -> float:
    """1 − the distance to the nearest reference, in shares of the longer text; 0 where that is below 0.5.

    The distance is between the texts in lower case with single blanks; the length is that of the texts as they are, which
    makes a text with many blanks more similar. So it is measured in the field.

    Raises:
        ImportError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ImportError("the metric anls needs rapidfuzz: run pip install 'seecal[eval]'") from None
    shares = [
        Levenshtein.distance(_plain(prediction), _plain(reference)) / longest
        if (longest := max(len(reference.upper()), len(prediction.upper())))  # ß is SS: longer
        else 0.0
        for reference in references
    ]
    similarity = 1 - min(shares)
    return similarity if similarity >= LEAST else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
