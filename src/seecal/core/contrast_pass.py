"""The pass without the image, run on the decoder's own inputs of the main pass. No gradient, no vocabulary projection.

B rows and L columns of the batch, R rows and T columns of the compact rows, N label tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import CONTRAST_PREFIX, NO_CONTRAST
from ..families.table import Family
from ..ops.segment_attention import Recalled
from . import main_pass
from .decoder import TextDecoder, frequencies_of, without_dropout
from .main_pass import MainPass, gather_tokens, goes_into_one_row
from .packing import Layout, attention_inputs, by_segments, lay_out, to_attention
from .token_positions import Array, PaddedBatch, TokenPositions, to_device


@dataclass(frozen=True)
class ContrastOutput:
    """What the pass without the image gives.

    Attributes:
        hidden: [N, D] where the label tokens are predicted (any row where there is none); None: nothing ran.
        tokens: token positions that went through the decoder.
        grid: [B, L, D] at every position, for the released pooling only.
    """

    hidden: Tensor | None
    tokens: int
    grid: Tensor | None = None


def tokens_with_contrast(batch: PaddedBatch, family: Family, keeps_image: bool) -> Array:
    """[N] bool: labels with an image before them and a predecessor that both passes have. Elsewhere Δ is 0 by definition.

    ``keeps_image``: the contrast leaves an image in place, so the predecessor may be the image's last position.
    """
    positions, labels = batch.positions, batch.labels
    there = positions.valid if keeps_image else kept_positions(positions, family)
    places = labels.row, labels.predecessor
    has_contrast: Array = there[places] & positions.after_an_image[places]
    return has_contrast & ~positions.no_contrast[places] if keeps_image else has_contrast


def kept_positions(positions: TokenPositions, family: Family) -> Array:
    """[B, L] bool: what the pass without the image has. With cross-attention the placeholder is a word like others."""
    return positions.valid if family.cross_attention else positions.valid & ~positions.image


def prefix_positions(batch: PaddedBatch, family: Family) -> Array:
    """[B, L] bool: what stands before the first image, in samples for which the pass without it has something to do.

    In a causal decoder the keys and values there are those of the pass with the image.
    """
    positions = batch.positions
    needed = np.zeros(len(positions.valid), dtype=bool)
    needed[batch.labels.row[tokens_with_contrast(batch, family, keeps_image=False)]] = True
    prefix: Array = positions.valid & ~positions.after_an_image & needed[:, None]
    return prefix


def positions_to_run(batch: PaddedBatch, family: Family, has_contrast: Array) -> Array:
    """[B, L] bool: the text of each sample up to the last position that predicts a label with a contrast."""
    rows, length = batch.positions.valid.shape
    last = np.full(rows, -1)
    np.maximum.at(last, batch.labels.row, np.where(has_contrast, batch.labels.predecessor, -1))
    keep: Array = kept_positions(batch.positions, family) & (np.arange(length)[None] <= last[:, None])
    return keep


@torch.no_grad()
def drop_pass(main: MainPass, has_contrast: Array, padding_free: bool | str, all_ranks: bool) -> ContrastOutput:
    """Runs the decoder on the text alone, at its original positions.

    Only samples that need it, and only up to the last position that predicts one of their labels. ``all_ranks``: another
    rank may have something to run, so run one token even when this one has nothing. Where queries are scaled by their
    place in the row the image is masked instead, which leaves every token in its place.
    """
    decoder, batch, inputs = main.decoder, main.batch, main.inputs
    keep = positions_to_run(batch, decoder.family, has_contrast)
    if not keep.any():
        if not all_ranks:
            return ContrastOutput(None, 0)
        keep[0, 0] = True
    elif decoder.scales_by_index(keep.shape[1]):
        return mask_pass(main, whole_grid=False)
    layout, recalled = _text_rows(main, keep, padding_free)
    extra = {
        name: gather_tokens(value, layout, batch.valid.shape)
        for name, value in inputs.extra.items()
        if name not in decoder.family.omit
    }
    embeds = layout.take(inputs.embeds)
    with without_dropout(decoder.module), frequencies_of(decoder.module, inputs.position_ids):
        hidden = decoder.module(
            inputs_embeds=embeds,
            position_ids=layout.take_positions(inputs.position_ids),
            use_cache=False,
            **attention_inputs(inputs.masks, layout, decoder.attention, embeds.dtype, recalled=recalled),
            **extra,
        )[0]
    assert recalled is None or recalled[0].layers == 0, "a layer did not ask for its prefixes"
    # Without a contrast: any row, its Δ is set to 0
    flat = layout.index[batch.labels.row, batch.labels.predecessor].clip(min=0)
    (flat_N,) = to_device(hidden.device, flat)
    return ContrastOutput(hidden.flatten(0, 1).index_select(0, flat_N), layout.row.numel())


def _text_rows(main: MainPass, keep: Array, padding_free: bool | str) -> tuple[Layout, Recalled | None]:
    """(the rows of what is kept, without what comes before the first images where the main pass has kept that)."""
    decoder, masks, device = main.decoder, main.inputs.masks, main.batch.valid.device
    if main.prefixes is not None:
        before = main.prefixes.positions
        own = keep & ~before
        layout = lay_out(own, True, device)
        if by_segments(masks, layout, decoder.attention):
            return layout, (main.prefixes.cache, tuple(before.sum(1)[own.any(1)].tolist()))
    packed = goes_into_one_row(decoder, masks, keep, padding_free)
    return lay_out(keep, packed, device), None


@torch.no_grad()
def mask_pass(main: MainPass, whole_grid: bool) -> ContrastOutput:
    """Runs the decoder on the full rows with the image positions hidden in the attention mask.

    ``whole_grid``: also give the hidden states of every position.
    """
    decoder, batch, inputs = main.decoder, main.batch, main.inputs
    with without_dropout(decoder.module):
        hidden = decoder.module(
            inputs_embeds=inputs.embeds,
            attention_mask=_mask_without_images(main),
            position_ids=inputs.position_ids,
            use_cache=False,
            **_extra_without_images(decoder, inputs.extra),
        )[0]
    flat = batch.labels.row * batch.valid.shape[1] + batch.labels.predecessor
    (flat_N,) = to_device(hidden.device, flat)
    at_labels = hidden.flatten(0, 1).index_select(0, flat_N)
    return ContrastOutput(at_labels, batch.valid.numel(), hidden if whole_grid else None)


def _mask_without_images(main: MainPass) -> Any:
    """The decoder's attention mask, image positions hidden."""
    decoder, batch, inputs = main.decoder, main.batch, main.inputs
    kept = batch.valid if decoder.family.cross_attention else batch.valid & ~batch.image
    if inputs.masks is None:
        return kept.long()
    visible = (kept | ~batch.valid)[:, None, None, :]
    if isinstance(inputs.masks, dict):
        return {
            kind: to_attention(mask & visible, decoder.attention, inputs.embeds.dtype)
            for kind, mask in inputs.masks.items()
        }
    return to_attention(inputs.masks & visible, decoder.attention, inputs.embeds.dtype)


