"""RefCOCOg: how much a box in the answer covers of the true one (lmms-eval ``refcocog/utils_rec.py``)."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = Sequence[float]  # left, top, right, bottom; shares of the image's width and height

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")


def box_of(text: str) -> list[float]:
    """The first ``[a, b, c, d]`` in a text; ``[0, 0, 0, 0]`` without one. ``.5`` and ``1e-1`` are no numbers here."""
    found = _BOX.search(text)
    return [float(number) for number in found.groups()] if found else [0.0] * 4


def iou(prediction: str, references: Sequence[Box]) -> float:
    """Intersection over union of the box in the prediction and the true one (of several, the best).

    Nothing is clipped or put in order: a box whose corners are exchanged has 0, and so have two without an area (lmms-eval
    divides by zero there).
    """
    return max(_overlap(box_of(prediction), reference) for reference in references)


def iou_details(prediction: str, references: Sequence[Box]) -> dict[str, float]:
    """``acc@0.1`` … ``acc@0.9`` (the overlap is at least that), ``center`` (the box's middle lies in the true one)."""
    overlap, box = iou(prediction, references), box_of(prediction)
    found = {f"acc@{threshold}": float(overlap >= threshold) for threshold in THRESHOLDS}
    return {**found, "center": float(any(_middle_inside(box, reference) for reference in references))}


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _middle_inside(box: Box, reference: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return reference[0] <= x <= reference[2] and reference[1] <= y <= reference[3]
