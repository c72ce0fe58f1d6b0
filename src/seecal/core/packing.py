"""Padded rows ↔ rows without the dropped tokens, and the attention that goes with them.

B rows and L columns of the batch as it came; R rows and T columns of the compact form. A packed layout has R = 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.segment_attention import Prefixes, Recalled, SegmentMask, segment_bounds
from .token_positions import Array, to_device

# With a dense [T, T] mask, a packed row of more tokens costs more in attention than its padding saved.
MAX_DENSE_TOKENS = 4096
_DENSE_ATTENTION = ("sdpa", "eager")
_FLASH = "flash_attention"
_ANY_FLASH = "flash"  # in the names of kernels from the Hub too

Masks = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Which token position of the padded batch stands where in the compact rows.

    Attributes:
        row, column: [R, T] int64, the place in the batch (0, 0 at padding).
        filled: [R, T] bool.
        index: [B, L] int64 on the host, a position's index into the flattened [R*T], -1 where it was dropped.
        lengths: kept positions of each row of the batch that has any.
    """

    row: Tensor
    column: Tensor
    filled: Tensor
    index: Array
    lengths: tuple[int, ...]

    @property
    def packed(self) -> bool:
        """All samples in one row, nothing but real tokens in it."""
        return self.row.numel() == sum(self.lengths) and len(self.row) == 1

    def take(self, values: Tensor) -> Tensor:
        """[B, L, ...] → [R, T, ...]."""
        # Not values[row, column]: the gradient of that sorts its indices
        places = (self.row * values.shape[1] + self.column).flatten()
        return values.flatten(0, 1).index_select(0, places).view(*self.row.shape, *values.shape[2:])

    def take_positions(self, positions: Tensor) -> Tensor:
        """[..., B, L] → [..., R, T]; M-RoPE ids have axes in front."""
        return positions[..., self.row, self.column]


def lay_out(keep_BL: Array, packed: bool, device: torch.device) -> Layout:
    """The kept positions of every row that has any, in order: all in one row, or one row a sample padded on the right."""
    row_S, column_S = keep_BL.nonzero()
    counts = keep_BL.sum(1)
    lengths = tuple(int(count) for count in counts if count)
    shape = (1, len(row_S)) if packed else (len(lengths), max(lengths, default=0))
    flat = np.arange(len(row_S))
    if not packed:
        line = (counts > 0).cumsum() - 1  # row of the batch -> row of the compact form
        rank_BL = keep_BL.cumsum(1) - 1  # column of the batch -> column of the compact form
        flat = line[row_S] * shape[1] + rank_BL[row_S, column_S]
    index = np.full(keep_BL.shape, -1)
    index[row_S, column_S] = flat
    row, column, filled = (np.zeros(shape, dtype) for dtype in (np.int64, np.int64, np.bool_))
    row.reshape(-1)[flat], column.reshape(-1)[flat], filled.reshape(-1)[flat] = row_S, column_S, True
    row_RT, column_RT, filled_RT = to_device(device, row, column, filled)
    return Layout(row_RT, column_RT, filled_RT, index, lengths)


def use_packed(
    padding_free: bool | str,
    keep_BL: Array,
    attention: str,
    *,
    dense: bool,
    packs: bool = True,
    takes_bounds: bool = True,
) -> bool:
    """Whether the kept positions go into one packed row.

    Args:
        dense: a [T, T] mask is needed (windows, prefixes, eager attention), not just segments.
        packs: whether the model family allows it.
        takes_bounds: whether the decoder hands keyword arguments on to its attention, where FlashAttention looks for them.

    Raises:
        ValueError: ``padding_free=True`` with an attention that cannot keep the samples of a row apart, or a family that
            cannot be packed.
    """
    if padding_free is False:
        return False
    flash = attention.startswith(_FLASH)
    possible = takes_bounds and not dense if flash else attention in _DENSE_ATTENTION
    if padding_free is True and not packs:
        raise ValueError(
            "padding_free=True with a decoder that carries a state from token to token (linear attention, short "
            "convolutions), or may do so because its family has no row in seecal.FAMILIES: in a packed row the state "
            "would run on into the next sample. Set padding_free='auto' or False, or declare the family."
        )
    if padding_free is True and not possible:
        raise ValueError(
            f"padding_free=True with attn_implementation={attention!r}: it cannot keep the samples of a packed row apart "
            "in this model. Set padding_free='auto' or False, or load the model with attn_implementation='sdpa'."
        )
    lengths = keep_BL.sum(1)[keep_BL.any(1)]
    if padding_free is True:
        return len(lengths) > 0
    uneven = len(set(lengths.tolist())) > 1  # else there is no padding to save
    return packs and possible and uneven and (not dense or int(lengths.sum()) <= MAX_DENSE_TOKENS)


def by_segments(masks: Masks | None, layout: Layout, attention: str) -> bool:
    """Whether the compact row is kept apart by a :class:`SegmentMask`."""
    # One token: transformers then lays the heads of a group where the tokens are
    return masks is None and attention == "sdpa" and layout.packed and layout.row.numel() > 1


def needs_dense(masks: Masks | None, attention: str) -> bool:
    """Whether a packed row needs a mask of [T, T]: its segments alone do not say who may look at whom."""
    return masks is not None or attention == "eager"


