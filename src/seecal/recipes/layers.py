"""What a recipe is put together from: the file that it extends, and presets of CAL's options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.options import PRESETS
from .yaml_text import read_yaml

SHIPPED = Path(__file__).parent


def load(config: str) -> dict[str, Any]:
    """The mapping in a recipe file, or in the shipped recipe of that name, with what it ``extends`` below it.

    Raises:
        FileNotFoundError: no such file, here or further below.
        ValueError: no recipe in it, files that extend each other, stages that cannot be put on those below.
    """
    return _load(config, ())


def _load(config: str, above: tuple[str, ...]) -> dict[str, Any]:
    path = _path_of(config, above[-1] if above else None)
    if str(path.resolve()) in above:
        raise ValueError(f"{path}: extends goes round in a circle: {' -> '.join([*above, str(path.resolve())])}")
    own = _with_presets(_mapping_in(path))
    below = own.pop("extends", None)
    if below is None:
        return own
    if not isinstance(below, str):
        raise ValueError(f"{path}: extends: expected a recipe's name or path, got {below!r}")
    return _on_top(f"{path}", own, below, _load(below, (*above, str(path.resolve()))))


def _path_of(config: str, above: str | None) -> Path:
    path = Path(config)
    if not path.exists() and (SHIPPED / f"{config}.yaml").exists():
        path = SHIPPED / f"{config}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in SHIPPED.glob("*.yaml")))
        what = "this is a folder" if path.is_dir() else "no such file"
        shown = f"--config {config}" if above is None else f"{above}: extends: {config}"
        raise FileNotFoundError(f"{shown}: {what}. Give a recipe's path, or the name of one of ours: {names}")
    return path


def _mapping_in(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: expected keys and values, such as 'learning_rate: 2.0e-5'")
    return found


def _on_top(where: str, own: dict[str, Any], name: str, below: dict[str, Any]) -> dict[str, Any]:
    """``own`` over ``below``: keys replace keys, stages go on stages by their number.

    Raises:
        ValueError: other stages than below; or a key at the top level that a stage below has, whose value would win.
    """
    lower, upper = below.get("stages"), own.get("stages")
    if not isinstance(lower, list):
        return {**below, **own}
    entries = [{} for _ in lower] if upper is None else upper
    if not isinstance(entries, list) or len(entries) != len(lower):
        raise ValueError(
            f"{where}: stages: {name}, which it extends, has {len(lower)}. Give an entry for each, {{}} where it stays as "
            "it is, or extend nothing"
        )
    if not all(isinstance(one, dict) for one in (*entries, *lower)):
        raise ValueError(f"{where}: stages: expected a list of mappings, one for each stage")
    for number, (one, its) in enumerate(zip(entries, lower, strict=True), 1):
        for key in own:
            if key in its and key not in one:
                raise ValueError(
                    f"{where}: {key} at the top level would change nothing: stage {number} of {name}, which it extends, "
                    f"sets its own. Set it in that entry of stages"
                )
    return {**below, **own, "stages": [{**its, **one} for its, one in zip(lower, entries, strict=True)]}


# ---- Presets ----


def _with_presets(file: dict[str, Any]) -> dict[str, Any]:
    """A file's mapping with the options that each ``preset`` stands for in the place of that key; keys beside it win."""
    own = _with_preset(file, "")
    if isinstance(stages := own.get("stages"), list):
        entries = enumerate(stages, 1)
        own["stages"] = [_with_preset(e, f"stages.{n}.") if isinstance(e, dict) else e for n, e in entries]
    return own


def _with_preset(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    own = dict(settings)
    name = own.pop("preset", None)
    return own if name is None else {**_preset(f"{prefix}preset", name), **own}


def preset_settings(overrides: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The same of the command line's settings: a preset's options first, so that the others win.

    Raises:
        ValueError: no such preset.
    """
    found, others = [], []
    for dotted, values in overrides:
        if dotted == "preset" or (dotted.startswith("stages.") and dotted.endswith(".preset")):
            options = _preset(f"--{dotted}", values[0] if len(values) == 1 else values)
            found += [(dotted.removesuffix("preset") + key, [value]) for key, value in options.items()]
        else:
            others.append((dotted, values))
    return found + others


def _preset(shown: str, name: Any) -> dict[str, str]:
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown(f"{shown}: {name}", str(name), PRESETS, "preset")
    return PRESETS[name]


def unknown(shown: str, name: str, known: Iterable[str], what: str = "key") -> ValueError:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    other = f"There are {', '.join(known)}" if what != "key" else "seecal train --help-all lists them"
    return ValueError(f"{shown}: no such {what}. {f'Did you mean {near[0]}?' if near else other}")
