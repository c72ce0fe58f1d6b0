"""Rows out of files: one small reader per kind of file, and what a folder holds.

A reader yields ``(place, row)`` in the file's order. A row that cannot be read is a :class:`RecordError` in its place, so
that counting goes on; a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import pyarrow.parquet

from ..paths import RecordError, show

Rows = Iterator[tuple[str, "dict[str, Any] | RecordError"]]
# Rows of a Parquet file or an Arrow table turned into Python at once; they may hold encoded images.
_BATCH = 64
_CHUNK = 1 << 16
_BLANKS = re.compile(r"[ \t\r\n]*")
_LISTING = 12


def read_json(path: Path) -> Rows:
    """A list of objects, read entry by entry; or one object a line under the wrong name."""
    with path.open("rb") as file:
        start = file.read(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start == b"{":
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
    if start != b"[":
        raise ValueError(
            f"{path}: neither a list of records [...] nor one record a line (JSONL). Check what the file is."
        )
    with path.open(encoding="utf-8-sig") as text:
        index = 0
        try:
            for row in _entries(text):
                yield f"entry {index}", _as_row(row)
                index += 1
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not valid JSON in entry {index} ({_reason(error)}). Correct the file, or write one record a "
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
            more = file.read(size)
            if not more:
                what = "it ends in the middle" if isinstance(error, IndexError) else getattr(error, "msg", error)
                raise ValueError(f"{what}; it begins {show(buffer[place : place + 40])}") from None
            buffer, place, size = buffer[place:] + more, 0, 2 * size
            continue
        yield entry
        place, size = end if last else end + 1, _CHUNK
    if (buffer[place + 1 :] + file.read()).strip():
        raise ValueError("something follows the list")


def _past(buffer: str, place: int, sign: str) -> bool:
    if buffer[place] != sign:
        raise ValueError(f"{show(buffer[place : place + 20])} where {sign!r} is due")
    return True


def read_jsonl(path: Path) -> Rows:
    """One object a line; blank lines are no records."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None)
            if not text:
                continue
            try:
                row: Any = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", RecordError(f"not valid JSON ({_reason(error)}). Correct or delete the line.")
            else:
                yield f"line {number}", _as_row(row)


def read_csv(path: Path) -> Rows:
    """Comma-separated (``.tsv``: tab-separated) with a header; empty fields are left out."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield f"line {reader.line_num}", RecordError(f"not valid CSV ({error}). Correct or delete the line.")
                continue
            if fields is None:
                return
            if header is None:
                header = [name.strip() for name in fields]
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice:
                    raise ValueError(f"{path}: its header names {', '.join(map(show, twice))} twice. Rename one.")
            elif fields:
                yield f"line {reader.line_num}", _csv_row(header, fields)


def _csv_row(header: list[str], fields: list[str]) -> dict[str, Any] | RecordError:
    if len(fields) != len(header):
        return RecordError(
            f"the number of fields is {len(fields)}, but the header names {len(header)}. Quote text with commas "
            "or line breaks."
        )
    if any("\udc80" <= letter <= "\udcff" for field in fields if not field.isascii() for letter in field):
        return RecordError("not valid UTF-8. Save the file as UTF-8.")
    return {name: field for name, field in zip(header, fields, strict=True) if field}


def read_parquet(path: Path) -> Rows:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: not a Parquet file ({_reason(error)}). Write it again, or name it by what it is."
        ) from None
    with file:
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
        yield from _arrow_rows(file.iter_batches(batch_size=_BATCH), features)


def read_dataset(data: Any) -> Rows:
    """Rows of a Dataset, an IterableDataset or a list, images left encoded."""
    if isinstance(data, datasets.Dataset):
        yield from _arrow_rows(data.with_format("arrow").iter(_BATCH), data.features)
        return
    features = data.features if isinstance(data, datasets.IterableDataset) else None
    if features is not None:
        data = data.decode(False)
    for index, row in enumerate(data):
        yield f"entry {index}", _as_row(row, features)


def _arrow_rows(batches: Iterable[Any], features: Any) -> Rows:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"row {index}", _as_row(row, features)
            index += 1


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
# What describes the images of a folder, in the order in which it is looked for.
_CAPTIONS = tuple(
    f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in (".jsonl", ".csv", ".json", ".tsv")
)


def files_of(path: Path) -> list[Path]:
    """The data files that ``path`` means: itself, or a folder's.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no file that a reader knows, or more than one that could be meant; lists what is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Check the path of the data.")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(
                f"{path}: no reader for {path.suffix or 'a file without suffix'!r}. Known: {', '.join(READERS)}."
            )
        return [path]
    for name in _CAPTIONS:
        if (path / name).is_file():
            return [path / name]
    here = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    known = [entry for entry in here if entry.suffix.lower() in READERS and entry.is_file()]
    if known and (len(known) == 1 or all(entry.suffix.lower() == ".parquet" for entry in known)):
        return known
    found = ", ".join(entry.name for entry in (known or here)[:_LISTING]) or "nothing"
    if known:
        raise ValueError(f"{path}: several data files ({found}). Name one; several sets are mixed by seecal.mix.")
    raise ValueError(
        f"{path}: found {found}; known are {', '.join(_CAPTIONS)}, Parquet files, one file of {', '.join(READERS)}, or "
        "what Dataset.save_to_disk writes."
    )


def saved_dataset(path: Path) -> datasets.Dataset | None:
    """The set that ``Dataset.save_to_disk`` wrote to the folder ``path``; None if it is something else."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(f"{path}: a DatasetDict with {', '.join(splits)}. Name the folder of one of them.")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return datasets.Dataset.load_from_disk(str(path))
    return None


def _as_row(row: Any, features: Any = None) -> dict[str, Any] | RecordError:
    if not isinstance(row, dict):
        return RecordError(f"{show(row)} is not an object with keys.")
    try:
        return without_nulls(row if features is None or not _holds_json(features) else _with_json(row, features))
    except (RecursionError, ValueError) as error:
        return RecordError(f"it cannot be read ({_reason(error)}). Correct or delete the record.")


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(_holds_json(inner) for inner in feature.values())
    return isinstance(feature, datasets.Json) or _holds_json(getattr(feature, "feature", None) or {})


def _with_json(value: Any, feature: Any) -> Any:
    """``value`` with what `datasets` keeps as JSON text (columns of mixed types) read: only images stay encoded."""
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _with_json(inner, feature.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_json(inner, getattr(feature, "feature", None)) for inner in value]
    return value


def without_nulls(value: Any) -> Any:
    """``value`` without the keys that are None: Arrow puts every key of any row into all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return " ".join(str(error).split())[:160]
