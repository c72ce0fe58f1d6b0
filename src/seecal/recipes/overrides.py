"""Settings on the command line: ``--key value``, ``--mapping.key value``, ``--stages.2.key value``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .schema import Text


def arguments(argv: Iterable[str]) -> list[tuple[str, list[str]]]:
    """``--key value``, ``--key=value``, ``--key a b`` and ``--key`` (true) as (key, values); ValueError otherwise."""
    found: list[tuple[str, list[str]]] = []
    for one in argv:
        if one.startswith("--") and len(one) > 2:
            key, equals, value = one[2:].partition("=")
            found.append((key.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(one)
        else:
            raise ValueError(f"unexpected argument {one!r}: settings are written --key value, the recipe --config FILE")
    return found


def override_stage(top: dict[str, Any], dotted: str, values: list[str]) -> None:
    """Note ``--stages.N.key`` with stage N, under the key "": it goes in after the overrides for all stages."""
    stages = top.get("stages")
    if not isinstance(stages, list):
        raise ValueError(f"--{dotted}: this recipe has no stages. Leave out 'stages.N.'")
    _, number, rest = [*dotted.split(".", 2), "", ""][:3]
    if not number.isdecimal() or not 1 <= int(number) <= len(stages) or not rest:
        raise ValueError(f"--{dotted}: expected --stages.N.key with N from 1 to {len(stages)}")
    if isinstance(stages[int(number) - 1], dict):
        stages[int(number) - 1].setdefault("", []).append((rest, values))


def put(settings: dict[str, Any], dotted: str, values: list[str]) -> dict[str, Any]:
    """Set one command-line override in place; ``lora.r`` goes into the mapping ``lora``, or makes one, at any depth."""
    value: Any = Text(values[0]) if len(values) == 1 else [Text(one) for one in values] if values else Text("true")
    key, *inner = dotted.split(".")
    settings[key] = _inside(settings.get(key), inner, value, dotted, key)
    return settings


def _inside(before: Any, keys: list[str], value: Any, dotted: str, above: str) -> Any:
    """``before`` with ``value`` under ``keys``. ``above``: what ``before`` is called."""
    if not keys:
        return value
    if before is not None and not isinstance(before, dict):
        raise ValueError(f"--{dotted}: {above} is {before!r}, not a mapping. Set --{above} as a whole")
    key, *inner = keys
    before = before or {}
    return {**before, key: _inside(before.get(key), inner, value, dotted, f"{above}.{key}")}
