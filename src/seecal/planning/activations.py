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
        layer: one layer computed again and its gradients, in the backward.
        contrast: the pass without the image, which keeps nothing for a backward.
        head: a chunk of logits, and the gradients that are computed with it. All logits never exist.
    """

    decoder: float
    images: float
    layer: float
    contrast: float
    head: float

    @property
    def total(self) -> float:
        """The last three come one after another: the largest of them counts."""
        return self.decoder + self.images + max(self.layer, self.contrast, self.head)


def activations_of(engine: str, found: StageModel, work: Workload, precision: Precision) -> Activations:
    """Of the longest records that can stand in one micro-batch."""
    decoder, head, size = found.decoder, found.head, found.size
    rows = work.largest_batch(found.settings.per_device_train_batch_size)
    batch = sums(rows)
    width = between_layers_width(engine, precision) if found.bf16 else found.width
    between = decoder.between * width / size
    if found.settings.gradient_checkpointing:
        kept, layer = decoder.count * between, 2 * decoder.layer
    else:
        kept, layer = decoder.saved, decoder.layer
    contrast = 0.0
    if found.contrast == "drop":
        contrast = batch.after * decoder.layer + batch.before * decoder.key_values
    elif found.contrast is not None:
        contrast = batch.tokens * decoder.layer
    chunk = min(batch.labels, found.settings.chunk_size or max(1, CHUNK_LOGITS // head.vocabulary))
    weight = head.vocabulary * head.width * (_FLOAT32 if chunk < batch.labels else size) if head.trains else 0
    # Logits in float32 and their gradient; hidden states at the labels and their gradient; the weight's gradient
    logits = chunk * head.vocabulary * (_FLOAT32 + size) + 2 * batch.labels * head.width * size + weight
    return Activations(kept * batch.tokens, _images(found, batch.image), layer * batch.tokens, contrast, logits)


def _images(found: StageModel, tokens: float) -> float:
    images = found.images
    if not images.tower_trains:
        kept = images.saved
    elif found.settings.gradient_checkpointing:
        kept = images.between + 2 * images.layer
    else:
        kept = images.saved
    return (kept + images.features) * tokens / images.tokens
