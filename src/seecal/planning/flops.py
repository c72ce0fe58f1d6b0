"""Floating-point operations of a stage: both passes, the head, the tower, and what is computed twice.

Counted are matrix products, convolutions and attention, over all pairs of a record's tokens; norms, activations and copies
are not, as in the usual definition of MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cost import Flops
from .stage_model import StageModel
from .workload import Row, Workload


@dataclass(frozen=True)
class StageFlops:
    """Of all records that a stage trains on.

    Attributes:
        forward, backward: of the pass with the image; head and tower included.
        recomputed: by gradient checkpointing.
        contrast: of the pass without the image.
        vision: the tower's and the projector's part of ``forward``.
    """

    forward: float
    backward: float
    recomputed: float
    contrast: float
    vision: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed + self.contrast

    @property
    def cal_share(self) -> float:
        """CAL's part of everything."""
        return self.contrast / self.total


def flops_of(found: StageModel, work: Workload, records: int) -> StageFlops:
    """Of ``records`` records such as the workload's."""
    rows = [_of_row(found, row) for row in work.rows]
    return StageFlops(*(work.average(values) * records for values in zip(*rows, strict=True)))


def _of_row(found: StageModel, row: Row) -> tuple[float, float, float, float, float]:
    decoder, images, head = found.decoder, found.images, found.head
    share = row.image / images.tokens
    vision, vision_back = images.forward * share, images.backward * share
    product = head.flops * row.labels
    forward = decoder.forward.of(row.tokens) + product + vision
    # The gradient of the hidden states, and of the head's weight where it trains
    backward = decoder.backward.of(row.tokens) + product * (1 + head.trains) + vision_back
    recomputed = 0.0
    if found.checkpointed:
        recomputed = decoder.recomputed.of(row.tokens) + images.recomputed * share
    return forward, backward, recomputed, _contrast(found, row, vision), vision


def _contrast(found: StageModel, row: Row, vision: float) -> float:
    if found.contrast is None or not row.image:
        return 0.0
    layers: Flops = found.decoder.forward
    if found.contrast == "drop":
        # What stands before the image is looked at and not computed again
        return layers.of(row.after, row.before + row.after) / found.settings.contrast_every
    whole = layers.of(row.tokens) + (vision if found.contrast == "pixels" else 0.0)
    return whole / found.settings.contrast_every
