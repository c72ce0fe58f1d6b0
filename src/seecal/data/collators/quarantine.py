"""Batches that one bad record does not stop: it is put aside with its reason, and another record takes its row.

Whatever makes a record fail, its image, its template, its labels or the data set that gives it, it fails here alone, so
that the other rows of the batch, and the other ranks, go on with batches of the same size.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ...constants import IGNORE_INDEX, LENGTH_COUNTS, QUARANTINED
from ..paths import show
from .conversation import record_name
from .max_length import TooLong
from .vision import VisionCollator

# Other records that are tried for one that fails, before it is taken for an error of something else than the records
_TRIES = 16
_MOST = 500  # characters of a reason
_NEVER = (TooLong, MemoryError)  # what the user wants to stop at, and what is no record's fault
_NOTHING = {"id": "(nothing)", "messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]}


@dataclass(frozen=True)
class Unreadable:
    """What :class:`GuardedDataset` gives in the place of a sample that the data set failed on."""

    index: int
    reason: str


class GuardedDataset(Dataset):
    """A data set with ``len`` whose samples may fail one by one: an image that it decodes itself, a transform."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except _NEVER:
            raise
        except Exception as error:
            return Unreadable(int(index), one_line(error))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a data loader asks for: all of a batch at once, which is faster while nothing fails."""
        at_once = getattr(self._dataset, "__getitems__", None)
        if at_once is not None:
            try:
                return list(at_once(indices))
            except _NEVER:
                raise
            except Exception:
                pass  # then one by one, to see which
        return [self[index] for index in indices]


class QuarantineCollator:
    """Another collator's batches, whatever one record does.

    Args:
        collator: that one. A record without a label fails here too, whatever its own ``on_bad`` says.
        dataset: where replacements come from: which, is drawn by the failing record's content, and so the same in any
            process, worker or resumed run. None, for a stream: the next good record of the batch.
        learn: whether replacements are learnt. False, in evaluation: their rows have no labels.

    Returns (when called with records): the batch, with :data:`seecal.constants.QUARANTINED`, a JSON text for each record
        put aside (``id``, ``reason``, ``replaced_by``), which also count as left out in ``LENGTH_COUNTS``.

    Raises:
        ValueError: no record that could take the place of a failing one; or whatever fails with all of them together and
            with none alone.
    """

    def __init__(self, collator: Any, dataset: Any = None, *, learn: bool = True) -> None:
        self._collator = _strict(collator)
        self._dataset, self._learn = dataset, learn

    def __call__(self, records: Sequence[Any]) -> Any:
        records = list(records)
        bad = {row: record.reason for row, record in enumerate(records) if isinstance(record, Unreadable)}
        if not bad:
            try:
                return _noted(self._collator(records), [])
            except _NEVER:
                raise
            except Exception as error:
                bad = self._failing(records)
                if not bad:
                    raise
                first = error
        else:
            bad |= self._failing(records)
            first = None
        notes = []
        good = [record for row, record in enumerate(records) if row not in bad]
        for row, reason in bad.items():
            other = self._replacement(records[row], good, reason, first)
            notes.append({"id": _called(records[row], row), "reason": reason, "replaced_by": _called(other, row)})
            records[row] = other
        self._forget_counts()
        batch = _noted(self._collator(records), notes)
        unlearnt = list(bad) if not self._learn else [row for row in bad if records[row] is _NOTHING]
        if unlearnt:
            batch["labels"][unlearnt] = IGNORE_INDEX
        return batch

    def _failing(self, records: list[Any]) -> dict[int, str]:
        """The rows whose record fails alone, and why."""
        reasons = {
            row: self._reason(record) for row, record in enumerate(records) if not isinstance(record, Unreadable)
        }
        return {row: reason for row, reason in reasons.items() if reason is not None}

    def _reason(self, record: Any) -> str | None:
        if isinstance(record, Unreadable):
            return record.reason
        alone = copy.copy(self._collator)  # it may keep something of the batches that it has seen
        try:
            alone([record])
        except _NEVER:
            raise
        except Exception as error:
            return one_line(error)
        return None

    def _replacement(self, record: Any, good: list[Any], reason: str, cause: Exception | None) -> Any:
        if self._dataset is not None:
            for number in range(_TRIES):
                other = self._dataset[_draw(record, number, len(self._dataset))]
                if self._reason(other) is None:
                    return other
        elif good:
            return good[_draw(record, 0, len(good))]
        elif isinstance(self._collator, VisionCollator):
            return _NOTHING
        raise ValueError(
            f"{reason} And of {_TRIES if self._dataset is not None else 0} others that were tried in its place not one can "
            "be used: this is more than a bad record. See whether the processor is the model's, and the images are there."
        ) from cause

    def _forget_counts(self) -> None:
        """What was counted of records that are looked at alone, or of a batch that came to nothing."""
        counts = getattr(self._collator, "counts", None)
        if counts is not None:
            counts.take()


def _strict(collator: Any) -> Any:
    """The collator, raising where it would leave out a record without a label. It shares all else, such as the epoch."""
    counts = getattr(collator, "counts", None)
    if getattr(counts, "on_bad", "error") == "error":
        return collator
    strict = copy.copy(collator)
    strict.counts = copy.copy(counts)
    strict.counts.on_bad = "error"
    return strict


def _noted(batch: Any, notes: list[dict[str, Any]]) -> Any:
    counts = batch.get(LENGTH_COUNTS)
    batch[LENGTH_COUNTS] = torch.tensor([len(notes), 0]) + (0 if counts is None else counts)
    batch[QUARANTINED] = [json.dumps(note, ensure_ascii=False) for note in notes]
    return batch


def _called(record: Any, row: int) -> str:
    if isinstance(record, Unreadable):
        return f"sample {record.index}"
    if isinstance(record, Mapping) and record.get("id") is not None:
        return str(record["id"])
    return record_name(record, row) if isinstance(record, Mapping) else show(record)


def _draw(record: Any, number: int, among: int) -> int:
    """A place among so many, by what the record is and nothing else."""
    if isinstance(record, Unreadable):
        what = repr(record.index)
    else:
        texts = {key: value for key, value in record.items() if key not in ("image", "images")}
        what = repr(texts)
    digest = hashlib.sha256(f"{number} {what}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") % among


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"
