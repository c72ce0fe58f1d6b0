"""The pass without the image, run on the decoder's own inputs of the main pass. No gradient, no vocabulary projection.

B rows and L columns of the batch, R rows and T columns of the compact rows, N label tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..families.table import Family
from ..ops.segment_attention import Recalled
from .main_pass import MainPass, gather_tokens, goes_into_one_row
from .packing import Layout, attention_inputs, by_segments, lay_out, to_attention
from .token_positions import Array, TokenPositions, to_device


@dataclass
class ContrastOutput:
    """The pass without the image: hidden [N, D] at every wanted slot (any row where there is none), slots computed."""

    hidden: Tensor | None
    tokens: int
    grid: Tensor | None = None


def tokens_with_contrast(slots: TokenPositions, family: Family, row: Array, before: Array, keeps_image: bool) -> Array:
    """[N] bool: labels with an image before them and a predecessor that both passes have. Elsewhere Δ is 0 by definition.

    ``row``, ``before``: [N], the slot that predicts each label. ``keeps_image``: the contrast leaves an image in place, so
    that slot may be its last.
    """
    there = slots.valid if keeps_image else kept_positions(slots, family)
    reach: Array = there[row, before] & slots.after_an_image[row, before]
    return reach


def kept_positions(slots: TokenPositions, family: Family) -> Array:
    """[B, L] bool: what the pass without the image has. With cross-attention the placeholder is a word like others."""
    return slots.valid if family.cross_attention else slots.valid & ~slots.image


def prefix_positions(slots: TokenPositions, family: Family) -> Array:
    """[B, L] bool: the slots before the first image, of samples for which the pass without it has something to do.

    In a causal decoder their keys and values are those of the pass with the image.
    """
    row, column = slots.label_places
    needed = np.zeros(len(slots.valid), dtype=bool)
    needed[row[tokens_with_contrast(slots, family, row, column - 1, False)]] = True
    prefix: Array = slots.valid & ~slots.after_an_image & needed[:, None]
    return prefix


def positions_to_run(main: MainPass, family: Family, reach: Array, row: Array, before: Array) -> Array:
    """[B, L] bool: the text slots of each sample up to the last that predicts a label within reach."""
    last = np.full(len(main.valid), -1)
    np.maximum.at(last, row, np.where(reach, before, -1))
    keep: Array = kept_positions(main.slots, family) & (np.arange(main.valid.shape[1])[None] <= last[:, None])
    return keep


@torch.no_grad()
def drop_pass(
    decoder: Any, family: Family, main: MainPass, reach: Array, row: Array, before: Array,
    padding_free: bool | str, all_ranks: bool,
) -> ContrastOutput:  # fmt: skip
    """Runs the decoder on the text slots alone, at their original positions.

    Only samples that need it, and only up to the last slot that predicts one of their labels. ``all_ranks``: another
    rank may have something to run, so run one token even when this one has nothing.
    """
    keep = positions_to_run(main, family, reach, row, before)
    if not keep.any():
        if not all_ranks:
            return ContrastOutput(None, 0)
        keep[0, 0] = True
    attention = decoder.config._attn_implementation
    layout, recalled = _text_rows(decoder, family, main, keep, padding_free)
    extra = {
        name: gather_tokens(value, layout, main.valid.shape)
        for name, value in main.extra.items()
        if name not in family.omit
    }
    embeds = layout.take(main.embeds)
    with without_dropout(decoder):
        hidden = decoder(
            inputs_embeds=embeds,
            position_ids=layout.take_positions(main.positions),
            use_cache=False,
            **attention_inputs(main.masks, layout, attention, embeds.dtype, recalled=recalled),
            **extra,
        )[0]
    assert recalled is None or recalled[0].layers == 0, "a layer did not ask for its prefixes"
    (wanted,) = to_device(hidden.device, layout.slot[row, before].clip(min=0))  # out of reach: any, its Δ is set to 0
    return ContrastOutput(hidden.flatten(0, 1).index_select(0, wanted), layout.row.numel())


def _text_rows(
    decoder: Any, family: Family, main: MainPass, keep: Array, padding_free: bool | str
) -> tuple[Layout, Recalled | None]:
    """(the kept slots' rows, without what comes before the first images where the main pass has kept that)."""
    attention = decoder.config._attn_implementation
    if main.prefixes is not None and main.prefix is not None:
        own = keep & ~main.prefix
        layout = lay_out(own, True, main.valid.device)
        if by_segments(main.masks, layout, attention):
            return layout, (main.prefixes, tuple(main.prefix.sum(1)[own.any(1)].tolist()))
    packed = goes_into_one_row(main, decoder, family, keep, padding_free)
    return lay_out(keep, packed, main.valid.device), None


@torch.no_grad()
def mask_pass(
    decoder: Any, family: Family, main: MainPass, row: Array, before: Array, whole_grid: bool
) -> ContrastOutput:
    """Runs the decoder on the full rows with the image slots hidden in the attention mask."""
    attention = decoder.config._attn_implementation
    kept = main.valid if family.cross_attention else main.valid & ~main.image
    hide = (kept | ~main.valid)[:, None, None, :]
    extra = {name: value for name, value in main.extra.items() if not (family.cross_attention and name in family.omit)}
    mask: Any
    if main.masks is None:
        mask = kept.long()
    elif isinstance(main.masks, dict):
        mask = {kind: to_attention(one & hide, attention, main.embeds.dtype) for kind, one in main.masks.items()}
    else:
        mask = to_attention(main.masks & hide, attention, main.embeds.dtype)
    with without_dropout(decoder):
        hidden = decoder(
            inputs_embeds=main.embeds, attention_mask=mask, position_ids=main.positions, use_cache=False, **extra
        )[0]
    (wanted,) = to_device(hidden.device, row * main.valid.shape[1] + before)
    return ContrastOutput(
        hidden.flatten(0, 1).index_select(0, wanted), main.valid.numel(), hidden if whole_grid else None
    )


@contextmanager
def without_dropout(decoder: Any) -> Iterator[None]:
    """The decoder in eval mode inside the block: dropout would add noise to Δ. Every module's own mode comes back."""
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def decoder_dropout(decoder: Any) -> float:
    """The largest dropout probability of the decoder, its attention's and its adapters' included."""
    rates = [module.p for module in decoder.modules() if isinstance(module, nn.Dropout)]
    rates += [getattr(decoder.config, name, None) or 0.0 for name in ("attention_dropout", "dropout")]
    return max((float(rate) for rate in rates), default=0.0)