def _extra_without_images(decoder: TextDecoder, extra: dict[str, Any]) -> dict[str, Any]:
    """Placeholders keep their image features under the mask; what enters by cross-attention is left out."""
    hidden = decoder.family.omit if decoder.family.cross_attention else ()
    return {name: value for name, value in extra.items() if name not in hidden}


@torch.no_grad()
def pixel_pass(
    model: Any, main: MainPass, inputs: dict[str, Any], contrast: str, padding_free: bool | str, all_ranks: bool
) -> ContrastOutput:
    """The whole batch again, vision tower and all, on images without their content: the batch's ``contrast_*`` inputs.

    Raises:
        ValueError: the batch has pixels and none without their content.
    """
    changed = {
        name.removeprefix(CONTRAST_PREFIX): value
        for name, value in inputs.items()
        if name.startswith(CONTRAST_PREFIX) and name != NO_CONTRAST
    }
    missing = sorted(name for name in inputs if name.startswith("pixel_values") and name not in changed)
    if missing:
        raise ValueError(
            f"contrast={contrast!r} needs {', '.join(CONTRAST_PREFIX + name for name in missing)} in the batch: the "
            "images without their content. CALTrainer's collator makes them from messages data; elsewhere use "
            f"seecal.VisionCollator(processor, contrast={contrast!r}, strength=...)."
        )
    with without_dropout(model.base_model):
        again = main_pass.run(
            model,
            main.decoder,
            main.batch,
            {**main_pass.own_inputs(inputs), **changed},
            padding_free=padding_free,
            all_ranks=all_ranks,
        )
    return ContrastOutput(again.hidden_at_labels(), again.tokens)
