"""Another collator's batches, such as TRL's for prompts and completions, under our rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...constants import IGNORE_INDEX, LENGTH_COUNTS, RECORD_IDS
from .max_length import LengthLimit
from .vision import record_name


@dataclass
class CheckedCollator:
    """Another collator's batches, held to the same rules: no row cut to ``max_length``, image tokens never labels.

    Args:
        collator: the other one; it must not cut rows itself.
        max_length, on_long: as in :class:`VisionCollator`; a dropped record keeps its row, without labels.
        image_ids: the ids of image tokens.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    max_length: int | None
    image_ids: frozenset[int]
    on_long: str = "error"
    with_ids: bool = False

    def __post_init__(self) -> None:
        self.limit = LengthLimit(self.max_length, self.on_long)

    def __call__(self, records: list[dict[str, Any]]) -> Any:
        names = [record_name(record, index) for index, record in enumerate(records)]
        batch = self.collator(records)
        before = self.limit.dropped, self.limit.truncated
        images = torch.isin(batch["input_ids"], torch.tensor(sorted(self.image_ids)))
        batch["labels"] = batch["labels"].masked_fill(images, IGNORE_INDEX)
        long = self.limit.too_long(names, batch["attention_mask"])
        if long and self.on_long == "truncate":
            self.limit.truncate(batch, long, names, set(self.image_ids))
        for row in long if self.on_long == "drop" else ():
            batch["labels"][row] = IGNORE_INDEX
            self.limit.count_dropped(names[row], f"more tokens than max_length={self.max_length}")
        if self.on_long != "error":
            after = self.limit.dropped, self.limit.truncated
            batch[LENGTH_COUNTS] = torch.tensor([now - then for now, then in zip(after, before, strict=True)])
        if self.with_ids:
            batch[RECORD_IDS] = names
        return batch
