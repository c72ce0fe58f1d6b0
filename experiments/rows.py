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

    What stands after the last line's end is of a run that was stopped while it wrote. It is no row, and the next row takes
    its place.

    Args:
        name: of the experiment.
        folder: where ``NAME.jsonl`` lies.

    Raises:
        ValueError: a line that is no row, by its number.
    """

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.jsonl"
        self.all: list[dict[str, Any]] = []
        if self.path.exists():
            whole, _, _ = self.path.read_bytes().rpartition(b"\n")
            self.all = [_row(self.path, number, line) for number, line in enumerate(whole.split(b"\n"), 1) if line]

    def has(self, **keys: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in keys.items()) for row in self.all)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk when this returns. What a stopped run has left of one is taken away first."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.truncate(_end_of_rows(file))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.all.append(json.loads(line))


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: {error}. It is no row: take the line out, its run is then made again"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, line {number}: a {type(row).__name__} and no row: take the line out, its run is then made again"
        )
    return row


def _end_of_rows(file: Any) -> int:
    """Where the last whole line ends, in bytes."""
    file.seek(0)
    return int(file.read().rfind(b"\n")) + 1


def rounded(estimate: tuple[float, float, float]) -> dict[str, float | None]:
    """Estimate and interval as columns; what there is too little for is null."""
    return {
        name: None if value != value else round(value, 4)
        for name, value in zip(("estimate", "low", "high"), estimate, strict=True)
    }
