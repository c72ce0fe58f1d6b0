"""Scores as the weights of a training: a folder of scores beside the records that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset, concatenate_datasets

from ..core.weighting import prior_weights
from ..data.sources.arrow_copy import once_per_machine, write_arrow
from .manifest import read_manifest
from .read import RecordScores, read_scores
from .shards import Skipped, whole

SCHEMA = pyarrow.schema([("weights", pyarrow.list_(pyarrow.float32())), ("weight_ids", pyarrow.list_(pyarrow.int32()))])


def with_weights(data: Any, scores: str | Path, *, prior_exponent: float | None = None) -> Dataset:
    """``data`` with two more columns from a folder of scores: ``weights`` and the ``weight_ids`` that they belong to.

    The weights are the column of that name or, with ``prior_exponent``, PRIOR's of the column ``logprob_without``.

    The n-th record that could be read is the n-th of the data: what was scored and what is trained have to be the same
    file, or the same set. Ids must agree, and the set's names in a mixture; token ids are compared when batches are made.

    Raises:
        ValueError: a set that streams or has ``weights`` already; scores that are not whole; a record without scores or
            with another id, by name; more records or fewer than were scored.
    """
    if not isinstance(data, Dataset):
        raise ValueError(
            f"weights={str(scores)!r} with a {type(data).__name__}: weights are joined to records by their place, which a "
            "set that streams has not. Load it with streaming=False."
        )
    if "weights" in data.column_names:
        raise ValueError(f"weights={str(scores)!r}, but the records bring a column 'weights' of their own. Drop one.")
    scores = Path(scores)
    path, _ = once_per_machine(
        lambda: [prior_exponent, *key_of(data, scores)],
        lambda: (write_arrow("weights", SCHEMA, _rows(data, scores, prior_exponent), ""), None),
    )
    return concatenate_datasets([data, Dataset.from_file(str(path))], axis=1)


def key_of(data: Dataset, scores: Path) -> list[Any]:
    """What the joined weights are made of: the shards, and the ids that they are compared with."""
    named = [name for name in ("id", "source") if name in data.column_names]
    ids = hashlib.sha256(repr([list(data[name]) for name in named]).encode()).hexdigest()
    shards = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(scores.glob("*"))]
    return [str(scores.resolve()), shards, len(data), ids]


def _rows(data: Dataset, scores: Path, prior_exponent: float | None) -> Iterator[dict[str, Any]]:
    name = "weight" if prior_exponent is None else "logprob_without"
    for record in _checked(data, scores, name):
        weights = record.columns[name] if prior_exponent is None else prior_weights_of(record, prior_exponent)
        yield {"weights": weights, "weight_ids": record.columns["token_id"]}


def prior_weights_of(record: RecordScores, exponent: float) -> np.ndarray:
    """PRIOR's weights of one record, [N], by its log-probabilities without an image."""
    logprob = torch.tensor(record.columns["logprob_without"])
    return prior_weights(logprob, torch.zeros(len(logprob), dtype=torch.long), exponent).numpy()


def _checked(data: Dataset, scores: Path, column: str) -> Iterator[RecordScores]:
    """The scores of each record of ``data``, in its order: ``column`` and the token ids."""
    manifest = read_manifest(scores)
    for _, note in whole(scores, manifest):
        for skipped in note.skipped:
            if skipped.record is not None:  # it could be read, so it is among the records
                raise ValueError(
                    f"{scores}: record {skipped.record!r} ({skipped.source}, row {skipped.row}) has no scores: "
                    f"{skipped.reason}. Take it out of the data, and score that."
                )
    told = manifest.data
    ids = data["id"] if "id" in data.column_names else None
    names = data["source"] if "source" in data.column_names else None
    count = 0
    for record in read_scores(scores, [column, "token_id"]):
        if isinstance(record, Skipped):
            continue
        if count < len(data):
            has = (
                names[count] if names is not None else record.source,
                str(ids[count]) if ids is not None else record.record,
            )
            if has != (record.source, record.record):
                raise ValueError(
                    f"{scores}: its record {count} is {record.record!r} of {record.source}, that of the data {has[1]!r} of "
                    f"{has[0]}. These are scores of other data ({told['name']}): score what is trained on."
                )
            yield record
        count += 1
    if count != len(data):
        raise ValueError(
            f"{scores}: {count} records were scored ({told['name']}), and {len(data)} are to be trained on. Score what is "
            "trained on."
        )
