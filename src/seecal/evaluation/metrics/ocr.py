"""OCRBench: a reference inside the prediction, counted by kind of question (lmms-eval ``ocrbench/utils.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The kinds of question, and how many of the 1,000 are of each
KINDS = {
    **dict.fromkeys(
        (
            "Regular Text Recognition",
            "Irregular Text Recognition",
            "Artistic Text Recognition",
            "Handwriting Recognition",
            "Digit String Recognition",
            "Non-Semantic Text Recognition",
        ),
        50,
    ),
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    "Handwritten Mathematical Expression Recognition": 100,
}
FORMULAS = "HME100k"  # the set whose answers are formulas, where capitals matter and blanks do not
# Full-width forms of ASCII, and its blank
_FOLDED = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3000: ord(" ")}


def ocr(prediction: str, references: Sequence[str], record: Mapping[str, Any] | None = None) -> float:
    """1 if a reference stands in the prediction, else 0.

    Args:
        record: with ``dataset`` "HME100k": case is kept and all blanks are removed. Else both are in lower case, with line
            ends as blanks and full-width ASCII as ASCII.
    """
    form = _formula if (record or {}).get("dataset") == FORMULAS else _words
    said = form(prediction.strip())
    return float(any(form(reference) in said for reference in references))


def _words(text: str) -> str:
    return text.translate(_FOLDED).lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
