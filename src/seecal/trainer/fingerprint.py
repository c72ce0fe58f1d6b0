"""What tells two data sets apart, in a few kilobytes and without opening an image: kept with each checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pyarrow
from datasets import Dataset

from .random_numbers import same_random_numbers
from .samples import is_indexed

_MOST = 1000  # records that are looked at, evenly spread
_MADE = 16  # of a data set that makes its samples when asked, images and all
_DIGEST = 6  # bytes of each
_PATHS = ("path", "image", "images", "file_name")
_LISTED = 1 << 16  # numbers of an array that are read


def fingerprint(dataset: Any) -> dict[str, Any]:
    """``{"records", "columns", "digests"}`` of a data set, JSON; ``{"records": None}`` of a stream, which has none.

    A digest of up to 1,000 records, evenly spread: their ids, texts and numbers; of images their last two names (a folder
    may have moved) or their sizes. Of a data set that makes its samples when asked, 16, without their images.
    """
    if not is_indexed(dataset):
        return {"records": None}
    if isinstance(dataset, Dataset):
        plain = dataset.with_format("arrow")
        rows: Iterator[Any] = (_stored(plain[index]) for index in _places(len(dataset), _MOST))
        columns = sorted(dataset.column_names)
    else:
        columns = []
        rows = (_sample(dataset, index) for index in _places(len(dataset), _most(dataset)))
    return {"records": len(dataset), "columns": columns, "digests": "".join(map(_digest, rows))}


def what_differs(was: Mapping[str, Any], now: Mapping[str, Any], dataset: Any) -> str | None:
    """How ``dataset``, whose fingerprint is ``now``, differs from another one; None: in nothing that is known of both."""
    if was == now:
        return None
    if was["records"] != now["records"]:
        counts = ["a stream" if one["records"] is None else f"{one['records']} records" for one in (was, now)]
        return f"it was begun with {counts[0]}, and this is {counts[1]}"
    if was["columns"] != now["columns"]:
        columns = [", ".join(one["columns"]) for one in (was, now)]
        return f"its columns were {columns[0]}, and are {columns[1]}"
    size = 2 * _DIGEST
    for number, index in enumerate(_places(now["records"], _most(dataset))):
        part = slice(number * size, (number + 1) * size)
        if was["digests"][part] != now["digests"][part]:
            return f"record {index}{_called(dataset, index)} is another than it was begun with"
    return "it was looked at in another way"


def _most(dataset: Any) -> int:
    return _MOST if isinstance(dataset, (Dataset, list, tuple)) else _MADE


def _places(records: int, most: int) -> list[int]:
    if records <= most:
        return list(range(records))
    return [number * (records - 1) // (most - 1) for number in range(most)]


def _called(dataset: Any, index: int) -> str:
    if isinstance(dataset, Dataset):
        known = dataset.with_format(None)["id"][index] if "id" in dataset.column_names else None
    else:
        known = dataset[index].get("id") if isinstance(dataset, (list, tuple)) else None
    return "" if known is None else f" ({str(known)!r:.80})"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=_DIGEST).hexdigest()


# ---- Rows of Arrow tables, as they are stored ----


def _stored(table: pyarrow.Table) -> dict[str, Any]:
    return {name: _of_arrow(table[name][0], name in _PATHS) for name in table.column_names}


def _of_arrow(scalar: Any, is_path: bool) -> Any:
    """The value, with a size in the place of bytes, which are not copied."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.ExtensionScalar):
        return _of_arrow(scalar.value, is_path)
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _of_arrow(scalar[name], name in _PATHS) for name in scalar}
    if isinstance(scalar, (pyarrow.ListScalar, pyarrow.LargeListScalar, pyarrow.FixedSizeListScalar)):
        of = scalar.type.value_type
        if pyarrow.types.is_integer(of) or pyarrow.types.is_floating(of):
            return scalar.as_py()
        return [_of_arrow(one, is_path) for one in scalar.values]
    if isinstance(scalar, (pyarrow.BinaryScalar, pyarrow.LargeBinaryScalar)) and not isinstance(
        scalar, (pyarrow.StringScalar, pyarrow.LargeStringScalar)
    ):
        return ["bytes", scalar.as_buffer().size]
    value = scalar.as_py()
    return _end_of(value) if is_path and isinstance(value, str) else value


# ---- Samples in memory, and those that are made ----


def _sample(dataset: Any, index: int) -> Any:
    """A sample of a list, or of what makes its samples when asked: without images, and without what differs each time."""
    if isinstance(dataset, (list, tuple)):
        return _essence(dataset[index], False, made=False)
    try:
        with same_random_numbers():  # looking at data changes no training
            one, other = (_essence(dataset[index], False, made=True) for _ in range(2))
    except Exception:
        return "not to be read"  # what is wrong with it is told when it is met
    return one if one == other else "drawn anew"


def _essence(value: Any, is_path: bool, made: bool) -> Any:
    """What tells one sample from another, JSON. ``made``: images may come out in another size each time."""
    if isinstance(value, str):
        return _end_of(value) if is_path else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _essence(one, name in _PATHS, made) for name, one in value.items()}
    if isinstance(value, PurePath):
        return _end_of(str(value))
    if made:
        return [_essence(one, is_path, made) for one in value] if isinstance(value, (list, tuple)) else "made"
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", len(value)]
    if isinstance(value, Sequence):
        return [_essence(one, is_path, made) for one in value]
    if hasattr(value, "tolist") and (value.ndim == 0 or (value.ndim == 1 and len(value) <= _LISTED)):
        return value.tolist()
    return [
        str(getattr(value, name))
        for name in ("shape", "size", "mode", "dtype")
        if not callable(getattr(value, name, len))
    ]


def _end_of(path: str) -> list[str]:
    return list(PurePath(path).parts[-2:])
