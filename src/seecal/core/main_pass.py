"""The pass with the image: the model's own forward up to the last hidden state, its decoder on one row without padding.

No family's code for merging images or counting positions is written again here. The VLM class does that on the padded
batch, where it costs next to nothing; a hook in front of its text decoder then takes the real slots out, lays them in one
row and keeps the samples apart in the attention.

B rows and L columns of the batch, R rows and T columns of the compact rows, N label tokens, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families.dummy_images import feature_sum
from ..families.table import Family, family_of, image_ids
from ..ops.segment_attention import Prefixes
from .packing import Layout, Masks, attention_inputs, by_segments, full_masks, lay_out, needs_dense, use_packed
from .token_positions import Array, TokenPositions, read_token_positions, to_device

# Decoder inputs that each pass sets by itself, or that ask for outputs nobody reads.
OWN = {
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
}
# Arguments of the top-level forward that are about logits, caches or logging, not about the batch.
_NOT_FOR_THE_BASE = ("labels", "use_cache", "past_key_values", "logits_to_keep", "return_dict", "num_items_in_batch")

# Keys and values of all layers that are kept for the pass without the image, at most: 512 KiB a token in a 7B model. What
# would take more is computed again.
MOST_PREFIX_BYTES = 1 << 30


@dataclass
class MainPass:
    """What the pass with the image leaves for the one without.

    Attributes:
        slots: what each slot of the batch is, on the host.
        valid, image: [B, L] bool on the device: not padding; placeholder of an image or video.
        embeds: [B, L, D] the decoder's input, image features merged in, detached.
        positions: [..., B, L] position ids of every slot.
        masks: who looks at whom in the full rows, where that is more than causal ∧ valid (:func:`packing.full_masks`).
        extra: the decoder's other keyword arguments.
        layout: how the slots stand in ``hidden``; None: as in the batch.
        prefix: [B, L] bool on the host, the slots before first images whose keys and values are in ``prefixes``; both None
            where they were not asked for or cannot be had.
        hidden: [R, T, D] last hidden state, with gradients.
        outputs: the base model's, or the decoder's where the model has no base.
    """

    slots: TokenPositions
    valid: Tensor
    image: Tensor
    layout: Layout | None = None
    prefix: Array | None = None
    prefixes: Prefixes | None = None
    embeds: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    masks: Masks | None = field(init=False)
    extra: dict[str, Any] = field(init=False)
    hidden: Tensor = field(init=False)
    outputs: Any = None

    @property
    def tokens(self) -> int:
        """TokenPositions that went through the decoder."""
        return self.valid.numel() if self.layout is None else self.layout.row.numel()

    def hidden_at(self, row_N: Array, column_N: Array) -> Tensor:
        """[N, D] at these slots of the batch, with gradients."""
        flat = row_N * self.valid.shape[1] + column_N if self.layout is None else self.layout.slot[row_N, column_N]
        (flat_N,) = to_device(self.hidden.device, flat)
        return self.hidden.flatten(0, 1).index_select(0, flat_N)


def run(
    model: Any,
    decoder: Any,
    family: Family,
    inputs: dict[str, Any],
    padding_free: bool | str,
    all_ranks: bool = False,
    prefix_of: Callable[[TokenPositions], Array] | None = None,
    slots: TokenPositions | None = None,
) -> MainPass:
    """The model's own forward up to the last hidden state, noting what its decoder was given.

    Args:
        inputs: what the model's forward takes, with ``labels``.
        padding_free: as in :class:`seecal.CALOptions`.
        all_ranks: other ranks may have images, so run the vision tower even when this one has none.
        prefix_of: the batch's slots → [B, L] bool, those whose keys and values to keep.
        slots: of this batch, where they are known already.

    Raises:
        ValueError: no input_ids, a mask that is not 2-D, a decoder without merged embeddings, or a packing that cannot be.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise ValueError(
            "CAL needs input_ids: they say where the images are. This batch has "
            f"{', '.join(sorted(name for name, value in inputs.items() if value is not None))}."
        )
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: CAL needs the 2-D one, [B, L] with 0 at padding"
        )
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    image = functools.reduce(torch.logical_or, (ids == one for one in sorted(image_ids(model.config)))) & valid
    main = MainPass(slots or read_token_positions(ids, valid, image, inputs["labels"]), valid, image)
    padding_free = _padding_free(padding_free, main.slots, model.config, inputs)
    arguments = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_BASE}
    headless = model.base_model is not model
    if headless and "labels" in parameters_of(type(model.base_model)):  # type: ignore[arg-type]  # for prefix-LM masks
        arguments["labels"] = inputs["labels"]
    # Without a mask a gap in the position ids would read as the start of another packed sequence.
    arguments.update(use_cache=False, attention_mask=valid.long() if mask is None else mask)
    dummy = _dummy_image(model, inputs) if all_ranks else None
    with _at_the_decoder(main, decoder, family, dummy, padding_free, prefix_of) as output:
        if headless:
            main.outputs = model.base_model(**arguments)
        else:  # Llama 4 has no model without its head: its whole forward, with logits of no slot at all
            arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=ids.device)
            type(model).forward(model, **arguments)
            main.outputs = output[0]
    main.hidden = main.outputs[0]
    return main


