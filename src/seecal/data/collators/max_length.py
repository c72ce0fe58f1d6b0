"""Records that are longer than ``max_length``: an error, left out, or cut after their last image.

B rows, L columns of a batch that is already padded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...constants import IGNORE_INDEX
from ..options import check_on_long


class TooLong(ValueError):
    """The record is longer than it may be, where that is to be an error."""


@dataclass(frozen=True)
class LengthLimit:
    """What happens to records of more than ``max_length`` tokens, image tokens included.

    Args:
        max_length: in tokens; None: no limit.
        on_long: ``error``: ValueError naming the record. ``drop``: it takes no part. ``truncate``: its text after the last
            image is cut; where the images alone do not fit, that is an error too.
        pad_to_multiple_of: what the batch is padded to a multiple of, in tokens: it stays so when columns are cut.
    """

    max_length: int | None = None
    on_long: str = "error"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_on_long(self.on_long)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: expected 1 or more tokens, or None for no limit")

    def too_long(self, names: list[str], mask_BL: Tensor) -> list[int]:
        """The rows that are too long. ValueError for the first of them if that is an error."""
        if self.max_length is None:
            return []
        lengths = mask_BL.sum(1).tolist()
        rows = [row for row, length in enumerate(lengths) if length > self.max_length]
        if rows and self.on_long == "error":
            raise TooLong(
                f"{names[rows[0]]}: {lengths[rows[0]]} tokens, image tokens included, are more than "
                f"max_length={self.max_length}, and cutting could cut an image. Set max_length to at least "
                f"{lengths[rows[0]]} or to None, set on_long to drop or truncate, or leave the record out."
            )
        return rows

    def cut(self, batch: dict[str, Any], rows: Iterable[int], names: list[str], image_ids: Iterable[int]) -> None:
        """Hides the text of these rows after ``max_length`` and takes its labels away, in place; all columns stay.

        Raises:
            ValueError: an image of a row ends after ``max_length``.
        """
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

    def trim(self, batch: dict[str, Any]) -> None:
        """Takes the columns away that are padding in every row, but for those that the multiple asks for."""
        mask = batch["attention_mask"]
        keep = mask.any(0)
        missing = -int(keep.sum()) % (self.pad_to_multiple_of or 1)
        keep[(~keep).nonzero().flatten()[:missing]] = True
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == mask.shape:
                batch[name] = value[:, keep]


def no_label_left(name: str, max_length: int | None) -> ValueError:
    """The error of a record whose answers lie beyond ``max_length`` altogether."""
    return ValueError(
        f"{name}: no label: its answers begin after max_length={max_length} tokens, where on_long='truncate' cuts. Raise "
        "max_length, leave the record out, or set on_bad to skip."
    )
