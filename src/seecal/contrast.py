"""The pass without the image, run on the decoder's own inputs of the main pass. No gradient, no vocabulary projection.

B rows and L columns of the batch, R rows and T columns of the compact rows, N label tokens, D width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family
from .packing import compact_masks, full_masks, lay_out, to_attention, use_packed

logger = logging.getLogger(__name__)

# Decoder inputs that each pass sets by itself, or that ask for outputs nobody reads.
_OWN = {
    "inputs_embeds",
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "decoder output",
}
_OUTPUT = "decoder output"


@dataclass
class MainPass:
    """What the pass with the image leaves for the one without.

    Attributes:
        outputs: the base model's, with gradients; the first entry is the last hidden state [B, L, D].
        embeds: [B, L, D] the decoder's input, image features merged in, detached.
        positions: [..., B, L] position ids of every slot.
        valid, image: [B, L] bool: not padding; placeholder of an image or video.
        given_mask: what the VLM handed to its decoder.
        extra: the decoder's other keyword arguments.
    """

    outputs: Any
    embeds: Tensor
    positions: Tensor
    valid: Tensor
    image: Tensor
    given_mask: Any
    extra: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """[B, L, D] last hidden state, with gradients."""
        return self.outputs[0]


@dataclass
class Without:
    """The pass without the image: hidden [N, D] at every wanted slot (zeros where there is none) and slots computed."""

    hidden: Tensor | None
    tokens: int
    grid: Tensor | None = None


@contextmanager
def decoder_inputs(decoder: Any, blank: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """A dict that holds the decoder's keyword arguments once it has run inside the block.

    ``blank``: a zero that carries the gradient of the vision tower on a rank without images. It goes into the decoder's
    input, so that forward and backward visit the modules in the same order as on the other ranks.
    """
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            kwargs = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
        if blank is not None and kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + blank.to(kwargs["inputs_embeds"].dtype)
        seen.clear()
        seen.update(kwargs)
        return (), kwargs

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        seen[_OUTPUT] = output

    handles = (decoder.register_forward_pre_hook(note, with_kwargs=True), decoder.register_forward_hook(note_output))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def main_pass_of(
    decoder: Any, family: Family, seen: dict[str, Any], outputs: Any, valid: Tensor, image: Tensor
) -> MainPass:
    """Sorts what the hooks saw. ``outputs``: the base model's, or None where the decoder's own are meant.

    ValueError for a decoder that was not given merged embeddings, unless the image comes in by cross-attention.
    """
    outputs = seen[_OUTPUT] if outputs is None else outputs
    embeds = seen.get("inputs_embeds")
    if embeds is None and not family.cross_attention:
        raise ValueError(
            "the decoder ran without inputs_embeds: this model does not merge image features into its text"
        )
    if embeds is None:
        embeds = decoder.get_input_embeddings()(seen["input_ids"])
    rows, length = valid.shape
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=valid.device)[None]
    positions = positions.expand(*positions.shape[:-2], rows, length)
    extra = {name: value for name, value in seen.items() if name not in _OWN and value is not None}
    return MainPass(outputs, embeds.detach(), positions, valid, image, seen.get("attention_mask"), extra)


def contrast_reach(main: MainPass, family: Family, sample: Tensor, position: Tensor, keeps_image: bool) -> Tensor:
    """[N] bool: labels with an image before them and a predecessor that both passes have. Elsewhere Δ is 0 by definition.

    ``keeps_image``: the contrast leaves an image in place, so the predecessor may be its last slot.
    """
    before = position - 1
    there = main.valid if keeps_image else kept_slots(main, family)
    return there[sample, before] & (main.image.cumsum(1)[sample, before] > 0)


def kept_slots(main: MainPass, family: Family) -> Tensor:
    """[B, L] bool: what the pass without the image has. With cross-attention the placeholder is a word like others."""
    return main.valid if family.cross_attention else main.valid & ~main.image


@torch.no_grad()
def drop_pass(
    decoder: Any, family: Family, main: MainPass, reach: Tensor, sample: Tensor, before: Tensor,
    padding_free: bool | str, all_ranks: bool,
) -> Without:  # fmt: skip
    """Runs the decoder on the text slots alone, at their original positions.

    Only samples that need it, and only up to the last slot that predicts one of their labels. ``all_ranks``: another
    rank may have something to run, so run one token even when this one has nothing.
    """
    length = main.valid.shape[1]
    last = torch.full((len(main.valid),), -1, device=main.valid.device)
    last.scatter_reduce_(0, sample, torch.where(reach, before, -1), "amax")
    keep = kept_slots(main, family) & (torch.arange(length, device=last.device)[None] <= last[:, None])
    if not bool(keep.any()):
        if not all_ranks:
            return Without(None, 0)
        keep[0, 0] = True
    attention = decoder.config._attn_implementation
    layout = lay_out(keep, use_packed(padding_free, keep, attention, family.packs))
    masks = full_masks(decoder.config, main.given_mask, main.valid)
    embeds = layout.take(main.embeds)
    extra = {}
    for name, value in main.extra.items():
        if name in family.omit:
            continue
        by_slot = torch.is_tensor(value) and value.ndim >= 2 and value.shape[:2] == main.valid.shape
        extra[name] = layout.take(value) if by_slot else value
    with without_dropout(decoder):
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=compact_masks(masks, layout, attention, embeds.dtype),
            position_ids=layout.take_positions(main.positions),
            use_cache=False,
            **extra,
        )[0]
    wanted = layout.slot[sample, before].clamp(min=0)  # out of reach: any row, its Δ is set to 0
    return Without(hidden.flatten(0, 1)[wanted], layout.row.numel())


@torch.no_grad()
def mask_pass(
    decoder: Any, family: Family, main: MainPass, sample: Tensor, before: Tensor, whole_grid: bool
) -> Without:
    """Runs the decoder on the full rows with the image slots hidden in the attention mask."""
    attention = decoder.config._attn_implementation
    masks = full_masks(decoder.config, main.given_mask, main.valid)
    kept = kept_slots(main, family)
    hide = (kept | ~main.valid)[:, None, None, :]
    extra = {name: value for name, value in main.extra.items() if not (family.cross_attention and name in family.omit)}
    mask: Any
    if masks is None:
        mask = kept.long()
    elif isinstance(masks, dict):
        mask = {kind: to_attention(one & hide, attention, main.embeds.dtype) for kind, one in masks.items()}
    else:
        mask = to_attention(masks & hide, attention, main.embeds.dtype)
    with without_dropout(decoder):
        hidden = decoder(
            inputs_embeds=main.embeds, attention_mask=mask, position_ids=main.positions, use_cache=False, **extra
        )[0]
    return Without(hidden[sample, before], main.valid.numel(), hidden if whole_grid else None)


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
