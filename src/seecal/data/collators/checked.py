"""Another collator's batches, such as TRL's for prompts and completions, under our rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...constants import IGNORE_INDEX, LENGTH_COUNTS, RECORD_IDS, TOKEN_WEIGHTS
from .conversation import NoLabel, record_name
from .max_length import LengthLimit, no_label_left
from .precomputed_weights import precomputed_weights
from .record_counts import RecordCounts


@dataclass
class CheckedCollator:
    """Another collator's batches, held to the same rules: no image cut, image tokens never labels, weights honoured.

    Args:
        collator: the other one; it must not cut rows itself.
        max_length, on_long, on_bad, pad_to_multiple_of: as in :class:`seecal.VisionCollator`, but a record that is left out
            keeps its row, without labels.
        image_ids: the ids of image tokens.
        with_ids: adds ``record_ids``, how errors call the records of the batch.

    Raises:
        ValueError: a record (named) that is too long, has no label, or whose ``weights`` do not fit its labels.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    max_length: int | None
    image_ids: frozenset[int]
    on_long: str = "error"
    with_ids: bool = False
    on_bad: str = "error"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        self.limit = LengthLimit(self.max_length, self.on_long, self.pad_to_multiple_of)
        self.counts = RecordCounts(self.on_bad)

    def __call__(self, records: list[dict[str, Any]]) -> Any:
        names = [record_name(record, index) for index, record in enumerate(records)]
        batch = self.collator(records)
        images = torch.isin(batch["input_ids"], torch.tensor(sorted(self.image_ids)))
        batch["labels"] = batch["labels"].masked_fill(images, IGNORE_INDEX)
        unlabelled = self._without_label(batch)
        for row in unlabelled:
            self.counts.without_label(NoLabel(f"{names[row]}: no label. Leave it out, or set on_bad to skip."))
        weights = precomputed_weights(records, names, batch["labels"], unlabelled)
        if weights is not None:
            batch[TOKEN_WEIGHTS] = weights
        long = self.limit.too_long(names, batch["attention_mask"])
        if self.on_long == "truncate":
            self._cut(batch, names, [row for row in long if row not in unlabelled])
        for row in long if self.on_long == "drop" else ():
            batch["labels"][row] = IGNORE_INDEX
            if row not in unlabelled:
                tokens = int(batch["attention_mask"][row].sum())
                self.counts.too_long(names[row], tokens, self.max_length)
        if self.on_long != "error" or self.on_bad != "error":
            batch[LENGTH_COUNTS] = self.counts.take()
        if self.with_ids:
            batch[RECORD_IDS] = names
        return batch

    def _cut(self, batch: Any, names: list[str], long: list[int]) -> None:
        lengths = batch["attention_mask"].sum(1).tolist()
        self.limit.cut(batch, long, names, self.image_ids)
        unlabelled = self._without_label(batch)
        for row in long:
            if row in unlabelled:
                self.counts.without_label(no_label_left(names[row], self.max_length))
            else:
                self.counts.cut(names[row], lengths[row], self.max_length)
        if long:
            self.limit.trim(batch)

    @staticmethod
    def _without_label(batch: Any) -> list[int]:
        return [row for row, labels in enumerate(batch["labels"]) if not bool((labels != IGNORE_INDEX).any())]
