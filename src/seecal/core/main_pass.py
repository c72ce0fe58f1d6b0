"""The pass with the image: the model's own forward up to the last hidden state, its decoder on one row without padding.

No family's code for merging images or counting positions is written again here. The VLM class does that on the padded
batch, where it costs next to nothing; a hook in front of its text decoder then takes the real tokens out, lays them in one
row and keeps the samples apart in the attention.

B rows and L columns of the batch, R rows and T columns of the compact rows, N label tokens, D width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..constants import CONTRAST_PREFIX, TOKEN_WEIGHTS
from ..families.dummy_images import feature_sum
from ..families.table import family_of
from ..ops.segment_attention import Prefixes
from .decoder import TextDecoder, frequencies_of, parameters_of
from .packing import Layout, Masks, attention_inputs, by_segments, full_masks, lay_out, needs_dense, use_packed
from .token_positions import Array, PaddedBatch, TokenPositions, to_device

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
NOT_FOR_THE_BASE = ("labels", "use_cache", "past_key_values", "logits_to_keep", "return_dict", "num_items_in_batch")

# Keys and values of all layers that are kept for the pass without the image, at most: 512 KiB a token in a 7B model. What
# would take more is computed again.
MOST_PREFIX_BYTES = 1 << 30


def own_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model itself knows: without what a collator adds for the pass without the image, and weights."""
    return {
        name: value for name, value in inputs.items() if not name.startswith(CONTRAST_PREFIX) and name != TOKEN_WEIGHTS
    }


@dataclass(frozen=True)
class DecoderInputs:
    """What the VLM class handed to its text decoder, for the batch as it came.

    Attributes:
        embeds: [B, L, D], image features merged in, detached.
        position_ids: [..., B, L]; M-RoPE has axes in front.
        masks: who looks at whom, where that is more than causal ∧ valid (:func:`packing.full_masks`).
        extra: the decoder's other keyword arguments.
    """

    embeds: Tensor
    position_ids: Tensor
    masks: Masks | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class KeptPrefixes:
    """Keys and values of what stands before the first images, kept for the pass without them.

    Attributes:
        positions: [B, L] bool on the host, the positions they belong to.
        cache: the keys and values.
    """

    positions: Array
    cache: Prefixes


@dataclass(frozen=True)
class MainPass:
    """The pass with the image, done: what it leaves for the loss and for the pass without the image.

    Attributes:
        batch: the batch that it ran on.
        decoder: the text decoder.
        inputs: what the decoder was given.
        layout: how the tokens stand in ``hidden``; None: as in the batch.
        prefixes: None where they were not asked for or cannot be had.
        hidden: [R, T, D] last hidden state, with gradients.
        outputs: the base model's, or the decoder's where the model has no base.
    """

    batch: PaddedBatch
    decoder: TextDecoder
    inputs: DecoderInputs
    layout: Layout | None
    prefixes: KeptPrefixes | None
    hidden: Tensor
    outputs: Any

    @property
    def tokens(self) -> int:
        """Token positions that went through the decoder."""
        return self.batch.valid.numel() if self.layout is None else self.layout.row.numel()

    def hidden_at_labels(self) -> Tensor:
        """[N, D] where the label tokens are predicted, with gradients."""
        labels = self.batch.labels
        if self.layout is None:
            flat = labels.row * self.batch.valid.shape[1] + labels.predecessor
        else:
            flat = self.layout.index[labels.row, labels.predecessor]
        (flat_N,) = to_device(self.hidden.device, flat)
        return self.hidden.flatten(0, 1).index_select(0, flat_N)


