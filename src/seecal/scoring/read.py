"""Reading a folder of scores, record by record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from .manifest import Manifest, read_manifest
from .shards import Skipped, whole


@dataclass(frozen=True)
class RecordScores:
    """The scores of one record.

    Attributes:
        source, row, record: its place in the data, and its id.
        columns: name -> [N] array of its label tokens in order: Parquet's columns, those that were asked for.
    """

    source: str
    row: int
    record: str
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def read_scores(folder: str | Path, columns: Sequence[str] | None = None) -> Iterator[RecordScores | Skipped]:
    """The scores of every record in order and, after those of its shard, each row of the data that has none.

    One shard at a time is in memory.

    Args:
        folder: what :func:`seecal.score` wrote.
        columns: of its columns, those that are wanted beside ``source``, ``row`` and ``record``; None: all.

    Raises:
        ValueError: no scores, a shard that is missing or damaged, or a column that was not written.
    """
    manifest = read_manifest(folder)
    place = ["source", "row", "record"]
    wanted = [name for name in (manifest.columns if columns is None else columns) if name not in place]
    if unknown := [name for name in wanted if name not in manifest.columns]:
        need = " Score with --logprobs." if unknown[0].startswith("logprob") else ""
        raise ValueError(f"{folder}: has no column {unknown[0]!r}; it has {', '.join(manifest.columns)}.{need}")
    return _records(Path(folder), manifest, place, wanted)


def _records(folder: Path, manifest: Manifest, place: list[str], wanted: list[str]) -> Iterator[RecordScores | Skipped]:
    for path, note in whole(folder, manifest):
        table = pyarrow.parquet.read_table(path, columns=[*place, *wanted])
        for record in _cut(table, place, wanted):
            if not 0 <= record.row < manifest.data["rows"]:
                raise ValueError(f"{path}: scores of row {record.row} of {manifest.data['rows']}. Score again.")
            yield record
        yield from note.skipped


def _cut(table: Any, place: list[str], wanted: list[str]) -> Iterator[RecordScores]:
    if not table.num_rows:
        return
    sources, rows, records = (table[name].combine_chunks() for name in place)
    numbers = rows.to_numpy()
    names = np.asarray(sources.dictionary_encode().indices)
    changes = np.flatnonzero((numbers[1:] != numbers[:-1]) | (names[1:] != names[:-1])) + 1
    arrays = {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in wanted}
    for begin, end in zip([0, *changes], [*changes, len(numbers)], strict=True):
        parts = {name: values[begin:end] for name, values in arrays.items()}
        yield RecordScores(sources[int(begin)].as_py(), int(numbers[begin]), records[int(begin)].as_py(), parts)
