"""CSV and TSV files, and how the text of a file is encoded."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
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


def has_mark(path: Path) -> bool:
    """Whether a UTF-8 file begins with the mark by which Excel knows one."""
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def read_csv(path: Path) -> Rows:
    """Comma-separated (``.tsv``: tab-separated) with a header; empty fields are left out.

    Where the header has no comma, semicolons or tabs separate the fields, as Excel writes them in many countries.
    """
    header: list[str] | None = None
    for number, fields in Table(path).rows():
        if isinstance(fields, csv.Error):
            yield f"line {number}", RecordError(f"not valid CSV ({fields}). Correct or delete the line.")
        elif header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise ValueError(f"{path}: its header names {', '.join(map(show, twice))} twice. Rename one.")
        elif fields:
            yield f"line {number}", _csv_row(header, fields)


class Table:
    """A CSV or TSV file: how it is encoded, what separates its fields, and its rows.

    Args:
        text: where the text of each row is put, instead of that of the row before.
    """

    def __init__(self, path: Path, text: io.StringIO | None = None) -> None:
        self.path, self.encoding, self._text = path, encoding_of(path), text

    def open(self, path: Path, mode: str = "r", encoding: str | None = None) -> TextIO:
        """``path`` in the encoding of the table."""
        encoding = encoding or self.encoding
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        return path.open(mode, encoding=encoding, errors=errors, newline="")  # type: ignore[return-value]

    def rows(self) -> Iterator[tuple[int, list[str] | csv.Error]]:
        """(number of the line, fields) of the header, then of the others; none in a blank line, an error in their place
        where they cannot be read.

        Raises:
            ValueError: a file in another encoding than its start.
        """
        # How long a row may be is told by _Lines; csv's own limit, one for the whole process, is less than an image
        csv.field_size_limit(max(csv.field_size_limit(), bounds.MAX_BYTES))
        with self.open(self.path) as file:
            try:
                delimiter = _delimiter(self.path, file.readline(bounds.MAX_VALUES))
                file.seek(0)
                lines = _Lines(file, self._text)
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                while True:
                    lines.begin_row()
                    try:
                        fields: list[str] | csv.Error = next(reader)
                    except csv.Error as error:
                        fields = error
                    except StopIteration:
                        return
                    yield reader.line_num, fields
            except UnicodeDecodeError as error:
                encoding = self.encoding.upper()
                raise ValueError(f"{self.path}: not valid {encoding} ({error.reason}). Save it as UTF-8.") from None


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


class _Lines:
    """The lines of a file for csv.reader, which puts several together where a field is quoted.

    csv.Error where a row gets too long, and the next line after it.
    """

    def __init__(self, file: TextIO, text: io.StringIO | None) -> None:
        self._file, self._text = file, text
        self._of_row = 0  # characters

    def begin_row(self) -> None:
        self._of_row = 0
        if self._text is not None:
            self._text.seek(0)
            self._text.truncate()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = bounds.next_line(self._file)
        if line == "":
            raise StopIteration
        if line is None or self._of_row + len(line) > bounds.MAX_BYTES or bounds.many_values(line):
            raise csv.Error(str(bounds.too_long("the row")))
        self._of_row += len(line)
        if self._text is not None:
            self._text.write(line)
        return str(line)


def _csv_row(header: list[str], fields: list[str]) -> dict[str, Any] | RecordError:
    if len(fields) != len(header):
        return RecordError(
            f"the number of fields is {len(fields)}, but the header names {len(header)}. Quote text with commas "
            "or line breaks."
        )
    if any("\udc80" <= letter <= "\udcff" for field in fields if not field.isascii() for letter in field):
        return RecordError("not valid UTF-8. Save the file as UTF-8.")
    return {name: field for name, field in zip(header, fields, strict=True) if field}
