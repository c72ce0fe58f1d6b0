"""A data set without some of its rows, in the format that it came in. Rows are neither converted nor reordered."""

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
from datasets import Dataset

from ..data.sources.folders import files_of, saved_dataset
from ..data.sources.readers import read_json

_LINES = (".jsonl", ".ndjson")


def write_back(data: Any, out: Path, keep: np.ndarray) -> None:
    """Writes ``data`` to ``out`` with the rows for which ``keep`` [rows] is True.

    Args:
        data: the path of a file or folder that :func:`seecal.load_records` reads, or a ``datasets`` set.

    Raises:
        ValueError: ``out`` has another suffix than the data, or data that has no format of its own.
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
        _aside(out, lambda aside: saved.select(np.flatnonzero(keep)).save_to_disk(str(aside)))
        return
    files = files_of(Path(data))
    if len(files) > 1:
        _aside(out, lambda aside: _parquet_files(files, aside, keep))
        return
    (file,) = files
    if out.suffix.lower() != file.suffix.lower():
        raise ValueError(
            f"{out}: the data is {file.suffix}, and is written back as that. Set --out to a name{file.suffix}"
        )
    _aside(out, lambda aside: _file(file, aside, iter(keep.tolist())))


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


def _parquet_files(files: list[Path], folder: Path, keep: np.ndarray) -> None:
    folder.mkdir()
    kept = iter(keep.tolist())
    for file in files:
        _parquet(file, folder / file.name, kept)


def _file(file: Path, out: Path, keep: Iterator[bool]) -> None:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        _parquet(file, out, keep)
    elif suffix in _LINES or (suffix == ".json" and _is_lines(file)):
        _json_lines(file, out, keep)
    elif suffix == ".json":
        _json_list(file, out, keep)
    else:
        _csv(file, out, keep, "\t" if suffix == ".tsv" else ",")


def _is_lines(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def _json_lines(file: Path, out: Path, keep: Iterator[bool]) -> None:
    with file.open("rb") as lines, out.open("wb") as written:
        for number, line in enumerate(lines):
            if line.strip(b"\xef\xbb\xbf \t\r\n" if number == 0 else None) and next(keep):
                written.write(line if line.endswith(b"\n") else line + b"\n")


def _json_list(file: Path, out: Path, keep: Iterator[bool]) -> None:
    """Entry by entry; keys that are null are left out, as they are when the data is read."""
    with out.open("w", encoding="utf-8") as written:
        between = "[\n"
        for (_, row), kept in zip(read_json(file), keep, strict=False):
            if kept:
                written.write(between + json.dumps(row, ensure_ascii=False))
                between = ",\n"
        written.write("[]\n" if between == "[\n" else "\n]\n")


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


def _parquet(file: Path, out: Path, keep: Iterator[bool]) -> None:
    with (
        pyarrow.parquet.ParquetFile(file) as parquet,
        pyarrow.parquet.ParquetWriter(out, parquet.schema_arrow) as written,
    ):
        for batch in parquet.iter_batches(batch_size=64):
            mask = [next(keep) for _ in range(batch.num_rows)]
            written.write_batch(batch.filter(pyarrow.array(mask)))
