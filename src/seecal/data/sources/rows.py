"""Rows as readers yield them: ``(place, row)``, a row that cannot be read being a :class:`RecordError` in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import datasets

from ..paths import RecordError, show

Rows = Iterator[tuple[str, "dict[str, Any] | RecordError"]]


def as_row(row: Any, features: Any = None) -> dict[str, Any] | RecordError:
    if not isinstance(row, dict):
        return RecordError(f"{show(row)} is not an object with keys.")
    try:
        # pandas writes an empty cell as not a number
        row = {key: inner for key, inner in row.items() if inner.__class__ is not float or inner == inner}
        return without_nulls(row if features is None or not _holds_json(features) else _with_json(row, features))
    except (RecursionError, ValueError) as error:
        return RecordError(f"it cannot be read ({reason(error)}). Correct or delete the record.")


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(_holds_json(inner) for inner in feature.values())
    return isinstance(feature, datasets.Json) or _holds_json(getattr(feature, "feature", None) or {})


def _with_json(value: Any, feature: Any) -> Any:
    """``value`` with what `datasets` keeps as JSON text (columns of mixed types) read: only images stay encoded."""
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _with_json(inner, feature.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_json(inner, getattr(feature, "feature", None)) for inner in value]
    return value


def without_nulls(value: Any) -> Any:
    """``value`` without the keys that are None: Arrow puts every key of any row into all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return " ".join(str(error).split())[:160]
