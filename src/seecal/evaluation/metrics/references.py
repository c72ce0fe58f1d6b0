"""What a column of a data set, or the last turn of a record, gives as its true answers."""

from __future__ import annotations

import json
import math
from typing import Any

from ...data.paths import RecordError, show
from .iou import Box


def one_text(turn: str) -> list[str]:
    """The true answer of a last turn: its text, whatever it looks like."""
    return [turn]


def texts(value: Any) -> list[str]:
    """The true answers under one key: a text, a number, or a list of them (as JSON text, too). A whole number is written
    without a point, also where it came as a float.

    Raises:
        RecordError: nothing there, or something else.
    """
    values = _listed(value)
    found = [_text(one) for one in (values if isinstance(values, list) else [values])]
    if not found:
        raise RecordError("the list of its answers is empty. Write one, or leave the record out.")
    return found


def boxes(value: Any) -> list[Box]:
    """The true boxes: four numbers (left, top, right, bottom; shares of width and height), or a list of such, or a text
    that holds one.

    Raises:
        RecordError: something else.
    """
    value = _listed(value)
    found = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for box in found:
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(number) for number in box)):
            raise RecordError(
                f"its box {show(box)} is not four numbers: left, top, right, bottom, as shares of the image's width and "
                "height. Correct it."
            )
    return [[float(number) for number in box] for box in found]


def _listed(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # pandas makes floats of whole numbers where some are missing
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    raise RecordError(f"its answer {show(value)} is neither a text nor a number, nor a list of them. Correct it.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
