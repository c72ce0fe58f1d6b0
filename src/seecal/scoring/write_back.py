"""A data set without some of its rows, in the format that it came in, perhaps with weights of its tokens beside. Rows are
neither converted nor reordered."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets

from ..constants import AS_JSON
from ..data.paths import RecordError
from ..data.sources.folders import files_of, saved_dataset
from ..data.sources.readers import is_lines, lines_of, read_json, read_jsonl
from ..data.sources.records import WEIGHTS
from ..data.sources.tables import UTF_8, Table, encoding_of, has_mark

_LINES = (".jsonl", ".ndjson")
_SEPARATED = (".csv", ".tsv")
_WRITTEN = (".json", *_LINES, ".parquet", *_SEPARATED)
# For each row that stays: its ``weights`` and ``weight_ids``
Weights = Iterator[dict[str, list[Any]]] | None


def write_back(data: Any, out: Path, keep: np.ndarray, weights: Weights = None) -> None:
    """Writes ``data`` to ``out`` with the rows for which ``keep`` [rows] is True.

    Args:
        data: the path of a file or folder that :func:`seecal.load_records` reads, or a ``datasets`` set; of one with a
            transform the rows that it is given.
        weights: the columns ``weights`` and ``weight_ids`` of the rows that stay, in order. JSON and JSONL then lose keys
            that are null. None: rows stay as they are.

    Raises:
        ValueError: ``out`` has another suffix than the data, data that has no format of its own, or weights for a format
            that holds no lists (CSV, TSV).
    """
    saved = data if isinstance(data, Dataset) else None
    if saved is None and not isinstance(data, (str, Path)):
        raise ValueError(
            f"data is a {type(data).__name__}, which has no format to be written in. Write it to a file and score that."
        )
    if saved is None and Path(data).is_dir():
        saved = saved_dataset(Path(data))
    out.parent.mkdir(parents=True, exist_ok=True)
    if saved is not None:
        if saved.format["type"] == "custom":  # no folder keeps a transform
            saved = saved.with_format(None)
        chosen = saved.select(np.flatnonzero(keep))
        if weights is not None:
            chosen = concatenate_datasets([chosen, Dataset.from_list(list(weights), features=WEIGHTS)], axis=1)
        _aside(out, lambda aside: chosen.save_to_disk(str(aside)))
        return
    files = files_of(Path(data))
    if shard := next((file for file in files if file.suffix.lower() not in _WRITTEN), None):
        raise ValueError(
            f"{shard.name}: a {shard.suffix} shard is not written back. Write its records as JSONL, with the images as "
            "files, or as Parquet, and score that."
        )
    if weights is not None and any(file.suffix.lower() in _SEPARATED for file in files):
        raise ValueError(
            f"{files[0].name}: a {files[0].suffix} file holds no lists, so no weights of tokens. Write the data as JSONL "
            "or Parquet and score that, or filter by record, without tokens."
        )
    suffix = files[0].suffix
    if len(files) == 1 and out.suffix.lower() != suffix.lower():
        raise ValueError(f"{out}: the data is {suffix}, and is written back as that. Set --out to a name{suffix}")
    _aside(out, lambda aside: _files(Path(data), files, aside, _Keep(Path(data), keep), weights))


def _aside(out: Path, write: Callable[[Path], Any]) -> None:
    """What has the name is whole."""
    aside = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        write(aside)
        aside.replace(out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


class _Keep:
    """Whether the next row stays, called once a row. One that cannot be read may be to stay, among those that lost: it is
    written only where it is a line of its own.

    Raises:
        ValueError: more rows than were scored; from :meth:`check_end`: fewer.
    """

    def __init__(self, data: Path, keep: np.ndarray) -> None:
        self._data, self._rows, self._keep = data, len(keep), iter(keep.tolist())

    def __call__(self) -> bool:
        kept = next(self._keep, None)
        if kept is None:
            raise ValueError(
                f"{self._data}: it has more than the {self._rows} records that were scored. Score it again."
            )
        return bool(kept)

    def check_end(self) -> None:
        if left := len(list(self._keep)):
            raise ValueError(
                f"{self._data}: it has {self._rows - left} records, but {self._rows} were scored. Score it again."
            )


def _files(data: Path, files: list[Path], out: Path, keep: _Keep, weights: Weights) -> None:
    if len(files) == 1:
        _file(files[0], out, keep, weights)
    else:
        out.mkdir()
        for file in files:
            _parquet(file, out / file.name, keep, weights)
    keep.check_end()


def _file(file: Path, out: Path, keep: _Keep, weights: Weights) -> None:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        _parquet(file, out, keep, weights)
    elif suffix in _LINES or (suffix == ".json" and is_lines(file)):
        _json_lines(file, out, keep, weights)
    elif suffix == ".json":
        _json_list(file, out, keep, weights)
    else:
        _table(file, out, keep)


def _encoding(file: Path) -> str:
    """In which the rows of a text file are written: its own, with a mark at the start where it has one."""
    encoding = encoding_of(file)
    return "utf-8" if encoding == UTF_8 and not has_mark(file) else encoding


def _json_lines(file: Path, out: Path, keep: _Keep, weights: Weights) -> None:
    if weights is not None:
        with out.open("w", encoding=_encoding(file), errors=AS_JSON) as text:
            for _, row in read_jsonl(file):
                if keep():
                    text.write(json.dumps(_with(row, weights), ensure_ascii=False) + "\n")
        return
    encoding = encoding_of(file)
    opened: Any = out.open("wb") if encoding == UTF_8 else out.open("w", encoding=encoding, newline="")
    with opened as written:
        for _, line in lines_of(file):
            if keep() and line is not None:
                end: Any = b"\n" if isinstance(line, bytes) else "\n"
                written.write(line if line.endswith(end) else line + end)


def _json_list(file: Path, out: Path, keep: _Keep, weights: Weights) -> None:
    """Entry by entry; keys that are null are left out, as they are when the data is read."""
    with out.open("w", encoding=_encoding(file), errors=AS_JSON) as written:
        between = "[\n"
        for _, row in read_json(file):
            if keep() and isinstance(row, dict):
                row = row if weights is None else _with(row, weights)
                written.write(between + json.dumps(row, ensure_ascii=False))
                between = ",\n"
        written.write("[]\n" if between == "[\n" else "\n]\n")


def _with(row: dict[str, Any] | RecordError, weights: Iterator[dict[str, list[Any]]]) -> dict[str, Any]:
    assert isinstance(row, dict), "a row that cannot be read has no scores, and goes"
    return {**row, **next(weights)}


def _table(file: Path, out: Path, keep: _Keep) -> None:
    """The text of each row as it is: what separates its fields, quotes and line ends too."""
    text = io.StringIO()
    table, begun = Table(file, text), False
    with table.open(out, "w", _encoding(file)) as written:
        for _, fields in table.rows():
            readable = not isinstance(fields, csv.Error)
            is_header = readable and not begun
            if is_header or (fields and keep() and readable):  # no fields: a blank line
                begun = True
                row = text.getvalue()
                written.write(row if row.endswith(("\n", "\r")) else row + "\n")


def _parquet(file: Path, out: Path, keep: _Keep, weights: Weights) -> None:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        schema, added = parquet.schema_arrow, list(WEIGHTS.arrow_schema) if weights is not None else []
        for column in added:
            schema = schema.append(column)
        with pyarrow.parquet.ParquetWriter(out, schema) as written:
            for batch in parquet.iter_batches(batch_size=64):
                mask = [keep() for _ in range(batch.num_rows)]
                chosen = batch.filter(pyarrow.array(mask))
                rows = [next(weights) for _ in range(chosen.num_rows)] if weights is not None else []
                more = [pyarrow.array([row[column.name] for row in rows], column.type) for column in added]
                written.write_batch(pyarrow.RecordBatch.from_arrays([*chosen.columns, *more], schema=schema))
