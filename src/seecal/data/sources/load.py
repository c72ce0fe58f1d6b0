"""Data sets of many formats as one record type: ``load_records("data.json")``. ``docs/data.md`` shows every format.

path or data set → readers (rows) → formats (messages, images) → records (checked) → datasets.Dataset
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..options import check_on_bad
from ..paths import MissingImage, RecordError, show
from .formats import FORMATS, detect, known_formats
from .readers import READERS, Rows, files_of, read_dataset, saved_dataset
from .records import FEATURES, make_record

logger = logging.getLogger(__name__)

# Rows looked at to tell the format, before giving up.
_PEEK = 1000
# Records, and bytes of images in them, that are written at once.
_WRITE = 1000
_WRITE_BYTES = 1 << 26
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class LoadReport:
    """What became of the records of the last pass: ``accepted + rejected == total``.

    Attributes:
        accepted: how many became records.
        reasons: of those left out, in order: (how errors call it, why).
        format: the name of the format that was read.
    """

    accepted: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    format: str | None = None

    @property
    def rejected(self) -> int:
        return len(self.reasons)

    @property
    def total(self) -> int:
        return self.accepted + self.rejected

    def clear(self) -> None:
        self.accepted = 0
        self.reasons.clear()


def load_records(
    data: Any,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    streaming: bool = False,
    on_bad: str = "error",
    report: LoadReport | None = None,
) -> Dataset | IterableDataset:
    """A data set of records: columns ``id``, ``messages``, ``images``.

    Args:
        data: the path of a file (JSON, JSONL, CSV, TSV, Parquet) or of a folder (images with metadata.csv or .jsonl,
            Parquet files, a saved data set), or a ``datasets`` set, or a list of rows.
        format: a name in :data:`seecal.FORMATS`. None: told by the keys of the first rows.
        image_root: the folder that image paths start from and may not leave. None: the folder of the data file; a data set
            in memory has none.
        streaming: True returns an IterableDataset that reads while it is iterated. Otherwise the records are written
            to an Arrow file in the temporary folder, memory-mapped, and removed when Python ends. A ``datasets``
            IterableDataset is always streamed.
        on_bad: ``"error"`` stops at the first bad record. ``"skip"`` leaves it out, logs why by its id, and counts it.
        report: filled in with the counts; when streaming, anew by each pass, in the process that reads.

    Returns:
        A record's ``id`` is its own, or ``<file name>:<index>``. Images stay paths or encoded bytes.

    Raises:
        FileNotFoundError: no such data, or (``on_bad="error"``) no such image.
        ValueError: an unknown format (listing what was found and what is known), no usable record, or
            (``on_bad="error"``) a bad record: one line with file, record, key and what to do; no room in the temporary
            folder.
    """
    check_on_bad(on_bad)
    source = _open(data, image_root)
    report = LoadReport() if report is None else report
    report.format = _format_of(source, format)
    records = partial(_records, source=source, format=report.format, skip=on_bad == "skip", report=report)
    if streaming or isinstance(data, IterableDataset):
        # Parts go by in a list: `datasets` gives each worker its share of it.
        return IterableDataset.from_generator(records, features=FEATURES, gen_kwargs={"parts": source.parts})
    return _to_arrow(records(parts=source.parts))


@dataclass(frozen=True)
class _Source:
    """What was opened: ``parts`` are paths of files, or one data set in memory."""

    where: str
    parts: list[Any]
    root: str | None


def _open(data: Any, image_root: str | Path | None) -> _Source:
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise FileNotFoundError(
            f"image_root={str(image_root)!r}: no such folder. Set it to the one that holds the images."
        )
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"a {type(data).__name__} with {', '.join(map(str, data))}: pass one of them, as in data['train']."
        )
    if not isinstance(data, (str, Path)):
        if not isinstance(data, (Dataset, IterableDataset, list)):
            raise ValueError(f"data is a {type(data).__name__}: expected a path, a datasets set or a list of rows")
        return _Source("the data set", [data], None if root is None else os.path.realpath(root))
    path = Path(data)
    saved = saved_dataset(path) if path.is_dir() else None
    parts: list[Any] = files_of(path) if saved is None else [saved]
    folder = root or (path if path.is_dir() else path.parent)
    return _Source(str(path), parts, os.path.realpath(folder))


def _rows(part: Any) -> Rows:
    return READERS[part.suffix.lower()](part) if isinstance(part, Path) else read_dataset(part)


def _format_of(source: _Source, format: str | None) -> str:
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not known. Known formats are {known_formats()}.")
        return format
    seen, keys, first = 0, set[str](), None
    for row in islice((row for part in source.parts for _, row in _rows(part)), _PEEK):
        seen, first = seen + 1, first or row
        if isinstance(row, dict):
            name = detect(row)
            if name is not None:
                return name
            keys.update(map(str, row))
    if not seen:
        raise ValueError(f"{source.where}: holds no records.")
    if isinstance(first, RecordError) and not keys:
        raise ValueError(f"{source.where}: no readable record among the first {seen}. The first: {first}")
    raise ValueError(
        f"{source.where}: no known format has the keys found: {_listed(keys)}. Known formats are {known_formats()}."
        " Rename the keys, or set format=..."
    )


def _listed(keys: set[str]) -> str:
    return ", ".join(show(key, 40) for key in sorted(keys)[:20]) + (", …" if len(keys) > 20 else "") or "none"


def _records(
    parts: list[Any], source: _Source, format: str, skip: bool, report: LoadReport
) -> Iterator[dict[str, Any]]:
    """The good records of ``parts``; a bad one stops, or is counted and logged."""
    report.clear()
    convert, uses = FORMATS[format].convert, FORMATS[format].uses
    unused: set[str] = set()
    for part in parts:
        name = part.name if isinstance(part, Path) else "dataset"
        for index, (place, row) in enumerate(_rows(part)):
            record_id = f"{name}:{index}"
            called = f"{name}: record {show(record_id)} ({place})"
            try:
                if isinstance(row, RecordError):
                    raise row
                record_id = _id_of(row, record_id)
                called = f"{name}: record {show(record_id)} ({place})"
                if uses is not None and not row.keys() <= uses:
                    unused.update(map(str, row.keys() - uses - {"id"}))
                messages, images = convert(row)
                record = make_record(record_id, messages, images, source.root)
            except RecordError as error:
                if not skip:
                    raise type(error)(f"{called}: {error}") from None
                report.reasons.append((called, str(error)))
                logger.warning("left out %s: %s", called, error)
                continue
            report.accepted += 1
            yield record
    if unused:
        logger.warning("%s: left out the keys %s, which %s has no use for", source.where, _listed(unused), format)
    if report.rejected:
        logger.warning("%s: %d of %d records left out", source.where, report.rejected, report.total)
    if not report.accepted and len(parts) == len(source.parts):  # a worker's share may well hold none
        why = f" The first: {report.reasons[0][0]}: {report.reasons[0][1]}" if report.reasons else ""
        raise ValueError(f"{source.where}: not one of {report.total} records can be used.{why}")


@dataclass(frozen=True)
class Located:
    """One row of the data and where it stands: what it became, or why it cannot be used.

    Attributes:
        source: the name of its file; "dataset" for one in memory.
        row: its place there, bad rows counted.
        record: ``id``, ``messages``, ``images``; None if it cannot be used, or was not asked for.
        error: one line with file, record, key and what to do; None if it can be used.
    """

    source: str
    row: int
    record: dict[str, Any] | None = None
    error: str | None = None


class LocatedRecords:
    """Every row of the data with its place, for callers that have to find it again. Arguments as of
    :func:`load_records`; nothing is written, and each pass reads anew.
    """

    def __init__(self, data: Any, *, format: str | None = None, image_root: str | Path | None = None) -> None:
        self._source = _open(data, image_root)
        self.where, self.root = self._source.where, self._source.root
        self.format = _format_of(self._source, format)

    def rows(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Located]:
        """The rows in order. One whose number ``wanted`` does not want is only counted: it costs no look at its images."""
        number = 0
        for part in self._source.parts:
            name = part.name if isinstance(part, Path) else "dataset"
            for index, (place, row) in enumerate(_rows(part)):
                yield self._located(name, index, place, row) if wanted(number) else Located(name, index)
                number += 1

    def _located(self, name: str, index: int, place: str, row: Any) -> Located:
        record_id = f"{name}:{index}"
        try:
            if isinstance(row, RecordError):
                raise row
            record_id = _id_of(row, record_id)
            messages, images = FORMATS[self.format].convert(row)
            return Located(name, index, make_record(record_id, messages, images, self.root))
        except RecordError as error:
            return Located(name, index, error=f"{name}: record {show(record_id)} ({place}): {error}")


def _id_of(row: dict[str, Any], default: str) -> str:
    value = row.get("id", default)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RecordError(f"key 'id': {show(value)} is neither a text nor a whole number.")
    try:
        return str(value).encode().decode()
    except ValueError:  # half a surrogate pair, or a number of thousands of digits
        raise RecordError("key 'id': no valid Unicode or too long a number. Correct it.") from None


# Arrow files of this process. They are mapped, not read, and removed when Python ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _to_arrow(records: Iterable[dict[str, Any]]) -> Dataset:
    """The records in an Arrow file of their own."""
    folder = tempfile.TemporaryDirectory(prefix="seecal-records-")
    path = str(Path(folder.name) / "records.arrow")
    schema = FEATURES.arrow_schema
    try:
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for batch in _batches(records):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ValueError(
            f"the records cannot be written to {folder.name} ({os.strerror(error.errno)}). Set TMPDIR to a folder with "
            "room, or streaming=True, which writes none."
        ) from None
    _FOLDERS.append(folder)
    return Dataset.from_file(path)


def _batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for record in records:
        batch.append(record)
        size += sum(len(image["bytes"] or b"") for image in record["images"])
        if len(batch) == _WRITE or size >= _WRITE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


__all__ = ["FEATURES", "LoadReport", "MissingImage", "RecordError", "load_records"]
