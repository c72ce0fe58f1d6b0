"""A data set without some of its rows, in the format that it came in, perhaps with weights of its tokens beside. Rows are
neither converted nor reordered."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets

from ..data.paths import RecordError
from ..data.sources.folders import files_of, saved_dataset
from ..data.sources.readers import read_json, read_jsonl
from ..data.sources.records import WEIGHTS

_LINES = (".jsonl", ".ndjson")
_SEPARATED = (".csv", ".tsv")
_WRITTEN = (".json", *_LINES, ".parquet", *_SEPARATED)
_AS_JSON = "backslashreplace"  # half a surrogate pair, in a key that nothing reads: JSON escapes it as Python does
# For each row that stays: its ``weights`` and ``weight_ids``
Weights = Iterator[dict[str, list[Any]]] | None


def write_back(data: Any, out: Path, keep: np.ndarray, weights: Weights = None) -> None:
    """Writes ``data`` to ``out`` with the rows for which ``keep`` [rows] is True.

    Args:
        data: the path of a file or folder that :func:`seecal.load_records` reads, or a ``datasets`` set.
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
    if len(files) > 1:
        _aside(out, lambda aside: _parquet_files(files, aside, keep, weights))
        return
    (file,) = files
    if out.suffix.lower() != file.suffix.lower():
        raise ValueError(
            f"{out}: the data is {file.suffix}, and is written back as that. Set --out to a name{file.suffix}"
        )
    _aside(out, lambda aside: _file(file, aside, iter(keep.tolist()), weights))


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


def _parquet_files(files: list[Path], folder: Path, keep: np.ndarray, weights: Weights) -> None:
    folder.mkdir()
    kept = iter(keep.tolist())
    for file in files:
        _parquet(file, folder / file.name, kept, weights)


def _file(file: Path, out: Path, keep: Iterator[bool], weights: Weights) -> None:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        _parquet(file, out, keep, weights)
    elif suffix in _LINES or (suffix == ".json" and _is_lines(file)):
        _json_lines(file, out, keep, weights)
    elif suffix == ".json":
        _json_list(file, out, keep, weights)
    else:
        _csv(file, out, keep, "\t" if suffix == ".tsv" else ",")


def _is_lines(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def _json_lines(file: Path, out: Path, keep: Iterator[bool], weights: Weights) -> None:
    if weights is not None:
        with out.open("w", encoding="utf-8", errors=_AS_JSON) as text:
            for (_, row), kept in zip(read_jsonl(file), keep, strict=False):
                if kept:
                    text.write(json.dumps(_with(row, weights), ensure_ascii=False) + "\n")
        return
    with file.open("rb") as lines, out.open("wb") as written:
        for number, line in enumerate(lines):
            if line.strip(b"\xef\xbb\xbf \t\r\n" if number == 0 else None) and next(keep):
                written.write(line if line.endswith(b"\n") else line + b"\n")


def _json_list(file: Path, out: Path, keep: Iterator[bool], weights: Weights) -> None:
    """Entry by entry; keys that are null are left out, as they are when the data is read."""
    with out.open("w", encoding="utf-8", errors=_AS_JSON) as written:
        between = "[\n"
        for (_, row), kept in zip(read_json(file), keep, strict=False):
            if kept:
                row = row if weights is None else _with(row, weights)
                written.write(between + json.dumps(row, ensure_ascii=False))
                between = ",\n"
        written.write("[]\n" if between == "[\n" else "\n]\n")


def _with(row: dict[str, Any] | RecordError, weights: Iterator[dict[str, list[Any]]]) -> dict[str, Any]:
    assert isinstance(row, dict), "a row that cannot be read has no scores, and goes"
    return {**row, **next(weights)}


def _csv(file: Path, out: Path, keep: Iterator[bool], delimiter: str) -> None:
    def opened(path: Path, mode: str) -> TextIO:
        encoding = "utf-8-sig" if mode == "r" else "utf-8"
        return path.open(mode, encoding=encoding, errors="surrogateescape", newline="")  # type: ignore[return-value]

    with opened(file, "r") as lines, opened(out, "w") as written:
        reader: Any = csv.reader(lines, delimiter=delimiter, strict=True)
        writer = csv.writer(written, delimiter=delimiter, lineterminator="\n")
        writer.writerow(next(reader))
        while True:
            try:
                fields = next(reader, None)
            except csv.Error:
                next(keep)  # a row that cannot be read has no scores
                continue
            if fields is None:
                return
            if fields and next(keep):
                writer.writerow(fields)


def _parquet(file: Path, out: Path, keep: Iterator[bool], weights: Weights) -> None:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        schema, added = parquet.schema_arrow, list(WEIGHTS.arrow_schema) if weights is not None else []
        for column in added:
            schema = schema.append(column)
        with pyarrow.parquet.ParquetWriter(out, schema) as written:
            for batch in parquet.iter_batches(batch_size=64):
                mask = [next(keep) for _ in range(batch.num_rows)]
                chosen = batch.filter(pyarrow.array(mask))
                rows = [next(weights) for _ in range(chosen.num_rows)] if weights is not None else []
                more = [pyarrow.array([row[column.name] for row in rows], column.type) for column in added]
                written.write_batch(pyarrow.RecordBatch.from_arrays([*chosen.columns, *more], schema=schema))
