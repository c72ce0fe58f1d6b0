"""Arrays of one number an item, short enough for a row of results."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

_UNIT, _MOST, _NAN = 1e-3, 32766, 32767  # of a float: thousandths in 16 bits; the last number stands for nan


def packed(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Arrays [N] as text: ``"N:…"``, 0 and 1 as bits in hexadecimal, others in thousandths (base64; at most ±32.766).

    Raises:
        ValueError: an array that is not [N].
    """
    return {name: _packed(name, np.asarray(values, float)) for name, values in arrays.items()}


def _packed(name: str, values: np.ndarray) -> str:
    if values.ndim != 1:
        raise ValueError(f"{name} is {list(values.shape)}: an array of a row is [N], one number an item")
    if np.isin(values, (0, 1)).all():
        return f"{len(values)}:{np.packbits(values.astype(bool)).tobytes().hex()}"
    rounded = np.where(np.isnan(values), _NAN, np.clip(np.nan_to_num(values) / _UNIT, -_MOST, _MOST).round())
    return f"{len(values)}:{base64.b64encode(rounded.astype('<i2').tobytes()).decode()}="


def unpacked(text: str) -> np.ndarray:
    """[N] floats of what :func:`packed` made; the inverse to a thousandth."""
    count, _, told = text.partition(":")
    if told.endswith("="):
        values = np.frombuffer(base64.b64decode(told[:-1]), "<i2").astype(float)
        return np.where(values == _NAN, np.nan, values * _UNIT)
    return np.unpackbits(np.frombuffer(bytes.fromhex(told), np.uint8), count=int(count)).astype(float)
