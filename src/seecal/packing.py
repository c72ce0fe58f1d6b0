"""Padded rows ↔ rows without the dropped slots, and the attention masks that go with them.

B rows and L columns of the batch as it came; R rows and T columns of the compact form. A packed layout has R = 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Above this many tokens a packed row costs more in its [T, T] mask and dense attention than its padding saved.
MAX_PACKED_TOKENS = 4096
_DENSE_ATTENTION = ("sdpa", "eager")

Masks = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Which slot of the padded batch stands where in the compact rows.

    Attributes:
        row, column: [R, T] int64, the slot's place in the batch (0, 0 at padding).
        filled: [R, T] bool.
        slot: [B, L] int64, a slot's index into the flattened [R*T], -1 where it was dropped.
    """

    row: Tensor
    column: Tensor
    filled: Tensor
    slot: Tensor

    def take(self, values: Tensor) -> Tensor:
        """[B, L, ...] → [R, T, ...]."""
        return values[self.row, self.column]

    def take_positions(self, positions: Tensor) -> Tensor:
        """[..., B, L] → [..., R, T]; M-RoPE ids have axes in front."""
        return positions[..., self.row, self.column]


def lay_out(keep_BL: Tensor, packed: bool) -> Layout:
    """The kept slots of every row that has any, in order: all in one row, or one row a sample padded on the right."""
    row_S, column_S = keep_BL.nonzero(as_tuple=True)
    slot = torch.full(keep_BL.shape, -1, dtype=torch.long, device=keep_BL.device)
    if packed:
        slot[row_S, column_S] = torch.arange(len(row_S), device=keep_BL.device)
        filled = torch.ones(1, len(row_S), dtype=torch.bool, device=keep_BL.device)
        return Layout(row_S[None], column_S[None], filled, slot)
    used = keep_BL.any(1)
    line = used.cumsum(0) - 1  # row of the batch -> row of the compact form
    rank_BL = keep_BL.cumsum(1) - 1  # column of the batch -> column of the compact form
    shape = (int(used.sum()), int(keep_BL.sum(1).max()))
    flat = line[row_S] * shape[1] + rank_BL[row_S, column_S]
    slot[row_S, column_S] = flat
    row, column = (torch.zeros(shape, dtype=torch.long, device=keep_BL.device) for _ in range(2))
    filled = torch.zeros(shape, dtype=torch.bool, device=keep_BL.device)
    row.view(-1)[flat], column.view(-1)[flat], filled.view(-1)[flat] = row_S, column_S, True
    return Layout(row, column, filled, slot)


def use_packed(padding_free: bool | str, keep_BL: Tensor, attention: str, packs: bool = True) -> bool:
    """Whether the compact rows go into one packed row. ``packs``: whether the model family allows it.

    Raises:
        ValueError: ``padding_free=True`` with an attention that takes no dense mask, or a family that cannot be packed.
    """
    if padding_free is False:
        return False
    if not packs:
        if padding_free is True:
            raise ValueError(
                "padding_free=True with a decoder that carries a state from token to token (linear attention, short "
                "convolutions), or may do so because its family has no row in seecal.families: in a packed row the state "
                "would run on into the next sample. Set padding_free='auto' or False, or declare the family."
            )
        return False
    if attention not in _DENSE_ATTENTION:
        if padding_free is True:
            raise ValueError(
                f"padding_free=True with attn_implementation={attention!r}: packed rows need a block-diagonal mask, which "
                f"only {' and '.join(_DENSE_ATTENTION)} take. Set padding_free='auto', or another attn_implementation."
            )
        return False
    return padding_free is True or int(keep_BL.sum()) <= MAX_PACKED_TOKENS


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
    # Windows and chunks measure distance in slots, so they must be laid over the full row and then cut down.
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


def compact_masks(masks: Masks | None, layout: Layout, attention: str, dtype: torch.dtype) -> Any:
    """The mask to hand to the decoder for the compact rows: 2-D where that says it all, else 4-D at the kept pairs."""
    if masks is None and len(layout.row) > 1:
        return layout.filled.long()
    if masks is None:
        if bool((layout.row == layout.row[0, 0]).all()):  # one sample: nothing to keep apart
            return layout.filled.long()
        causal = layout.column[:, :, None] >= layout.column[:, None, :]
        return to_attention(_apart(causal, layout), attention, dtype)
    if isinstance(masks, dict):
        return {kind: to_attention(_gather(mask, layout), attention, dtype) for kind, mask in masks.items()}
    return to_attention(_gather(masks, layout), attention, dtype)


def causal_mask(valid_BL: Tensor) -> Tensor:
    """[B, 1, L, L] bool: a slot may look at the valid slots up to itself."""
    length = valid_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid_BL.device).tril()
    return (causal & valid_BL[:, None, :])[:, None]


def to_attention(may_look: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """Booleans for sdpa (whatever autocast does to the queries), additive for eager. Every slot sees at least itself."""
    may_look = may_look | torch.eye(may_look.shape[-1], dtype=torch.bool, device=may_look.device)
    if attention != "eager":
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
