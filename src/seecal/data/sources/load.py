"""Data sets of many formats as one record type: ``load_records("data.json")``. ``docs/data.md`` shows every format.

path or data set → readers (rows) → formats (messages, images) → records (checked) → datasets.Dataset
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

from ..options import check_on_bad
from ..paths import ImageFolders, LostImage, MissingImage, RecordError, show
from .arrow_copy import once_per_machine, write_arrow
from .folders import files_of, saved_dataset
from .formats import FORMATS, check_keys, detect, known_formats
from .quarantine_file import KnownBad
from .readers import READERS, read_dataset
from .records import FEATURES, WEIGHTS, make_record, weights_of
from .reports import KeyTally, LoadReport, listed
from .rows import Rows

logger = logging.getLogger(__name__)

# Rows looked at to tell the format, before giving up.
_PEEK = 1000
Roots = str | Path | Sequence[str | Path] | None
# Looks at a record with what only a model's processor knows; RecordError where it cannot be used
Check = Callable[[Mapping[str, Any]], None]


def load_records(
    data: Any,
    *,
    format: str | None = None,
    image_root: Roots = None,
    streaming: bool = False,
    on_bad: str = "error",
    report: LoadReport | None = None,
    split: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    follow_links: bool = False,
    collator: Any = None,
    skip_records: str | Path | None = None,
) -> Dataset | IterableDataset:
    """A data set of records: columns ``id``, ``messages``, ``images``; ``weights`` and ``weight_ids`` if the data has them.

    Args:
        data: the path of a file (JSON, JSONL, CSV, TSV, Parquet, a WebDataset shard) or of a folder (images with
            metadata.csv or .jsonl, Parquet files, shards, a saved data set), or a ``datasets`` set, or a list of rows.
        format: a name in :data:`seecal.FORMATS`. None: told by the keys of the first rows.
        image_root: the folder, or list of folders, that image paths start from and may not leave; the first that has the
            image is taken. None: the folder of the data file; a data set in memory has none.
        streaming: True returns an IterableDataset that reads while it is iterated. Otherwise the records are written
            to an Arrow file in the temporary folder, memory-mapped, and removed when Python ends. A ``datasets``
            IterableDataset is always streamed.
        on_bad: ``"error"`` stops at the first bad record. ``"skip"`` leaves it out, logs why by its id, and counts it.
        report: filled in with the counts; when streaming, anew by each pass, in the process that reads.
        split: which split of a folder that holds several (train-00000-of-00002.parquet, test.jsonl, val/).
        columns: what keys of the data are called here, as in ``{"image_path": "image"}``; None leaves one out.
        follow_links: whether symbolic links below ``image_root`` may lead out of it. A path still begins inside it.
        collator: the :class:`seecal.VisionCollator` that the records are for: its processor's image tokens inside texts,
            and turns that its chat template refuses, are then found while loading instead of in a batch.
        skip_records: a ``quarantine.jsonl`` that ``seecal check-data`` or a run wrote: the records it names are left out
            and counted, whatever ``on_bad`` says.

    Returns:
        A record's ``id`` is its own, or ``<file name>:<index>``. Images stay paths or encoded bytes; only their headers are
        read.

    Raises:
        FileNotFoundError: no such data, or (``on_bad="error"``) no such image.
        ValueError: an unknown format (listing what was found and what is known), no usable record, several splits and none
            chosen, a key of ``columns`` that no record has, or (``on_bad="error"``) a bad record: one line with file,
            record, key and what to do; no room in the temporary folder.
    """
    check_on_bad(on_bad)
    source = _with_weights(open_source(data, image_root, split, ImageFolders((), follow_links), dict(columns or {})))
    report = LoadReport() if report is None else report
    report.format = _format_of(source, format)
    check: Check | None = None if collator is None else collator.check
    known = None if skip_records is None else KnownBad(skip_records)
    records = partial(
        _records, source=source, format=report.format, skip=on_bad == "skip", report=report, check=check, known=known
    )
    if streaming or isinstance(data, IterableDataset):
        # Parts go by in a list: `datasets` gives each worker its share of it.
        return IterableDataset.from_generator(records, features=source.features, gen_kwargs={"parts": source.parts})
    return _to_arrow(records, source, report, partial(_key, source, report.format, on_bad, collator, known))


@dataclass(frozen=True)
class _Source:
    """What was opened: ``parts`` are paths of files, or one data set in memory, or in the folder ``saved``; ``weights``:
    the columns of :data:`WEIGHTS` that its records have."""

    where: str
    parts: list[Any]
    root: ImageFolders
    columns: dict[str, str | None]
    weights: Mapping[str, Any] = field(default_factory=dict)
    saved: str = "dataset"

    @property
    def features(self) -> Features:
        return Features({**FEATURES, **self.weights})


def _with_weights(source: _Source) -> _Source:
    """The source with the columns of weights that its first readable row has."""
    for row in islice((row for part in source.parts for _, row in rows_of(part)), _PEEK):
        if isinstance(row, dict):
            names = {source.columns.get(key, key) for key in row}
            return replace(source, weights={name: WEIGHTS[name] for name in WEIGHTS if name in names})
    return source


def open_source(
    data: Any, image_root: Roots, split: str | None, folders: ImageFolders, columns: dict[str, str | None]
) -> _Source:
    """The files that ``data`` means, and the folders of their images. Arguments and errors as of :func:`load_records`."""
    roots = [Path(root) for root in ([image_root] if isinstance(image_root, (str, Path)) else image_root or ())]
    for root in roots:
        if not root.is_dir() and folders.lost is None:  # else its images are said to be missing
            raise FileNotFoundError(
                f"image_root={str(root)!r}: no such folder. Set it to the one that holds the images."
            )
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        if split not in data:
            names = ", ".join(map(str, data))
            raise ValueError(f"a {type(data).__name__} with {names}: pass one of them, as in data['train'].")
        data = data[split]
        split = None
    if not isinstance(data, (str, Path)):
        if not isinstance(data, (Dataset, IterableDataset, list)):
            raise ValueError(f"data is a {type(data).__name__}: expected a path, a datasets set or a list of rows")
        if split is not None:
            raise ValueError(f"split={split!r}: this data set is one split already. Leave it out.")
        return _Source("the data set", [data], _in(roots, folders), columns)
    path = Path(data)
    saved = saved_dataset(path, split) if path.is_dir() else None
    parts: list[Any] = files_of(path, split) if saved is None else [saved]
    if not roots:
        roots = [path if saved is not None else parts[0].parent]
    return _Source(str(path), parts, _in(roots, folders), columns, saved=str(path / (split or "")))


def _in(roots: list[Path], folders: ImageFolders) -> ImageFolders:
    return replace(folders, roots=tuple(os.path.realpath(root) for root in roots))


def _names_of(part: Any, source: _Source) -> tuple[str, str]:
    """(what errors call a part, by what a list of bad records tells it from those of other sources)."""
    return (part.name, str(part)) if isinstance(part, Path) else ("dataset", source.saved)


def rows_of(part: Any) -> Rows:
    """(place, row) of a part of a source, as its reader yields them."""
    return READERS[part.suffix.lower()](part) if isinstance(part, Path) else read_dataset(part)


def _format_of(source: _Source, format: str | None) -> str:
    if format is not None:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not known. Known formats are {known_formats()}.")
        return format
    seen, keys, first = 0, set[str](), None
    for row in islice((row for part in source.parts for _, row in rows_of(part)), _PEEK):
        seen, first = seen + 1, first or row
        if isinstance(row, dict):
            try:
                row = renamed(row, source.columns, set())
            except RecordError:
                continue
            name = detect(row)
            if name is not None:
                return name
            keys.update(map(str, row))
    if not seen:
        raise ValueError(f"{source.where}: holds no records.")
    if isinstance(first, RecordError) and not keys:
        raise ValueError(f"{source.where}: no readable record among the first {seen}. The first: {first}")
    raise ValueError(
        f"{source.where}: no known format has the keys found: {listed(keys)}. Known formats are {known_formats()}."
        " Name the keys with columns={'image_path': 'image'}, or set format=..."
    )


def renamed(row: dict[str, Any], columns: Mapping[str, str | None], seen: set[str]) -> dict[str, Any]:
    """The row with the names that ``columns`` gives its keys; those that it has are added to ``seen``."""
    if columns.keys().isdisjoint(row):
        return row
    seen.update(columns.keys() & row.keys())
    kept = {key: value for key, value in row.items() if key not in columns}
    for key, name in columns.items():
        if name is None or key not in row:
            continue
        if name in kept:
            raise RecordError(
                f"columns: {key!r} is called {name!r}, and there is a key {name!r} already. Leave one out."
            )
        kept[name] = row[key]
    return kept


def _records(
    parts: list[Any],
    source: _Source,
    format: str,
    skip: bool,
    report: LoadReport,
    check: Check | None,
    known: KnownBad | None,
) -> Iterator[dict[str, Any]]:
    """The good records of ``parts``; a bad one stops, or is counted and logged."""
    report.clear()
    tally = KeyTally()
    for part in parts:
        name, path = _names_of(part, source)
        for index, (place, row) in enumerate(rows_of(part)):
            record_id, row = _named(row, f"{name}:{index}", source, tally)
            if known is not None and (path, index, record_id) in known:
                report.known += 1
                report.reject(f"{name}: {place}", f"named in {known.path}", record_id, path, index)
                continue
            made = _made(row, record_id, source, format, tally, check)
            if isinstance(made, RecordError):
                called = f"{name}: record {show(record_id)} ({place})"
                if not skip:
                    raise type(made)(f"{called}: {made}") from None
                report.reject(called, str(made), record_id, path, index)
                logger.warning("left out %s: %s", called, made)
                continue
            report.accepted += 1
            yield made
    whole = len(parts) == len(source.parts)  # a worker's share may well hold none
    tally.say(source.where, source.columns if whole else {}, format, report.total)
    if report.rejected:
        logger.warning("%s: %d of %d records left out", source.where, report.rejected, report.total)
    if not report.accepted and whole:
        why = f" The first: {report.reasons[0][0]}: {report.reasons[0][1]}" if report.reasons else ""
        raise ValueError(f"{source.where}: not one of {report.total} records can be used.{why}")


def _named(row: Any, default: str, source: _Source, tally: KeyTally) -> tuple[str, dict[str, Any] | RecordError]:
    """(what errors call it, the row with the names that ``columns`` gives its keys, or why it cannot be used)."""
    try:
        if isinstance(row, RecordError):
            raise row
        if source.columns:
            row = renamed(row, source.columns, tally.renamed)
        return id_of(row, default), row
    except RecordError as error:
        return default, error


def _made(
    row: Any, record_id: str, source: _Source, format: str, tally: KeyTally, check: Check | None = None
) -> dict[str, Any] | RecordError:
    """The record of one row, or why it cannot be used."""
    try:
        if isinstance(row, RecordError):
            raise row
        check_keys(row, FORMATS[format].uses, tally.unused)
        messages, images = FORMATS[format].convert(row)
        record = make_record(record_id, messages, images, source.root, tally.unused)
        if source.weights or "weights" in row or "weight_ids" in row:
            record.update(weights_of(row, source.weights))
        if check is not None:
            check(record)
    except RecordError as error:
        return error
    return record


@dataclass(frozen=True)
class Located:
    """One row of the data and where it stands: what it became, or why it cannot be used.

    Attributes:
        source: the name of its file; "dataset" for one in memory.
        row: its place there, bad rows counted.
        record: ``id``, ``messages``, ``images``; None if it cannot be used, or was not asked for.
        error: one line with file, record, key and what to do; None if it can be used.
        kind: of the error: RecordError, or one of its subclasses.
        lost: its image files that are missing or damaged, where such records are kept; lines as ``error`` has them.
        path: of its file, or of the folder of a saved data set; "dataset" too for one in memory.
        id: its own or, where it has none, its place in words.
    """

    source: str
    row: int
    record: dict[str, Any] | None = None
    error: str | None = None
    kind: type[RecordError] | None = None
    lost: tuple[LostImage, ...] = ()
    path: str = "dataset"
    id: str | None = None


class LocatedRecords:
    """Every row of the data with its place, for callers that have to find it again. Arguments as of
    :func:`load_records`; nothing is written, and each pass reads anew. With ``keep_lost`` a record whose image files are
    missing or damaged is kept all the same, and its row says so.
    """

    def __init__(
        self,
        data: Any,
        *,
        format: str | None = None,
        image_root: Roots = None,
        split: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        follow_links: bool = False,
        keep_lost: bool = False,
    ) -> None:
        folders = ImageFolders((), follow_links, [] if keep_lost else None)
        self._source = _with_weights(open_source(data, image_root, split, folders, dict(columns or {})))
        self.where, self.root = self._source.where, self._source.root
        self.format = _format_of(self._source, format)
        self._tally = KeyTally()

    def files(self) -> list[Path]:
        """Where the rows stand; none for a set in memory."""
        return [part for part in self._source.parts if isinstance(part, Path)]

    @property
    def unused(self) -> Counter[str]:
        """Keys that were not used so far, and by how many rows each."""
        return self._tally.unused

    def rows(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Located]:
        """The rows in order. One whose number ``wanted`` does not want is only counted: it costs no look at its images."""
        number = 0
        for part in self._source.parts:
            name, path = _names_of(part, self._source)
            for index, (place, row) in enumerate(rows_of(part)):
                found = self._located(name, index, place, row) if wanted(number) else Located(name, index)
                yield replace(found, path=path)
                number += 1

    def _located(self, name: str, index: int, place: str, row: Any) -> Located:
        lost: list[LostImage] = [] if self.root.lost is None else self.root.lost
        lost.clear()
        record_id, row = _named(row, f"{name}:{index}", self._source, self._tally)
        made = _made(row, record_id, self._source, self.format, self._tally)
        called = f"{name}: record {show(record_id)} ({place})"
        if isinstance(made, RecordError):
            return Located(name, index, None, f"{called}: {made}", type(made), id=record_id)
        lost_here = tuple(replace(one, line=f"{called}: {one.line}") for one in lost)
        return Located(name, index, made, lost=lost_here, id=record_id)


def id_of(row: dict[str, Any], default: str) -> str:
    """The row's own id as text, else ``default``. RecordError for an id that is none."""
    value = row.get("id", default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of whole numbers where some are missing
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RecordError(f"key 'id': {show(value)} is neither a text nor a whole number.")
    try:
        return str(value).encode().decode()
    except ValueError:  # half a surrogate pair, or a number of thousands of digits
        raise RecordError("key 'id': no valid Unicode or too long a number. Correct it.") from None


def _to_arrow(
    records: Callable[..., Iterator[dict[str, Any]]], source: _Source, report: LoadReport, key: Callable[[], Any]
) -> Dataset:
    """The records in an Arrow file, which one rank of each machine writes; the report is that rank's."""
    features = source.features

    def write() -> tuple[Path, Any]:
        advice = ", or streaming=True, which writes none"
        path = write_arrow("records", features.arrow_schema, records(parts=source.parts), advice)
        return path, [report.accepted, report.known, report.reasons]

    path, (report.accepted, report.known, reasons) = once_per_machine(key, write)
    report.reasons[:] = [(called, why) for called, why in reasons]
    return Dataset.from_file(str(path))


def _key(source: _Source, format: str, on_bad: str, collator: Any, known: KnownBad | None) -> Any:
    """What the records are made of, as JSON; None if that cannot be told from outside."""
    made: list[Any] = []
    for part in source.parts:
        if isinstance(part, Path):
            status = part.stat()
            made.append([str(part.resolve()), status.st_size, status.st_mtime_ns])
        elif isinstance(part, Dataset):
            made.append(part._fingerprint)
        else:
            return None  # a list, which each rank may have made in its own way
    looked = [
        type(collator).__qualname__,
        *(repr(getattr(collator, name, None)) for name in ("chat_template", "train_on")),
    ]
    return [
        made,
        format,
        on_bad,
        source.columns,
        sorted(source.weights),
        repr(source.root),
        looked,
        known and known.digest,
    ]


__all__ = ["FEATURES", "LoadReport", "MissingImage", "RecordError", "load_records"]
