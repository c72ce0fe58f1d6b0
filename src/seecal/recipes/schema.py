"""The types of a recipe's values: what YAML or the command line gave, made into what a key wants, or one clear error."""

from __future__ import annotations

import difflib
import math
import types
import typing
from enum import Enum
from typing import Any

import yaml

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


class Text(str):
    """A value from the command line: text that may stand for a number, a list, a mapping or null."""


def checked(key: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` (a type, or a union of types) wants it.

    YAML reads 1e-5 as text (it wants 1.0e-5) and ``no`` as false; both are understood here.

    Raises:
        ValueError: naming the key, the types that it takes, and what it got.
    """
    kinds = _kinds(hint)
    if isinstance(value, Text):
        value = _from_text(value, kinds)
    for kind in kinds:
        found, result = _fit(key, value, kind)
        if found:
            return result
    choices = [one.value for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for one in kind]
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=5, cutoff=0) if len(choices) > 12 else choices
        more = f" and {len(choices) - len(near)} more" if len(near) < len(choices) else ""
        raise ValueError(f"{key}: expected one of {', '.join(map(str, near))}{more}, got {value!r}")
    expected = " or ".join(dict.fromkeys(_NAMES.get(typing.get_origin(one) or one, str(one)) for one in kinds))
    hint_quotes = " (put it in quotes)" if str in kinds and isinstance(value, (int, float)) else ""
    raise ValueError(f"{key}: expected {expected}, got {value!r}{hint_quotes}")


def _kinds(hint: Any) -> list[Any]:
    """The members of a union, the narrow ones first: text fits nearly everything."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = list(typing.get_args(hint)) if union else [hint]
    kinds = [type(typing.get_args(one)[0]) if typing.get_origin(one) is typing.Literal else one for one in kinds]
    if any(isinstance(one, type) and issubclass(one, Enum) for one in kinds):
        kinds = [one for one in kinds if one is not str]  # "SchedulerType | str": the text must name a member
    return sorted(kinds, key=lambda one: one is str)


def _from_text(value: str, kinds: list[Any]) -> Any:
    if value == "null" and type(None) in kinds:
        return None
    structured = any((typing.get_origin(one) or one) in (list, dict) for one in kinds)
    if structured and value[:1] in ("[", "{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            pass  # then it is text, if the key takes text
    if any((typing.get_origin(one) or one) is list for one in kinds) and str not in kinds:
        return [str(value)]
    return str(value)


def _fit(key: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """(does it fit, the value in that type)."""
    origin = typing.get_origin(kind) or kind
    if origin is type(None):
        return value is None, None
    if isinstance(origin, type) and issubclass(origin, Enum):
        text = "no" if value is False else value  # `save_strategy: no` is false to YAML
        known = {one.value: one.value for one in origin}
        return isinstance(text, str) and text in known, text
    if origin is bool:
        return _truth(value)
    if origin in (int, float):
        return _number(value, origin)
    if origin is list and isinstance(value, list):
        inner = typing.get_args(kind)
        return True, [checked(f"{key}.{i}", one, inner[0]) if inner else _plain(one) for i, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        inner = typing.get_args(kind)
        typed = bool(inner) and inner[1] is not Any
        return True, {
            name: checked(f"{key}.{name}", one, inner[1]) if typed else _plain(one) for name, one in value.items()
        }
    return origin is str and isinstance(value, str), value


def _truth(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return True, value.lower() in _TRUE
    return isinstance(value, bool), value


def _number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, None
    if kind is int and isinstance(value, float):
        return False, None
    try:
        number = kind(value)
    except ValueError:
        return False, None
    return math.isfinite(number), number


def _plain(value: Any) -> Any:
    """Command-line text inside a list or mapping of unknown types, at any depth, read as YAML reads it."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, Text):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return str(value)
