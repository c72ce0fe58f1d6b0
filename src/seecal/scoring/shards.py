"""The Parquet files of a folder of scores: one for each ``records_per_shard`` rows of the data, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..data.sources.bounds import rows_at_once
from .manifest import Manifest

# One row a label token. Logits and Δ in logits, log-probabilities in nats; start and stop in characters.
_COLUMNS: dict[str, Any] = {
    "source": pyarrow.string(),
    "row": pyarrow.int64(),
    "record": pyarrow.string(),
    "turn": pyarrow.int32(),
    "position": pyarrow.int32(),
    "token_id": pyarrow.int32(),
    "token": pyarrow.string(),
    "start": pyarrow.int32(),
    "stop": pyarrow.int32(),
    "has_contrast": pyarrow.bool_(),
    "delta": pyarrow.float32(),
    "logit_with": pyarrow.float32(),
    "logit_without": pyarrow.float32(),
    "weight": pyarrow.float32(),
}
_LOGPROBS: dict[str, Any] = {"logprob_with": pyarrow.float32(), "logprob_without": pyarrow.float32()}
_NOTE = b"seecal.scores"


@dataclass(frozen=True)
class Skipped:
    """A row of the data that has no scores.

    Attributes:
        source, row: its place.
        record: its id; None if it could not be read so far.
        reason: one line that names it and says why.
    """

    source: str
    row: int
    record: str | None
    reason: str


@dataclass(frozen=True)
class ShardNote:
    """What a shard says of itself.

    Attributes:
        records: how many records have rows in it.
        tokens: how many rows it has.
        with_contrast: how many of those have an image before them.
        skipped: the rows of its part of the data that have none.
    """

    records: int
    tokens: int
    with_contrast: int
    skipped: list[Skipped]


def columns(logprobs: bool) -> dict[str, Any]:
    """name -> Arrow type, in order."""
    return {**_COLUMNS, **_LOGPROBS} if logprobs else dict(_COLUMNS)


def path_of(folder: Path, number: int) -> Path:
    """Where the shard of this number lies."""
    return folder / f"scores-{number:06d}.parquet"


def write(folder: Path, number: int, manifest: Manifest, rows: dict[str, list[Any]], note: ShardNote) -> None:
    """Writes a shard aside, synced, and then gives it its name: what has the name is whole."""
    types = {name: kind for name, kind in columns(logprobs=True).items() if name in manifest.columns}
    said = {"manifest": manifest.key, "shard": number, "records": note.records, "with_contrast": note.with_contrast}
    said["skipped"] = [vars(skipped) for skipped in note.skipped]
    schema = pyarrow.schema(list(types.items()), metadata={_NOTE: json.dumps(said).encode()})
    table = pyarrow.table({name: pyarrow.array(rows[name], type=kind) for name, kind in types.items()}, schema=schema)
    path = path_of(folder, number)
    for left in folder.glob(f".{path.name}.*.part"):  # of a run that was killed
        left.unlink(missing_ok=True)
    aside = folder / f".{path.name}.{os.getpid()}.part"
    try:
        with aside.open("wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_there(folder: Path, number: int, manifest: Manifest) -> bool:
    """Whether the shard is written. ValueError for a file under its name that is not it."""
    if not path_of(folder, number).exists():
        return False
    note(folder, number, manifest)
    return True


def note(folder: Path, number: int, manifest: Manifest) -> ShardNote:
    """What the shard says of itself; only its last bytes are read.

    Raises:
        ValueError: no Parquet file, cut off, or of another run.
    """
    path = path_of(folder, number)
    try:
        found = pyarrow.parquet.read_metadata(path)
        said = json.loads((found.metadata or {})[_NOTE])
        rows_at_once(path, found)
        skipped = [Skipped(**row) for row in said["skipped"]]
        of_run, counts = (said["manifest"], said["shard"]), (int(said["records"]), int(said["with_contrast"]))
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: not a whole shard of scores ({reason}). Delete it and run the same seecal score again, which makes "
            "only it anew."
        ) from None
    if of_run != (manifest.key, number):
        raise ValueError(
            f"{path}: a shard of another run than _manifest.json beside it. Delete it and run the same seecal score again."
        )
    return ShardNote(counts[0], found.num_rows, counts[1], skipped)


def whole(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, ShardNote]]:
    """Every shard with its note, in order.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    # As many as the files that are there: the manifest may say any number
    there = sum(path_of(folder, number).exists() for number in range(min(manifest.shards, len(list(folder.iterdir())))))
    if there < manifest.shards:
        missing = next(number for number in range(manifest.shards) if not path_of(folder, number).exists())
        raise ValueError(
            f"{folder}: {manifest.shards - there} of {manifest.shards} shards are missing, {path_of(folder, missing).name} "
            "first. Run the same seecal score again: it goes on where it stopped."
        )
    for number in range(manifest.shards):
        yield path_of(folder, number), note(folder, number, manifest)
