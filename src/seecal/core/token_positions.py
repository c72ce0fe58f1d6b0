"""Where everything stands in a batch, known on the host: one small copy from the device answers all questions of layout.

Asking the device for each ("is there an image?", "where are the labels?") would make it wait for the host many times in a
step. B rows, L columns, N label tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import IGNORE_INDEX, NO_CONTRAST, TOKEN_WEIGHTS

_VALID, _IMAGE, _LABEL, _WRONG_WEIGHT, _NO_CONTRAST = 1, 2, 4, 8, 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenPositions:
    """What stands at each position of the padded batch: NumPy booleans [B, L].

    Attributes:
        valid: not padding.
        image: the placeholder of an image or video (and not padding).
        labelled: predicted by the position before it; column 0 never is.
        no_contrast: of a row whose image nothing could be put in the place of.
    """

    valid: Array
    image: Array
    labelled: Array
    no_contrast: Array

    @property
    def predicted_from_padding(self) -> Array:
        """[B, L] bool: labels whose predecessor is padding, such as the first token of a row padded on the left."""
        found = self.labelled.copy()
        found[:, 1:] &= ~self.valid[:, :-1]
        return found

    @property
    def after_an_image(self) -> Array:
        """[B, L] bool: an image stands at this position or somewhere before it in its row."""
        return self.image.cumsum(1) > 0


@dataclass(frozen=True)
class LabelTokens:
    """The N label tokens of a batch, row by row.

    Attributes:
        row, column: [N] on the host, where each stands in the batch.
        ids, sample, position: [N] int64 on the device, its id, row and column.
    """

    row: Array
    column: Array
    ids: Tensor
    sample: Tensor
    position: Tensor

    @property
    def predecessor(self) -> Array:
        """[N] on the host: the column that predicts each."""
        before: Array = self.column - 1
        return before

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as the model takes it, read once for both passes.

    Attributes:
        positions: what stands where, on the host.
        valid, image: [B, L] bool on the device: not padding; placeholder of an image or video.
        labels: the label tokens.
    """

    positions: TokenPositions
    valid: Tensor
    image: Tensor
    labels: LabelTokens

    @property
    def has_image(self) -> bool:
        return bool(self.positions.image.any())


def read_batch(inputs: Mapping[str, Any], image_ids: Iterable[int]) -> PaddedBatch:
    """The only wait for the device in a forward: a byte a token position.

    Args:
        inputs: what the model's forward takes: ``input_ids`` and ``labels`` [B, L], perhaps ``attention_mask``; and perhaps
            ``token_weights`` [B, L], weights that somebody has measured before, and ``contrast_missing`` [B].
        image_ids: the ids of placeholders, at least one.

    Raises:
        ValueError: no input_ids; a mask or weights that are not [B, L]; a weight below 0 or not finite at a label.
    """
    ids, mask, labels_BL = inputs.get("input_ids"), inputs.get("attention_mask"), inputs["labels"]
    if ids is None:
        raise ValueError(
            "CAL needs input_ids: they say where the images are. This batch has "
            f"{', '.join(sorted(name for name, value in inputs.items() if value is not None))}. Adapters of virtual tokens "
            "(PEFT's prompt tuning) hand on embeddings only: use one inside the layers, such as peft.LoraConfig."
        )
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: CAL needs the 2-D one, [B, L] with 0 at padding"
        )
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # A row's padding may hold the placeholder's id
    image = functools.reduce(torch.logical_or, (ids == image_id for image_id in sorted(image_ids))) & valid
    counted = labels_BL != IGNORE_INDEX
    counted[:, :1] = False  # column 0 has no predecessor
    wrong = _wrong_weights(inputs.get(TOKEN_WEIGHTS), counted)
    marks = valid * _VALID + image * _IMAGE + counted * _LABEL + wrong * _WRONG_WEIGHT
    if (missing_B := inputs.get(NO_CONTRAST)) is not None:
        marks = marks + missing_B[:, None] * _NO_CONTRAST
    marks = to_host(marks)
    if (marks & _WRONG_WEIGHT).any():
        at = tuple(int(place[0]) for place in (marks & _WRONG_WEIGHT).nonzero())
        raise ValueError(
            f"{TOKEN_WEIGHTS} at row {at[0]}, column {at[1]} is {float(inputs[TOKEN_WEIGHTS][at]):g}: weights must be "
            "finite and not negative"
        )
    positions = TokenPositions(*((marks & mark) > 0 for mark in (_VALID, _IMAGE, _LABEL, _NO_CONTRAST)))
    row, column = positions.labelled.nonzero()
    sample, position = to_device(labels_BL.device, row, column)
    return PaddedBatch(positions, valid, image, LabelTokens(row, column, labels_BL[sample, position], sample, position))


def _wrong_weights(weights_BL: Tensor | None, counted_BL: Tensor) -> Tensor:
    """[B, L] bool: labels whose weight cannot be one."""
    if weights_BL is None:
        return torch.zeros_like(counted_BL)
    if weights_BL.shape != counted_BL.shape:
        raise ValueError(
            f"{TOKEN_WEIGHTS} of shape {tuple(weights_BL.shape)} with labels of shape {tuple(counted_BL.shape)}: expected "
            "[B, L], a weight at every label's place, not shifted"
        )
    return counted_BL & ~((weights_BL >= 0) & weights_BL.isfinite())


def to_host(marks: Tensor) -> Array:
    """The values on the host. Everything that waits for the device goes through here, where a test counts it."""
    return marks.to(torch.uint8).cpu().numpy()


def to_device(device: torch.device, *arrays: Array) -> list[Tensor]:
    """The arrays on the device, without waiting for it."""
    tensors: Iterable[Tensor] = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
