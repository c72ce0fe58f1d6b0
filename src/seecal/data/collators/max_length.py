"""Records that are longer than ``max_length``: an error, left out, or cut after their last image. Counted, never silent.

B rows, L columns of a batch that is already padded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...constants import IGNORE_INDEX
from ..options import ON_LONG

logger = logging.getLogger(__name__)


@dataclass
class LengthLimit:
    """What happens to records of more than ``max_length`` tokens, image tokens included.

    Args:
        max_length: in tokens; None: no limit.
        on_long: ``error``: ValueError naming the record. ``drop``: it takes no part (in its place stands a row of one token
            without a label). ``truncate``: its text after the last image is cut; where the images alone do not fit, or no
            label is left, ``truncate`` is an error or counts as dropped.

    Attributes:
        dropped, truncated: how many so far in this process.
    """

    max_length: int | None = None
    on_long: str = "error"
    dropped: int = field(default=0, init=False)
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.on_long not in ON_LONG:
            raise ValueError(f"on_long={self.on_long!r}: expected one of {', '.join(ON_LONG)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: expected 1 or more tokens, or None for no limit")

    def too_long(self, names: list[str], mask_BL: Tensor) -> list[int]:
        """The rows that are too long. ValueError for the first of them if that is an error."""
        if self.max_length is None:
            return []
        lengths = mask_BL.sum(1).tolist()
        rows = [row for row, length in enumerate(lengths) if length > self.max_length]
        if rows and self.on_long == "error":
            raise ValueError(
                f"{names[rows[0]]}: {lengths[rows[0]]} tokens, image tokens included, are more than "
                f"max_length={self.max_length}, and cutting could cut an image. Set max_length to at least "
                f"{lengths[rows[0]]} or to None, set on_long to drop or truncate, or leave the record out."
            )
        return rows

    def count_dropped(self, name: str, why: str) -> None:
        self.dropped += 1
        _say(self.dropped, "%s left out (%d so far): %s", name, self.dropped, why)

    def truncate(self, batch: dict[str, Any], rows: list[int], names: list[str], image_ids: set[int]) -> None:
        """Cuts the text of these rows after their last image, in place, and the columns that nobody needs any more."""
        assert self.max_length is not None
        mask, labels = batch["attention_mask"], batch["labels"]
        for row in rows:
            place = mask[row].cumsum(0)  # 1-based place in the row, whatever the side of the padding
            images = torch.isin(batch["input_ids"][row], torch.tensor(sorted(image_ids))) & mask[row].bool()
            last_image = int(place[images].max()) if bool(images.any()) else 0
            if last_image > self.max_length:
                raise ValueError(
                    f"{names[row]}: its last image ends at token {last_image}, after max_length={self.max_length}; an "
                    "image cannot be cut. Raise max_length, make the images smaller, or set on_long to drop."
                )
            beyond = place > self.max_length
            mask[row, beyond], labels[row, beyond] = 0, IGNORE_INDEX
            if bool((labels[row] != IGNORE_INDEX).any()):
                self.truncated += 1
                _say(self.truncated, "%s cut to %d tokens (%d so far)", names[row], self.max_length, self.truncated)
            else:
                self.count_dropped(names[row], f"no label within max_length={self.max_length}")
        _trim(batch)


def _say(count: int, message: str, *values: object) -> None:
    """The first ten by name, then every thousandth: a log of a million lines says less."""
    if count <= 10 or count % 1000 == 0:
        logger.warning(message, *values)


def _trim(batch: dict[str, Any]) -> None:
    """Takes the columns away that are padding in every row."""
    used = batch["attention_mask"].any(0)
    shape = batch["attention_mask"].shape
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == shape:
            batch[name] = value[:, used]