def run(
    model: Any,
    decoder: TextDecoder,
    batch: PaddedBatch,
    inputs: dict[str, Any],
    *,
    padding_free: bool | str,
    all_ranks: bool = False,
    prefixes: Array | None = None,
) -> MainPass:
    """The model's own forward up to the last hidden state, noting what its decoder was given.

    Args:
        inputs: what the model's forward takes, with ``labels``; ``batch`` was read from it.
        padding_free: as in :class:`seecal.CALOptions`.
        all_ranks: other ranks may have images, so run the vision tower even when this one has none.
        prefixes: [B, L] bool, the positions whose keys and values to keep if that can be done.

    Raises:
        ValueError: a decoder without merged embeddings, or a packing that cannot be.
    """
    padding_free = _padding_free(padding_free, batch.positions, model.config, inputs)
    arguments = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_BASE}
    headless = model.base_model is not model
    if takes_labels(model):
        arguments["labels"] = inputs["labels"]
    # Without a mask a gap in the position ids would read as the start of another packed sequence.
    mask = inputs.get("attention_mask")
    arguments.update(use_cache=False, attention_mask=batch.valid.long() if mask is None else mask)
    dummy = _dummy_features(model, inputs) if all_ranks else None
    with _DecoderHook(batch, decoder, dummy, padding_free, prefixes) as seen:
        if headless:
            outputs = model.base_model(**arguments)
        else:  # Llama 4 has no model without its head: its whole forward, with logits of no position at all
            arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=batch.valid.device)
            type(model).forward(model, **arguments)
            outputs = seen.output
    assert seen.inputs is not None, "the model's forward did not call its decoder"
    return MainPass(batch, decoder, seen.inputs, seen.layout, seen.prefixes, outputs[0], outputs)


def takes_labels(model: Any) -> bool:
    """Whether the model without its head wants the labels: for the mask of a prefix that is read in both directions."""
    return model.base_model is not model and "labels" in parameters_of(type(model.base_model))  # type: ignore[arg-type]


