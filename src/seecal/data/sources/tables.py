"""CSV and TSV files, and how the text of a file is encoded."""

from __future__ import annotations

import codecs
import csv
from pathlib import Path
from typing import Any, TextIO

from ..paths import RecordError, show
from . import bounds
from .rows import Rows

UTF_8 = "utf-8-sig"


def encoding_of(path: Path) -> str:
    """UTF-8, or UTF-16 and UTF-32 as Windows and Excel write them: by the mark at the start, or by the zeros between."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(start) == 4 and start[0] and not start[1] and start[2] and not start[3]:
        return "utf-16-le"
    if len(start) == 4 and not start[0] and start[1] and not start[2] and start[3]:
        return "utf-16-be"
    return UTF_8


def read_csv(path: Path) -> Rows:
    """Comma-separated (``.tsv``: tab-separated) with a header; empty fields are left out.

    Where the header has no comma, semicolons or tabs separate the fields, as Excel writes them in many countries.
    """
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding == UTF_8 else "strict"
    with path.open(encoding=encoding, errors=errors, newline="") as file:
        try:
            delimiter = _delimiter(path, file.readline(bounds.MAX_VALUES))
            file.seek(0)
            lines = _Lines(file)
            yield from _csv_rows(path, csv.reader(lines, delimiter=delimiter, strict=True), lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid {encoding.upper()} ({error.reason}). Save it as UTF-8.") from None


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


class _Lines:
    """The lines of a file for csv.reader, which puts several together where a field is quoted.

    csv.Error where a row gets too long, and the next line after it.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.of_row = 0  # characters

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = bounds.next_line(self._file)
        if line == "":
            raise StopIteration
        if line is None or self.of_row + len(line) > bounds.MAX_BYTES or bounds.many_values(line):
            raise csv.Error(str(bounds.too_long("the row")))
        self.of_row += len(line)
        return str(line)


def _csv_rows(path: Path, reader: Any, lines: _Lines) -> Rows:
    header: list[str] | None = None
    while True:
        lines.of_row = 0
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