@contextmanager
def _at_the_decoder(
    main: MainPass,
    decoder: Any,
    family: Family,
    dummy: Tensor | None,
    padding_free: bool | str,
    prefix_of: Callable[[TokenPositions], Array] | None,
) -> Iterator[list[Any]]:
    """Inside the block the decoder notes its inputs in ``main`` and may run on the packed row; yields [its output].

    ``dummy``: a zero that carries the gradient of the vision tower on a rank without images. It goes into the decoder's
    input, so that forward and backward visit the modules in the same order as on the other ranks.
    """
    seen: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            kwargs = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
        if dummy is not None and kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + dummy.to(kwargs["inputs_embeds"].dtype)
        _note(main, decoder, family, kwargs)
        # With cross-attention the images belong to rows of the batch
        if not family.cross_attention and goes_into_one_row(main, decoder, family, main.slots.valid, padding_free):
            kwargs = _packed(main, decoder, kwargs, None if prefix_of is None else prefix_of(main.slots))
        return (), kwargs

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [output]

    handles = (decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if main.prefixes is not None:
            main.prefixes.recording = False


def _padding_free(asked: bool | str, slots: TokenPositions, config: Any, inputs: dict[str, Any]) -> bool | str:
    """What is asked, or False where somebody needs the padded rows. ValueError where both cannot be."""
    names = ("output_hidden_states", "output_attentions")
    every_layer = any(inputs.get(name) or getattr(config, name, False) for name in names)  # to be read slot by slot
    from_padding = slots.predicted_from_padding
    if not every_layer and not from_padding.any():
        return asked
    if asked is True and from_padding.any():
        row, column = (int(place[0]) for place in from_padding.nonzero())
        raise ValueError(
            f"padding_free=True, but the label in row {row}, column {column} comes right after padding, which a packed row "
            "does not have. Set that label to -100 (a row's first token has nothing to be predicted from), or "
            "padding_free='auto'."
        )
    return False


def _note(main: MainPass, decoder: Any, family: Family, given: dict[str, Any]) -> None:
    """Sorts what the VLM class handed to its decoder."""
    embeds = given.get("inputs_embeds")
    if embeds is None and not family.cross_attention:
        raise ValueError(
            "the decoder ran without inputs_embeds: this model does not merge image features into its text"
        )
    if embeds is None:
        embeds = decoder.get_input_embeddings()(given["input_ids"])
    rows, length = main.valid.shape
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=main.valid.device)[None]
    main.embeds = embeds.detach()
    main.positions = positions.expand(*positions.shape[:-2], rows, length)
    main.masks = full_masks(decoder.config, given.get("attention_mask"), main.valid)
    main.extra = {name: value for name, value in given.items() if name not in OWN and value is not None}


def goes_into_one_row(main: MainPass, decoder: Any, family: Family, keep: Array, padding_free: bool | str) -> bool:
    """Whether these slots [B, L] of the batch go through the decoder in one row (:func:`packing.use_packed`)."""
    attention = decoder.config._attn_implementation
    return use_packed(
        padding_free,
        keep,
        attention,
        dense=needs_dense(main.masks, attention),
        packs=family.packs,
        takes_bounds=hands_arguments_on(decoder),
    )


def hands_arguments_on(decoder: Any) -> bool:
    """Whether keyword arguments that the decoder does not know reach its attention."""
    return inspect.Parameter.VAR_KEYWORD in (one.kind for one in parameters_of(type(decoder)).values())  # type: ignore[arg-type]


@functools.cache
def parameters_of(module_class: Any) -> dict[str, inspect.Parameter]:
    """Those of the class's own forward, whatever decorates it."""
    return dict(inspect.signature(inspect.unwrap(module_class.forward)).parameters)


def _packed(main: MainPass, decoder: Any, given: dict[str, Any], prefix: Array | None) -> dict[str, Any]:
    """The decoder's inputs, cut down to the real slots in one row."""
    main.layout = layout = lay_out(main.slots.valid, True, main.valid.device)
    attention, embeds = decoder.config._attn_implementation, given["inputs_embeds"]
    if prefix is not None and by_segments(main.masks, layout, attention):
        size = (
            int(prefix.sum())
            * getattr(decoder.config, "num_hidden_layers", 0)
            * 2
            * embeds.shape[-1]
            * embeds.element_size()
        )
        if 0 < size <= MOST_PREFIX_BYTES:
            (slots,) = to_device(main.valid.device, layout.slot[prefix])
            main.prefix, main.prefixes = prefix, Prefixes(slots, _key_groups(decoder.config))
    rest = {name: value for name, value in given.items() if name not in ("input_ids", "cache_position")}
    return {
        **{name: gather_tokens(value, layout, main.valid.shape) for name, value in rest.items()},
        **attention_inputs(main.masks, layout, attention, embeds.dtype, recorded=main.prefixes),
        "inputs_embeds": layout.take(embeds),
        "position_ids": layout.take_positions(main.positions),
    }


def _key_groups(config: Any) -> int:
    """Query heads that share a key."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def gather_tokens(value: Any, layout: Layout, shape: torch.Size) -> Any:
    """The layout's slots of a tensor [B, L, ...], alone or in a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(gather_tokens(one, layout, shape) for one in value)
    by_slot = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == shape
    return layout.take(value) if by_slot else value


def _dummy_image(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """0 × the features of a dummy image, where this rank's batch has none: all ranks then use the same parameters."""
    if any(name.startswith("pixel_values") and value is not None for name, value in inputs.items()):
        return None
    family = family_of(model)
    if family.cross_attention:
        raise ValueError(
            f"this rank's batch has no image, and without one {model.config.model_type} leaves out its cross-attention "
            "layers: the ranks would run different modules and hang. Give every rank's batch at least one image."
        )
    if family.dummy_image is None:
        raise ValueError(
            f"this rank's batch has no image and seecal knows no dummy image for model_type {model.config.model_type!r}, "
            "so the ranks would run different modules and hang. Give every rank's batch at least one image."
        )
    return feature_sum(model, family.dummy_image(model)) * 0
