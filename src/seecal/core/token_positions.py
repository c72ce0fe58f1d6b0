"""Where everything stands in a batch, known on the host: one small copy from the device answers all questions of layout.

Asking the device for each ("is there an image?", "where are the labels?") would make it wait for the host many times in a
step. B rows, L columns, N label tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import IGNORE_INDEX

_VALID, _IMAGE, _LABEL = 1, 2, 4

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenPositions:
    """What each slot of the padded batch is: NumPy booleans [B, L].

    Attributes:
        valid: not padding.
        image: the placeholder of an image or video (and not padding).
        labelled: predicted by the slot before it; column 0 never is.
    """

    valid: Array
    image: Array
    labelled: Array

    @property
    def predicted_from_padding(self) -> Array:
        """[B, L] bool: labels whose predecessor is padding, such as the first token of a row padded on the left."""
        found = self.labelled.copy()
        found[:, 1:] &= ~self.valid[:, :-1]
        return found

    @property
    def label_places(self) -> tuple[Array, Array]:
        """(row, column) of the N label tokens, row by row."""
        row, column = self.labelled.nonzero()
        return row, column

    @property
    def after_an_image(self) -> Array:
        """[B, L]: an image stands at this slot or somewhere before it in its row."""
        return self.image.cumsum(1) > 0


def read_token_positions(ids: Tensor, valid: Tensor, image: Tensor, labels: Tensor) -> TokenPositions:
    """The only wait for the device in a forward: a byte a slot. All arguments [B, L]; ``valid`` and ``image`` booleans."""
    counted = labels != IGNORE_INDEX
    counted[:, :1] = False  # column 0 has no predecessor
    marks = to_host(valid * _VALID + image * _IMAGE + counted * _LABEL)
    return TokenPositions((marks & _VALID) > 0, (marks & _IMAGE) > 0, (marks & _LABEL) > 0)


def to_host(marks: Tensor) -> Array:
    """The values on the host. Everything that waits for the device goes through here, where a test counts it."""
    return marks.to(torch.uint8).cpu().numpy()


def to_device(device: torch.device, *arrays: Array) -> list[Tensor]:
    """The arrays on the device, without waiting for it."""
    tensors: Iterable[Tensor] = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
