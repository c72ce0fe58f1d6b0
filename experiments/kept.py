"""What the trials of nano models and of the model with real weights both do: figures made once, and the weights' shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gave when it was called first, from a JSON file that is there when it is whole."""
    if not path.exists():
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(make()), "utf8")
        aside.replace(path)
    return json.loads(path.read_text("utf8"))


def weight_shares(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the label tokens after an image, those with Δ at or below alpha, between, at or above beta: the mean of a
    training's logs. Empty without Δ."""
    names = ("share_at_alpha", "share_inside", "share_at_beta")
    found = {name: [log[name] for log in history if name in log] for name in names}
    return {name.removeprefix("share_"): round(float(np.mean(values)), 4) for name, values in found.items() if values}
