"""Bytes of what a micro-batch leaves on a GPU: kept for the backward, and worked with for a moment."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.linear_cross_entropy import CHUNK_LOGITS
from .memory import Precision, between_layers_width
from .stage_model import StageModel
from .workload import Workload, sums

_FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Of the largest micro-batch.

    Attributes:
        decoder: kept by the decoder for the backward.
        images: pixels, features, and what tower and projector keep.
        layer: worked with in the backward of one layer, computed again or not.
        contrast: the pass without the image, which keeps nothing for a backward.
        head: a chunk of logits, and the gradients that are computed with it. All logits never exist.
        tower: worked with by the tower, in its forward or its backward.
    """

    decoder: float
    images: float
    layer: float
    contrast: float
    head: float
    tower: float

    @property
    def momentary(self) -> float:
        """Layer, pass without the image, and head come one after another: the largest of them."""
        return max(self.layer, self.contrast, self.head)

    @property
    def total(self) -> float:
        """The tower runs before the decoder has kept anything, and backwards when all of that is gone."""
        return self.images + max(self.decoder + self.momentary, self.tower)


def activations_of(engine: str, found: StageModel, work: Workload, precision: Precision) -> Activations:
    """Of the longest records that can stand in one micro-batch."""
    decoder, size = found.decoder, found.size
    rows = work.largest_batch(found.settings.per_device_train_batch_size)
    batch = sums(rows)
    held = decoder.checkpointed if found.checkpointed else decoder.plain
    width = between_layers_width(engine, precision) if found.bf16 else found.width
    wider = decoder.count * decoder.between * (width / size - 1)
    # The embeddings of the batch as it came, which the pass without the image reads
    padded = len(rows) * max(row.tokens for row in rows) * decoder.between
    share = batch.image / found.images.tokens
    images = found.images.checkpointed if found.checkpointed else found.images.plain
    contrast = 0.0
    if found.contrast == "drop":
        contrast = batch.after * decoder.alone + batch.before * decoder.key_values
    elif found.contrast is not None:
        contrast = batch.tokens * decoder.alone
    return Activations(
        decoder=(held.kept + wider) * batch.tokens + padded,
        images=(images.kept + found.images.pixels) * share,
        layer=held.working * batch.tokens,
        contrast=contrast,
        head=_head(found, batch.labels),
        tower=max(images.working, found.images.forward_peak) * share,
    )


def _head(found: StageModel, labels: float) -> float:
    """Logits in float32 and their gradient; hidden states at the labels and their gradient; the weight's gradient."""
    head, size = found.head, found.size
    chunk = min(labels, found.settings.chunk_size or max(1, CHUNK_LOGITS // head.vocabulary))
    logits = chunk * head.vocabulary * (_FLOAT32 + (size if size < _FLOAT32 else 0))
    weight = head.vocabulary * head.width * (_FLOAT32 if chunk < labels else size) if head.trains else 0
    return logits + 2 * labels * head.width * size + weight
