"""Rows out of files: one small reader per kind of file.

A reader yields ``(place, row)`` in the file's order. A row that cannot be read is a :class:`RecordError` in its place, so
that counting goes on; a file that cannot be read at all raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import pyarrow.parquet

from ..paths import RecordError, show
from . import bounds
from .rows import Rows, as_row, reason
from .tables import UTF_8, encoding_of, read_csv
from .tars import read_tar

# Rows of an Arrow table turned into Python at once; they may hold encoded images.
_BATCH = 64
_CHUNK = 1 << 16
_FEW_BRACKETS = 200  # a row with no more is not nested too deeply for anything that walks through it
_LARGEST_CHUNK = 1 << 23
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_json(path: Path) -> Rows:
    """A list of objects, read entry by entry; or one object a line under the wrong name."""
    start = _first_sign(path)
    if start == "{":
        _, first = next(read_jsonl(path))
        if isinstance(first, RecordError):
            raise ValueError(
                f"{path}: it starts with an object, and its first line alone is not one. Write a list of records [...], or "
                "one record a line (JSONL)."
            )
        yield from read_jsonl(path)
        return
    if not start:
        return
    if start != "[":
        raise ValueError(
            f"{path}: neither a list of records [...] nor one record a line (JSONL). Check what the file is."
        )
    with path.open(encoding=encoding_of(path)) as text:
        index = 0
        try:
            for row in _entries(text):
                yield f"entry {index}", as_row(row)
                index += 1
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not valid JSON in entry {index} ({reason(error)}). Correct the file, or write one record a "
                "line (JSONL), where one bad line does not hide the others."
            ) from None


def _entries(file: TextIO) -> Iterator[Any]:
    """The entries of a JSON list, without holding more than a few of them."""
    decode = json.JSONDecoder().raw_decode
    buffer, place, size, opened = "", 0, _CHUNK, False
    while True:
        place = _BLANKS.match(buffer, place).end()  # type: ignore[union-attr]  # it matches nothing too
        try:
            if not opened:
                opened, place = _past(buffer, place, "["), place + 1
                continue
            if buffer[place] == "]":
                break
            entry, end = decode(buffer, place)
            # What follows an entry shows that it is whole: the buffer may end in the middle of a number
            end = _BLANKS.match(buffer, end).end()  # type: ignore[union-attr]
            last = buffer[end] == "]"
            _past(buffer, end, "]" if last else ",")
        except (ValueError, IndexError) as error:
            if len(buffer) - place > bounds.MAX_BYTES or bounds.many_values(buffer, 2 * bounds.MAX_VALUES):
                raise bounds.too_long() from None
            more = file.read(size)
            if not more:
                what = "it ends in the middle" if isinstance(error, IndexError) else getattr(error, "msg", error)
                raise ValueError(f"{what}; it begins {show(buffer[place : place + 40])}") from None
            buffer, place, size = buffer[place:] + more, 0, min(2 * size, _LARGEST_CHUNK)
            continue
        yield entry
        place, size = end if last else end + 1, _CHUNK
    rest = buffer[place + 1 :]
    while rest:
        if rest.strip():
            raise ValueError("something follows the list")
        rest = file.read(_CHUNK)


def _past(buffer: str, place: int, sign: str) -> bool:
    if buffer[place] != sign:
        raise ValueError(f"{show(buffer[place : place + 20])} where {sign!r} is due")
    return True


def is_lines(path: Path) -> bool:
    """Whether a JSON file has one object a line, instead of a list."""
    return _first_sign(path) == "{"


def _first_sign(path: Path) -> str:
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        return file.read(_CHUNK).lstrip(" \t\r\n")[:1]


def lines_of(path: Path) -> Iterator[tuple[int, str | bytes | None]]:
    """(number, line with its end) of those that are not blank; None for one that is out of bounds.

    Lines are bytes where the file is UTF-8, else texts.
    """
    encoding = encoding_of(path)
    with path.open("rb") if encoding == UTF_8 else path.open(encoding=encoding, newline="") as file:
        number = 0
        while (line := bounds.next_line(file)) is None or line:
            number += 1
            if line is None or bounds.many_values(line):
                yield number, None
            elif _stripped(number, line):
                yield number, line


def _stripped(number: int, line: Any) -> Any:
    return line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 and isinstance(line, bytes) else None)


def read_jsonl(path: Path) -> Rows:
    """One object a line; blank lines are no records."""
    for number, line in lines_of(path):
        if line is None:
            yield f"line {number}", bounds.too_long()
            continue
        text = _stripped(number, line)
        try:
            row: Any = _loaded(text)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", RecordError(f"not valid JSON ({reason(error)}). Correct or delete the line.")
        else:
            yield f"line {number}", row if _is_plain(text, row) else as_row(row)


def _loaded(text: str | bytes) -> Any:
    """``json.loads``; where it would find out that the bytes are UTF-8, without looking."""
    if isinstance(text, bytes) and text.startswith(b"{") and b"\0" not in text:
        text = text.decode("utf-8", "surrogatepass")
    return json.loads(text)


def _is_plain(text: str | bytes, row: Any) -> bool:
    """Whether the row is what :func:`as_row` would make of it, told by its text: it has no null and no NaN, and is not
    nested deeply."""
    if not isinstance(text, bytes) or not isinstance(row, dict):
        return False
    return b"null" not in text and b"NaN" not in text and text.count(b"[") + text.count(b"{") < _FEW_BRACKETS


def read_parquet(path: Path) -> Rows:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: not a Parquet file ({reason(error)}). Write it again, or name it by what it is."
        ) from None
    with file:
        rows = bounds.rows_at_once(path, file.metadata)
        try:
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            yield from _arrow_rows(file.iter_batches(batch_size=rows), features)
        except (pyarrow.ArrowException, OSError, MemoryError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({reason(error)}). Write the Parquet file again.") from None


def read_dataset(data: Any) -> Rows:
    """Rows of a Dataset, an IterableDataset or a list, images left encoded; of a set with a transform, what that makes."""
    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":
            yield from _transformed_rows(data)
            return
        yield from _arrow_rows(data.with_format("arrow").iter(_BATCH), data.features)
        return
    features = data.features if isinstance(data, datasets.IterableDataset) else None
    if features is not None:
        data = data.decode(False)
    for index, row in enumerate(data):
        yield f"entry {index}", as_row(row, features)


def _transformed_rows(data: datasets.Dataset) -> Rows:
    for index in range(len(data)):
        try:
            row = data[index]
        except (ValueError, OSError) as error:  # an image of the row that `datasets` decodes for the transform
            row = RecordError(
                f"the set's transform cannot make it ({reason(error)}). Correct the record or the transform."
            )
        yield f"row {index}", row if isinstance(row, RecordError) else as_row(row)


def _arrow_rows(batches: Iterable[Any], features: Any) -> Rows:
    index = 0
    for batch in batches:
        # Bytes of an Arrow table are told before any of it becomes Python objects
        whole = batch.nbytes <= bounds.MAX_BYTES
        for place in range(1 if whole else batch.num_rows):
            part = batch if whole else batch.slice(place, 1)
            fits = whole or part.nbytes <= bounds.MAX_BYTES
            for row in part.to_pylist() if fits else [None]:
                yield f"row {index}", as_row(row, features) if fits else bounds.too_long()
                index += 1


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".tar": read_tar,
}