def full_masks(config: Any, given: Any, valid_BL: Tensor) -> Masks | None:
    """The main pass's own attention as booleans [B, 1, L, L], True = may look; a dict where layers differ.

    Args:
        config: the decoder's configuration.
        given: what the VLM handed to its decoder: None, a 2-D mask, a 4-D mask, or a dict of 4-D masks.
        valid_BL: True where there is no padding.

    Returns:
        None where the attention is plain causal ∧ valid, which a 2-D mask expresses.

    Raises:
        ValueError: a mask that is neither (flex attention's BlockMask).
    """
    if isinstance(given, dict):
        return {kind: _as_bool(mask, valid_BL) for kind, mask in given.items()}
    if isinstance(given, Tensor) and given.ndim == 4:
        return _as_bool(given, valid_BL)
    if given is not None and not isinstance(given, Tensor):
        raise ValueError(
            f"the decoder was given a {type(given).__name__} as attention mask, which cannot be cut down to the text. "
            "Load the model with attn_implementation='sdpa', 'eager' or a flash-attention one."
        )
    if not _windowed(config, valid_BL.shape[1]):
        return None
    # Windows and chunks measure distance in the padded row, so they must be laid over the full row and then cut down.
    from transformers import masking_utils

    config = copy.copy(config)
    config._attn_implementation = "eager"  # always a dense mask, never None
    made_for = {
        "config": config,
        "inputs_embeds": torch.zeros(*valid_BL.shape, 1, device=valid_BL.device),
        "attention_mask": valid_BL.long(),
        "past_key_values": None,
    }
    makers: dict[str, Any] = dict(masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)
    if kinds := set(getattr(config, "layer_types", None) or ()):
        return {kind: _as_bool(makers[kind](**made_for), valid_BL) for kind in kinds}
    windowed = getattr(config, "sliding_window", None) is not None
    return _as_bool(makers["sliding_attention" if windowed else "chunked_attention"](**made_for), valid_BL)


def attention_inputs(
    masks: Masks | None,
    layout: Layout,
    attention: str,
    dtype: torch.dtype,
    recorded: Prefixes | None = None,
    recalled: Recalled | None = None,
) -> dict[str, Any]:
    """What to hand to the decoder for the compact rows, so that every token sees what it saw in the full ones.

    ``recorded``, ``recalled``: only where :func:`by_segments` says so.
    """
    if isinstance(masks, dict):
        gathered = {kind: to_attention(_gather(mask, layout), attention, dtype) for kind, mask in masks.items()}
        return {"attention_mask": gathered}
    if masks is not None:
        return {"attention_mask": to_attention(_gather(masks, layout), attention, dtype)}
    if by_segments(masks, layout, attention):
        return {"attention_mask": SegmentMask(layout.lengths, layout.row.device, recorded, recalled)}
    assert recorded is recalled is None, "prefixes travel with segments"
    alone = attention == "eager" and len(layout.lengths) == 1
    if not layout.packed or alone or layout.row.numel() == 1:
        return {"attention_mask": layout.filled.long()}
    if attention.startswith(_FLASH):
        bounds, longest = segment_bounds(layout.lengths, layout.row.device), max(layout.lengths)
        ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {"attention_mask": None, **ends}
    causal = layout.column[:, :, None] >= layout.column[:, None, :]
    return {"attention_mask": to_attention(_apart(causal, layout), attention, dtype)}


def causal_mask(valid_BL: Tensor) -> Tensor:
    """[B, 1, L, L] bool: a token may look at the valid ones up to itself."""
    length = valid_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid_BL.device).tril()
    return (causal & valid_BL[:, None, :])[:, None]


def to_attention(may_look: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Booleans for sdpa (whatever autocast does to the queries), additive for others. Every token sees at least itself.

    Raises:
        ValueError: FlashAttention, which takes no mask of pairs.
    """
    if _ANY_FLASH in attention:
        raise ValueError(
            f"attn_implementation={attention!r}: the pass without the image needs a mask of pairs of tokens (the model "
            "has windows shorter than the rows, or prefixes or images read in both directions), and FlashAttention takes "
            "none. Load the model with attn_implementation='sdpa' or 'eager'."
        )
    may_look = may_look | torch.eye(may_look.shape[-1], dtype=torch.bool, device=may_look.device)
    if attention == "sdpa":
        return may_look
    return torch.zeros(may_look.shape, dtype=dtype, device=may_look.device).masked_fill(
        ~may_look, torch.finfo(dtype).min
    )


def _gather(mask_B1LL: Tensor, layout: Layout) -> Tensor:
    pairs = mask_B1LL[layout.row[:, :, None], 0, layout.column[:, :, None], layout.column[:, None, :]]
    return _apart(pairs, layout)


def _apart(pairs_RTT: Tensor, layout: Layout) -> Tensor:
    """Samples in one row do not see each other, and nobody sees padding."""
    same = layout.row[:, :, None] == layout.row[:, None, :]
    return (pairs_RTT & same & layout.filled[:, None, :])[:, None]


def _as_bool(mask: Tensor | None, valid_BL: Tensor) -> Tensor:
    if mask is None:  # sdpa leaves a mask out where plain causal attention is meant
        return causal_mask(valid_BL)
    if mask.ndim == 2:
        return causal_mask(mask.bool())
    may_look = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return may_look[:, :1].expand(len(valid_BL), -1, -1, -1)


def _windowed(config: Any, length: int) -> bool:
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(isinstance(size, int) and size < length for size in sizes)