class _DecoderHook:
    """Inside its block the decoder's inputs are noted, and the decoder may be given the packed row instead.

    Args:
        dummy: makes a zero that carries the gradient of the vision tower on a rank without images. It is made right before
            the decoder, after the embeddings, and goes into the decoder's input: so forward and backward visit the modules
            in the same order as on the other ranks. ZeRO sends what comes in the order in which it comes.
    """

    def __init__(
        self,
        batch: PaddedBatch,
        decoder: TextDecoder,
        dummy: Callable[[], Tensor] | None,
        padding_free: bool | str,
        prefixes: Array | None,
    ) -> None:
        self._batch, self._decoder, self._dummy = batch, decoder, dummy
        self._zero: Tensor | None = None
        self._padding_free, self._wanted_prefixes = padding_free, prefixes
        self.inputs: DecoderInputs | None = None
        self.layout: Layout | None = None
        self.prefixes: KeptPrefixes | None = None
        self.output: Any = None

    def __enter__(self) -> _DecoderHook:
        module = self._decoder.module
        self._stack = contextlib.ExitStack()
        for handle in (
            module.register_forward_pre_hook(self._make_zero, prepend=True),  # before DeepSpeed's hook on the decoder
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ):
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self.prefixes is not None:
            self.prefixes.cache.recording = False

    def _make_zero(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._zero = None if self._dummy is None else self._dummy()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            kwargs = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
        if self._zero is not None and kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + self._zero.to(kwargs["inputs_embeds"].dtype)
        inputs = self.inputs = _decoder_inputs(self._batch, self._decoder, kwargs)
        # With cross-attention the images belong to rows of the batch
        if not self._decoder.family.cross_attention and goes_into_one_row(
            self._decoder, inputs.masks, self._batch.positions.valid, self._padding_free
        ):
            kwargs = self._packed(inputs, kwargs)
        return (), kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    def _packed(self, inputs: DecoderInputs, given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's inputs, cut down to the real tokens in one row."""
        shape, device = self._batch.valid.shape, self._batch.valid.device
        self.layout = layout = lay_out(self._batch.positions.valid, True, device)
        self._stack.enter_context(frequencies_of(self._decoder.module, inputs.position_ids))
        attention, embeds = self._decoder.attention, given["inputs_embeds"]
        wanted = self._wanted_prefixes
        if wanted is not None and by_segments(inputs.masks, layout, attention):
            layers = getattr(self._decoder.module.config, "num_hidden_layers", 0)
            if 0 < int(wanted.sum()) * layers * 2 * embeds.shape[-1] * embeds.element_size() <= MOST_PREFIX_BYTES:
                (places,) = to_device(device, layout.index[wanted])
                self.prefixes = KeptPrefixes(wanted, Prefixes(places, self._decoder.queries_per_key))
        recorded = None if self.prefixes is None else self.prefixes.cache
        rest = {name: value for name, value in given.items() if name not in ("input_ids", "cache_position")}
        return {
            **{name: gather_tokens(value, layout, shape) for name, value in rest.items()},
            **attention_inputs(inputs.masks, layout, attention, embeds.dtype, recorded=recorded),
            "inputs_embeds": layout.take(embeds),
            "position_ids": layout.take_positions(inputs.position_ids),
        }


def _padding_free(asked: bool | str, positions: TokenPositions, config: Any, inputs: dict[str, Any]) -> bool | str:
    """What is asked, or False where somebody needs the padded rows. ValueError where both cannot be."""
    names = ("output_hidden_states", "output_attentions")
    every_layer = any(inputs.get(name) or getattr(config, name, False) for name in names)  # read position by position
    from_padding = positions.predicted_from_padding
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


def _decoder_inputs(batch: PaddedBatch, decoder: TextDecoder, given: dict[str, Any]) -> DecoderInputs:
    """Sorts what the VLM class handed to its decoder."""
    embeds = given.get("inputs_embeds")
    if embeds is None and not decoder.family.cross_attention:
        raise ValueError(
            "the decoder ran without inputs_embeds: this model does not merge image features into its text"
        )
    if embeds is None:
        embeds = decoder.module.get_input_embeddings()(given["input_ids"])
    rows, length = batch.valid.shape
    position_ids = given.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(length, device=batch.valid.device)[None]
    return DecoderInputs(
        embeds=embeds.detach(),
        position_ids=position_ids.expand(*position_ids.shape[:-2], rows, length),
        masks=full_masks(decoder.module.config, given.get("attention_mask"), batch.valid),
        extra={name: value for name, value in given.items() if name not in OWN and value is not None},
    )


def goes_into_one_row(decoder: TextDecoder, masks: Masks | None, keep: Array, padding_free: bool | str) -> bool:
    """Whether these positions [B, L] of the batch go through the decoder in one row (:func:`packing.use_packed`)."""
    length, together = keep.shape[1], int(keep.sum())
    by_index = decoder.scales_by_index(max(length, together))
    if by_index and padding_free is True:
        raise ValueError(
            f"padding_free=True with rows of {length} token positions, {together} tokens in all: from "
            f"floor_scale={decoder.module.config.floor_scale} on this decoder (attn_temperature_tuning) scales its queries "
            "by a token's place in the row, which packing changes. Set padding_free='auto' or False."
        )
    return use_packed(
        padding_free,
        keep,
        decoder.attention,
        dense=needs_dense(masks, decoder.attention),
        packs=decoder.family.packs and not by_index,
        takes_bounds=decoder.hands_arguments_on,
    )


def gather_tokens(value: Any, layout: Layout, shape: torch.Size) -> Any:
    """The layout's tokens of a tensor [B, L, ...], alone or in a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(gather_tokens(part, layout, shape) for part in value)
    by_token = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == shape
    return layout.take(value) if by_token else value


def _dummy_features(model: Any, inputs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """What gives 0 × the features of a dummy image, where this rank's batch has none.

    All ranks then use the same parameters.
    """
    if any(name.startswith("pixel_values") and value is not None for name, value in inputs.items()):
        return None
    family = family_of(model)
    if family.cross_attention:
        raise ValueError(
            f"this rank's batch has no image, and without one {model.config.model_type} leaves out its cross-attention "
            "layers: the ranks would run different modules and hang. Give every rank's batch at least one image."
        )
    make = family.dummy_image
    if make is None:
        raise ValueError(
            f"this rank's batch has no image and seecal knows no dummy image for model_type {model.config.model_type!r}, "
            "so the ranks would run different modules and hang. Give every rank's batch at least one image."
        )
    return lambda: feature_sum(model, make(model)) * 0


@contextlib.contextmanager
def with_dummy_image(model: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside the block a forward of the model, given a batch without an image, runs the vision tower all the same.

    For plain forwards, in an evaluation, where each rank holds a part of the weights: those with images ask all others for
    theirs of the tower. It runs where training runs it, right before the decoder.

    Raises:
        ValueError: a family of which no dummy image is known.
    """
    dummy = _dummy_features(model, inputs)
    if dummy is None:
        yield
        return

    def run_tower(module: nn.Module, args: tuple[Any, ...]) -> None:
        dummy()

    handle = TextDecoder.of(model).module.register_forward_pre_hook(run_tower, prepend=True)
    try:
        yield
    finally:
        handle.remove()
