"""WebDataset shards: tar files in which the files of a record share their name up to the first dot.

    000.jpg  000.json        000.jpg  000.txt        000.0.jpg  000.1.jpg  000.json

Read a record at a time. JSON gives the row's keys, images its images, a text its caption. (The builder of `datasets` also
unpacks arrays, tensors and compressed files that it finds there, however large.)
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..paths import RecordError, show
from . import bounds
from .rows import Rows, as_row, reason

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
_OTHER_MEDIA = ("mp4", "avi", "mkv", "webm", "mov", "mpg", "mpeg", "wav", "mp3", "flac", "m4a", "ogg", "opus")
_TEXTS = ("txt", "text", "caption")
_NAMES = ("cls", "cls2", "id", "key", "transcript")
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_CHAT_KEYS = frozenset({"conversations", "messages", "completion"})
_NUMBERS = re.compile(r"(\d+)")


def read_tar(path: Path) -> Rows:
    """The records of one shard. ValueError where it is no tar file or not in WebDataset's form."""
    try:
        with tarfile.open(path, "r:") as tar:
            for index, sample in enumerate(_samples(tar)):
                row = sample if isinstance(sample, RecordError) else as_row(sample)
                yield f"sample {index}", row if isinstance(row, RecordError) else _row(row)
    except (tarfile.TarError, ValueError, OSError, EOFError, MemoryError) as error:
        raise ValueError(
            f"{path}: cannot be read as a WebDataset shard ({_compressed(path) or reason(error)}). Write it again, the "
            "files of each record side by side under one name, not compressed."
        ) from None


def _samples(tar: tarfile.TarFile) -> Iterator[dict[str, Any] | RecordError]:
    """What the files of each record hold, by their endings; only what can be used is read, and only in bounds.

    Links, devices and folders are no files. Nothing is written to the disk, so a file's name leads nowhere.
    """
    key, sample, error, size = None, dict[str, Any](), None, 0
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # else all that went by are kept
        if member.size < 0:  # the next header would stand before this one, without end
            raise ValueError(f"{show(member.name)} has a size of {member.size}")
        found = _NAME.fullmatch(member.name)
        if not member.isfile() or found is None or member.name.rpartition("/")[2].startswith((".", "__")):
            continue
        if found[1] != key:
            if sample:
                yield error or sample
            key, sample, error, size = found[1], {"__key__": found[1]}, None, 0
        field, size = found[2], size + member.size
        if member.sparse is not None or size > bounds.MAX_BYTES:
            error = error or bounds.too_long(f"its file .{show(field)[1:-1]}")
        elif field in sample:
            error = error or RecordError(f"two files .{show(field)[1:-1]}. Keep one.")
        elif error is None:
            try:
                sample[field] = _content(tar, member, field)
            except RecordError as told:
                error = told
    if sample:
        yield error or sample


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, field: str) -> Any:
    ending = _ending(field)
    json_text = ending in ("json", "jsonl")
    if not (json_text or _is_image(field) or ending in (*_TEXTS, *_NAMES)):
        return b""  # that it is there is all that is told of it
    file = tar.extractfile(member)
    assert file is not None  # it is a file
    content = file.read()
    if _is_image(field):
        return content
    if json_text and bounds.many_values(content):
        raise bounds.too_long(f"its file .{field}")
    try:
        return json.loads(content) if json_text else content.decode()
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its file .{field} cannot be read ({reason(error)}). Correct it or leave it out.") from None


def _compressed(path: Path) -> str | None:
    """That a tar file is compressed: how much it unpacks to could not be told before."""
    with path.open("rb") as file:
        start = file.read(6)
    known = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((f"it is compressed with {name}" for begin, name in known.items() if start.startswith(begin)), None)


def _is_image(field: str) -> bool:
    return _ending(field) in _IMAGES


def _ending(field: str) -> str:
    return field.rpartition(".")[2].lower()


def _row(sample: dict[str, Any]) -> dict[str, Any] | RecordError:
    """A sample as a row of any other format."""
    name = sample.pop("__key__", None)
    media = next((field for field in sample if _ending(field) in _OTHER_MEDIA), None)
    if media is not None:
        return RecordError(f"its file .{media} is no image: images are the only medium. Leave the record out.")
    pictures = sorted(filter(_is_image, sample), key=_by_number)
    images = [sample.pop(field) for field in pictures]
    texts = [sample.pop(field) for field in _TEXTS if field in sample]
    row: dict[str, Any] = {}
    for field in [field for field in sample if _ending(field) in ("json", "jsonl")]:
        content = sample.pop(field)
        row.update(content if isinstance(content, dict) else {"conversations": content})
    row.setdefault("id", name)
    row = {**sample, **row}
    if images:
        # The record's own names for them are those of the files beside it
        row = {key: value for key, value in row.items() if key not in ("image", "images", "file_name")}
        row["images"] = images
    if texts and _CHAT_KEYS.isdisjoint(row):
        if row.get("caption") == texts[0]:  # img2dataset writes it twice
            del row["caption"]
        if len(texts) > 1:
            return RecordError(f"{len(texts)} texts beside its image. Keep one.")
        row["text"] = texts[0]
    return row


def _by_number(field: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in _NUMBERS.split(field)]
