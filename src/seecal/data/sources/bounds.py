"""How much of a data file one record may take, told before it is read, unpacked or parsed.

A file comes from somewhere else. A line without an end, a list of a billion empty lists, a few kilobytes that unpack to
gigabytes would take the machine's memory, and every process on it, long before a record of it could be refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from ..paths import RecordError

# One record with its images: two of the largest that are decoded, as JPEG files in base64
MAX_BYTES = 1 << 27
# Values in one record, each a Python object when it is parsed; counted by what stands between them
MAX_VALUES = 1 << 20
_PIECE = 1 << 20
# Of one column of a Parquet file's row group; text and images do not shrink so far
_LARGE, _RATIO = 1 << 28, 64
_ROWS = 64  # of a Parquet file turned into Python at once; they may hold encoded images
_BATCH_BYTES = 1 << 30


def too_long(what: str = "it") -> RecordError:
    """The error for a record of too many bytes or values."""
    return RecordError(
        f"{what} is too large: a record may have {MAX_BYTES:,} bytes and {MAX_VALUES:,} values. Put its images into files."
    )


def many_values(text: str | bytes, limit: int | None = None) -> bool:
    """Whether JSON may hold more than ``limit`` values (else :data:`MAX_VALUES`); short texts are not looked at."""
    limit = MAX_VALUES if limit is None else limit
    if len(text) <= limit:
        return False
    signs: Any = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    return sum(map(text.count, signs)) > limit


def next_line(file: IO[Any], limit: int | None = None) -> Any:
    """The next line of a file with its end, nothing at the end of the file; None for one longer than ``limit`` characters
    (else :data:`MAX_BYTES`), which is passed over without being held."""
    limit = MAX_BYTES if limit is None else limit
    line = file.readline(limit + 1)
    if len(line) <= limit:
        return line
    while line and line[-1:] not in ("\n", "\r", b"\n"):
        line = file.readline(_PIECE)
    return None


# ---- Parquet ----


def rows_at_once(path: Path, metadata: Any) -> int:
    """How many rows of a Parquet file may be turned into Python together, from 1 to 64.

    Columns keep each value that repeats once, in a dictionary: a row of four bytes may stand for a value as long as that.

    Raises:
        ValueError: its footer, or the header of a dictionary, says that a few bytes unpack to very many.
    """
    longest = 1
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group)
            for number in range(rows.num_columns):
                column = rows.column(number)
                if column.num_values > MAX_VALUES * rows.num_rows:
                    raise ValueError(
                        f"{path}: its column {column.path_in_schema[:80]!r} has {column.num_values:,} values in "
                        f"{rows.num_rows} rows, and a record may have {MAX_VALUES:,}. Check where the file comes from."
                    )
                sizes = [(column.total_uncompressed_size, column.total_compressed_size)]
                if column.dictionary_page_offset:
                    sizes.append(_page_sizes(file, column.dictionary_page_offset))
                    longest = max(longest, sizes[-1][0])
                for unpacked, packed in sizes:
                    _refuse_bomb(path, column.path_in_schema, unpacked, packed)
    return max(1, min(_ROWS, _BATCH_BYTES // longest))


def _refuse_bomb(path: Path, name: str, unpacked: int, packed: int) -> None:
    if unpacked > _LARGE and unpacked > _RATIO * max(packed, 1):
        raise ValueError(
            f"{path}: its column {name[:80]!r} unpacks from {packed:,} to {unpacked:,} bytes, as no text or images do. "
            "Check where the file comes from."
        )


def _page_sizes(file: IO[bytes], offset: int) -> tuple[int, int]:
    """(bytes unpacked, bytes in the file) of the page there: the second and third field of its header, in Thrift's compact
    form. What cannot be told counts as the largest that a page can be."""
    file.seek(offset)
    header = file.read(24)
    found, place = [], 0
    for _ in range(3):
        if header[place : place + 1] != b"\x15":  # the next field, a 32-bit number
            return 1 << 31, 1 << 31
        value, shift, place = 0, 0, place + 1
        while place < len(header):
            value |= (header[place] & 0x7F) << shift
            shift, place = shift + 7, place + 1
            if not header[place - 1] & 0x80:
                break
        found.append(value >> 1 ^ -(value & 1))
    return max(found[1], 0), max(found[2], 0)
