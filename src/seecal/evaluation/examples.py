"""The records of a data set as questions with true answers: what is asked, what is compared, and which cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.collators.conversation import in_parts
from ..data.paths import ImageFolders, RecordError, show
from ..data.sources.conversions import list_of
from ..data.sources.formats import FORMATS, check_keys, detect, known_formats
from ..data.sources.load import id_of, open_source, renamed, rows_of
from ..data.sources.records import make_record
from .metrics.table import Metric

# A turn in the place of the true answer, which the model is not shown and the metric does not read
_UNSEEN = "."


@dataclass(frozen=True)
class Example:
    """A record to be asked, or why it cannot be.

    Attributes:
        id: its own, or its file and place.
        record: ``id``, ``messages`` and ``images``; None where it cannot be used.
        references: the true answers, as its metric reads them.
        columns: other columns that its metric reads.
        group: the kind that it belongs to; "" where the data has none.
        images: what tells each of its images from others: its path below the image folder, or a digest of its bytes.
        error: one line with file, record and what to do; None where it can be used.
    """

    id: str
    record: dict[str, Any] | None = None
    references: list[Any] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    images: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def key(self) -> str:
        """What tells two versions of the question apart: its texts and its images."""
        if self.record is None:
            return "cannot be used"
        messages = self.record["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return _digest(json.dumps([self.id, messages, self.images]).encode())


class Examples:
    """The questions of a data set, in order; each pass reads anew.

    Args:
        data: what :func:`seecal.load_records` takes. A record need not have an answer of its own where ``answers`` names a
            column: also rows of an image and a ``question`` or ``prompt``.
        metric: says which columns are read.
        answers: the column with the true answers: a text, a number, or a list of them. None: the last turn of each record,
            which must be the assistant's.
        format, image_root, split, columns: as of :func:`seecal.load_records`.
        limit: of the data's rows the first so many; None: all.

    Raises:
        FileNotFoundError, ValueError: as :func:`seecal.load_records`.
    """

    def __init__(
        self,
        data: Any,
        metric: Metric,
        *,
        answers: str | None = None,
        format: str | None = None,
        image_root: Any = None,
        split: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        limit: int | None = None,
    ) -> None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"format={format!r} is not known. Known formats are {known_formats()}.")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit={limit!r}: expected a whole number of records, 1 or more, or None for all")
        self._source = open_source(data, image_root, split, ImageFolders(()), dict(columns or {}))
        self.name = self._source.where
        self._metric, self._answers, self._format, self._limit = metric, answers, format, limit

    def __iter__(self) -> Iterator[Example]:
        return islice(self._all(), self._limit)

    def _all(self) -> Iterator[Example]:
        for part in self._source.parts:
            name = part.name if isinstance(part, Path) else "dataset"
            for index, (place, row) in enumerate(rows_of(part)):
                example_id = f"{name}:{index}"
                try:
                    if isinstance(row, RecordError):
                        raise row
                    row = renamed(dict(row), self._source.columns, set())
                    example_id = id_of(row, example_id)
                    yield self._example(row, example_id)
                except RecordError as error:
                    yield Example(example_id, error=f"{name}: record {show(example_id)} ({place}): {error}")

    def _example(self, row: dict[str, Any], example_id: str) -> Example:
        references = None
        if self._answers is not None:
            if self._answers not in row:
                raise RecordError(
                    f"no column {self._answers!r} for its true answers; it has {', '.join(sorted(map(str, row)))}."
                )
            references = self._metric.references(row.pop(self._answers))
            row = _with_an_answer(row)
        format_name = self._format or detect(row)
        if format_name is None:
            keys = ", ".join(sorted(map(str, row)))
            hint = "" if self._answers else " If its true answers are in a column of their own, name it: answers."
            raise RecordError(f"no known format has its keys: {keys}.{hint}")
        uses = FORMATS[format_name].uses or frozenset()
        group_column = next((name for name in self._metric.groups if name in row and name not in uses), None)
        group = "" if group_column is None else str(row[group_column])
        read = {*self._metric.columns, *self._metric.groups} - uses
        columns = {name: row.pop(name) for name in sorted(read) if name in row}
        check_keys(row, uses, Counter())
        messages, images = FORMATS[format_name].convert(row)
        record = make_record(example_id, messages, images, self._source.root)
        if references is None:
            references = self._metric.of_turn(answer_of(record, f"record {example_id!r}"))
        if len(references) < self._metric.least:
            raise RecordError(
                f"{len(references)} true answers, but this metric compares at least {self._metric.least} people's: with "
                "fewer no answer could be right. Give them as a list in a column (answers), or use another metric, such as "
                "exact."
            )
        return Example(example_id, record, references, {"id": example_id, **columns}, group, self._named(record))

    def _named(self, record: Mapping[str, Any]) -> list[str]:
        """:attr:`Example.images` of a record. Those that lie in the image folder itself are called by their names alone."""
        return [
            self._source.root.below(image["path"]).lstrip(os.sep) if image["bytes"] is None else _digest(image["bytes"])
            for image in record["images"]
        ]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def answer_of(record: Mapping[str, Any], name: str) -> str:
    """The text of a record's last turn, the assistant's. RecordError, or ValueError naming it, where there is none."""
    messages, _ = in_parts(record, name)
    if messages[-1].get("role") != "assistant":
        raise RecordError(
            "its last turn is not the assistant's, so nothing says what is right. Name the column that does: answers."
        )
    return "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")


def _with_an_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose answers are a column, with an answer in its format's own place, which no one reads."""
    for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in row:
            turns = list_of(row, key)
            last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
            if (last.get("role") or last.get("from")) in ("assistant", "gpt", "chatgpt"):
                return row
            return {**row, key: [*turns, {role: "assistant", text: _UNSEEN}]}
    if "question" in row and "prompt" not in row:
        row["prompt"] = row.pop("question")
    if "prompt" in row:
        return row if row.keys() & {"completion", "text", "caption"} else {**row, "completion": _UNSEEN}
    return row if row.keys() & {"text", "caption"} else {**row, "caption": _UNSEEN}
