"""WebDataset shards: tar files in which the files of a record share their name up to the first dot.

    000.jpg  000.json        000.jpg  000.txt        000.0.jpg  000.1.jpg  000.json

Read with `datasets`' own builder, a record at a time. JSON gives the row's keys, images its images, a text its caption.
"""

from __future__ import annotations

import glob
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets

from ..paths import RecordError
from .rows import Rows, as_row, reason

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
_OTHER_MEDIA = ("mp4", "avi", "mkv", "webm", "mov", "mpg", "mpeg", "wav", "mp3", "flac", "m4a", "ogg", "opus")
_TEXTS = ("txt", "text", "caption")
_CHAT_KEYS = frozenset({"conversations", "messages", "completion"})
_NUMBERS = re.compile(r"(\d+)")


def read_tar(path: Path) -> Rows:
    """The records of one shard. ValueError where it is no tar file or not in WebDataset's form."""
    try:
        features = _features(path)
        shards = {"train": [glob.escape(str(path))]}
        stream = datasets.load_dataset(
            "webdataset", data_files=shards, split="train", streaming=True, features=features
        ).decode(False)
        for index, sample in enumerate(stream):
            row = as_row(sample, features)
            yield f"sample {index}", row if isinstance(row, RecordError) else _row(row)
    except RecordError:
        raise
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: cannot be read as a WebDataset shard ({reason(error)}). Write it again, the files of each record "
            "side by side under one name."
        ) from None


def _features(path: Path) -> datasets.Features:
    """What the files of the shard are, by their endings. The builder would take the first five records for all."""
    fields: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            _, _, field = Path(member.name).name.partition(".")
            if member.isfile() and field and not member.name.rpartition("/")[2].startswith("."):
                fields.setdefault(field, _feature(field))
    return datasets.Features({**fields, "__key__": datasets.Value("string"), "__url__": datasets.Value("string")})


def _feature(field: str) -> Any:
    ending = _ending(field)
    if ending in ("json", "jsonl"):
        return datasets.Json()
    if ending in _TEXTS or ending in ("cls", "cls2", "id", "key", "transcript"):
        return datasets.Value("string")
    return datasets.Image() if _is_image(field) else datasets.Value("binary")


def _is_image(field: str) -> bool:
    return _ending(field) in _IMAGES


def _ending(field: str) -> str:
    return field.rpartition(".")[2].lower()


def _row(sample: dict[str, Any]) -> dict[str, Any] | RecordError:
    """A sample as a row of any other format."""
    name = sample.pop("__key__", None)
    sample.pop("__url__", None)
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
