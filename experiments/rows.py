"""Rows of results: one a run, appended when it is whole, and never made twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Rows:
    """The rows of one experiment.

    Args:
        name: of the experiment.
        folder: where ``NAME.jsonl`` lies.
    """

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.jsonl"
        self.all: list[dict[str, Any]] = []
        if self.path.exists():
            lines = self.path.read_text("utf8").splitlines()
            self.all = [json.loads(line) for line in lines if line.strip()]

    def has(self, **keys: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in keys.items()) for row in self.all)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(dict(row))


def rounded(estimate: tuple[float, float, float]) -> dict[str, float | None]:
    """Estimate and interval as columns; what there is too little for is null."""
    return {
        name: None if value != value else round(value, 4)
        for name, value in zip(("estimate", "low", "high"), estimate, strict=True)
    }
