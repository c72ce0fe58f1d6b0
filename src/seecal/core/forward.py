"""Both passes inside one forward of the model: enable_cal, disable_cal, visual_delta.

Everything happens inside the model's own ``forward`` because DDP, FSDP2 and DeepSpeed only hand out a module's parameters
while the wrapped model's forward runs.

B rows, L columns, N label tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import typing
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..families.table import GENERIC, Family, decoder_of, family_of
from ..ops.distributed import sum_over_ranks, world_size
from ..ops.float8 import fp8_linears
from ..ops.linear_cross_entropy import reciprocal_or_zero, weighted_sum_of_ce
from . import main_pass
from .contrast_pass import (
    ContrastOutput,
    decoder_dropout,
    drop_pass,
    mask_pass,
    prefix_positions,
    tokens_with_contrast,
    without_dropout,
)
from .delta import Head, delta_grid, head_weights, label_tokens, visual_delta_of
from .main_pass import MainPass
from .options import PIXEL_CONTRASTS, CALOptions
from .outputs import CALOutput, VisualDelta
from .self_test import self_test
from .token_positions import TokenPositions, to_device
from .weighting import BOTH, logprobs_read, passes_read, weights_of

logger = logging.getLogger(__name__)

# Set on the patched instance: the options while CAL is on, and the forward that stood in its way before.
OPTIONS_MARK, _PREVIOUS = "_seecal_options", "_seecal_previous_forward"
_CONTRAST = "contrast_"  # begins the names of inputs for the pass without the image
_GIVEN = "token_weights"  # [B, L], weights that somebody has measured before
# The number of the optimizer step, set by a trainer; and, without one, of training forwards so far.
STEP, _FORWARDS = "_seecal_step", "_seecal_forwards"
TESTED = "_seecal_tested"  # an undeclared family has passed its self-test


def forget_steps(target: Any) -> None:
    """Steps are counted from here on, and by the model itself until a trainer says :data:`STEP`."""
    for name in (STEP, _FORWARDS):
        target.__dict__.pop(name, None)


@torch.compiler.disable  # layouts change with every batch, and are made on the host
def cal_forward(model: Any, inputs: dict[str, Any], options: CALOptions) -> Any:
    """One training forward: both passes, the weights, the loss. Returns the model's output class with ``.cal``."""
    given = inputs.get(_GIVEN)
    skipped = _step_of(model) % options.contrast_every > 0 and given is None
    passes = passes_read(options.weighting) if given is None and not skipped else ()
    if "without" in passes:
        _test_undeclared(model, inputs)
    delta, hidden_ND, main, head, without = _both_passes(model, inputs, options, passes)
    if given is not None:
        weights = _given(given, inputs["labels"].shape, delta)
    else:
        weights = torch.ones_like(delta.delta) if skipped else weights_of(delta, options)
    weight_sum = weights.sum()
    rows, factor = _normaliser(weights, weight_sum, delta, options.normalize, len(main.valid))
    # Divided before the sum: see weighted_linear_cross_entropy
    loss, ce_N = weighted_sum_of_ce(
        hidden_ND, head.weight, delta.labels, rows * factor, chunk_size=options.chunk_size, **head.options()
    )
    record = CALOutput(
        weights=weights,
        visual_delta=delta,
        loss_sum=(weights * ce_N).sum() if options.normalize == "sample" else loss * reciprocal_or_zero(factor),
        weight_sum=weight_sum,
        cross_entropy=ce_N.sum() / max(len(delta), 1),
        main_tokens=main.tokens,
        contrast_tokens=without.tokens,
    )
    output_class = _output_class(type(model))  # type: ignore[arg-type]
    names = {field.name for field in dataclasses.fields(output_class)} - {"loss", "logits", "past_key_values"}
    passed_on = {name: getattr(main.outputs, name) for name in names if hasattr(main.outputs, name)}
    output = output_class(loss=loss, cal=record, **passed_on)
    return output.to_tuple() if inputs.get("return_dict") is False else output


def _step_of(model: Any) -> int:
    """The optimizer step, as a trainer says it, or the number of training forwards before this one."""
    count = getattr(model, _FORWARDS, 0)
    setattr(model, _FORWARDS, count + 1)
    told = getattr(model, STEP, None)
    return count if told is None else int(told)


def _test_undeclared(model: Any, inputs: dict[str, Any]) -> None:
    """On the first batch with an image: does CAL work on a family that has no row? Says so once, or ValueError."""
    if family_of(model) is not GENERIC or getattr(model, TESTED, False):
        return

    def measure(batch: dict[str, Any], contrast: str) -> VisualDelta:
        return _both_passes(model, batch, CALOptions(contrast=contrast))[0]

    verdict = self_test(measure, inputs, model.dtype)
    if verdict is None:
        return
    line = (
        f"model_type {model.config.model_type!r} has no row in seecal.FAMILIES; on the first batch {verdict.sentence()}"
    )
    if verdict.leaks:
        raise ValueError(f"{line}. Declare the family (docs/families.md) or train without CAL.")
    logger.warning(line)
    setattr(model, TESTED, True)


def _given(weights_BL: Tensor, shape: torch.Size, delta: VisualDelta) -> Tensor:
    """[N] float32: the weights that came with the batch, at its label tokens."""
    if weights_BL.ndim != 2:
        raise ValueError(
            f"{_GIVEN} of shape {tuple(weights_BL.shape)}: expected [B, L], a weight at every label's place"
        )
    _mention_precomputed()
    return weights_BL[delta.sample, delta.position].float()


@functools.cache
def _mention_precomputed() -> None:
    logger.warning("the batches bring %s: those are used, nothing is contrasted and the weighting is not asked", _GIVEN)


def _normaliser(
    weights: Tensor, weight_sum: Tensor, delta: VisualDelta, normalize: str, samples: int
) -> tuple[Tensor, Tensor]:
    """(weight of every row [N], factor of the sum): loss = factor · Σ row · CE.

    Data parallel wrappers average gradients over ranks, so what is divided by a sum over all ranks is multiplied by their
    number.
    """
    if normalize == "micro_batch":
        return weights, reciprocal_or_zero(weight_sum)
    if normalize == "global":
        return weights, reciprocal_or_zero(sum_over_ranks(weight_sum)) * world_size()
    per_sample = torch.zeros(samples, device=weights.device).index_add_(0, delta.sample, weights.float())
    labelled = torch.zeros_like(per_sample).index_fill_(0, delta.sample, 1)
    labelled_samples = sum_over_ranks(labelled.sum())
    return weights * reciprocal_or_zero(per_sample)[delta.sample], reciprocal_or_zero(labelled_samples) * world_size()


@torch.compiler.disable
def _both_passes(
    model: Any, inputs: dict[str, Any], options: CALOptions, passes: tuple[str, ...] = BOTH
) -> tuple[VisualDelta, Tensor, MainPass, Head, ContrastOutput]:
    """(Δ, hidden [N, D] with gradients, the main pass, the head, the pass without the image).

    ``passes``: those that somebody reads; without "without" the image is not taken away.
    """
    decoder, family = decoder_of(model), family_of(model)
    if "without" in passes:
        _mention_dropout(decoder)
    by_pixels, released = options.contrast in PIXEL_CONTRASTS, options.pool_scope == "released"
    # The released pooling reads Δ at every slot of the padded grid
    padding_free, all_ranks = False if released else options.padding_free, world_size() > 1
    prefixes = (
        functools.partial(prefix_positions, family=family)
        if _keeps_prefixes(decoder, family, options, passes)
        else None
    )
    main = main_pass.run(model, decoder, family, _own_inputs(inputs), padding_free, all_ranks, prefixes)
    has_image = bool(main.slots.image.any())
    row, column = main.slots.label_places
    before = column - 1
    reach = tokens_with_contrast(main.slots, family, row, before, by_pixels)
    with fp8_linears(decoder) if options.fp8_contrast and "without" in passes else contextlib.nullcontext():
        if "without" not in passes:  # nothing to measure
            reach, without = reach & False, ContrastOutput(None, 0)
        elif by_pixels and (has_image or all_ranks):
            without = _pixel_pass(model, decoder, family, inputs, options, main.slots)
        elif options.contrast == "mask" and has_image:
            without = mask_pass(decoder, family, main, row, before, whole_grid=released)
        else:  # a batch without images has nothing to mask; on several ranks it still runs one token
            without = drop_pass(decoder, family, main, reach, row, before, options.padding_free, all_ranks)
    hidden_ND = main.hidden_at(row, before)
    head = head_weights(model, hidden_ND.dtype)
    labels = label_tokens(inputs["labels"], row, column)
    (reach_N,) = to_device(hidden_ND.device, reach)
    logprobs = logprobs_read(options, passes)
    delta = visual_delta_of(labels, hidden_ND, without, reach_N, head, options, logprobs)
    if released and "without" in passes:
        delta.delta_grid = delta_grid(main, inputs["labels"], without, head)
    return delta, hidden_ND, main, head, without


def _keeps_prefixes(decoder: Any, family: Family, options: CALOptions, passes: tuple[str, ...]) -> bool:
    """Whether the pass without the image may take what comes before the first image from the pass with it."""
    same = not decoder.training or decoder_dropout(decoder) == 0  # dropout would make it another pass
    return same and options.contrast == "drop" and "without" in passes and family.packs_main


@torch.no_grad()
def _pixel_pass(
    model: Any, decoder: Any, family: Family, inputs: dict[str, Any], options: CALOptions, slots: TokenPositions
) -> ContrastOutput:
    """The whole batch again, vision tower and all, on images without their content."""
    changed = {name.removeprefix(_CONTRAST): value for name, value in inputs.items() if name.startswith(_CONTRAST)}
    missing = sorted(name for name in inputs if name.startswith("pixel_values") and name not in changed)
    if missing:
        raise ValueError(
            f"contrast={options.contrast!r} needs {', '.join(_CONTRAST + name for name in missing)} in the batch: the "
            "images without their content. CALTrainer's collator makes them from messages data; elsewhere use "
            f"seecal.VisionCollator(processor, contrast={options.contrast!r}, strength=...)."
        )
    with without_dropout(model.base_model):
        again = {**_own_inputs(inputs), **changed}
        all_ranks = world_size() > 1
        main = main_pass.run(model, decoder, family, again, options.padding_free, all_ranks, slots=slots)
    row, column = slots.label_places
    return ContrastOutput(main.hidden_at(row, column - 1), main.tokens)


def _own_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model itself knows: without what our collator adds for the pass without the image, and weights."""
    return {name: value for name, value in inputs.items() if not name.startswith(_CONTRAST) and name != _GIVEN}


@functools.cache
def _output_class(model_class: Any) -> Any:
    """The output class that the model's forward names, with a ``cal`` field.

    A field and not just an attribute: DDP and accelerate take outputs apart and build them again from their fields.
    """
    named = inspect.unwrap(model_class.forward).__annotations__.get("return")
    choices = [one for one in (named, *typing.get_args(named)) if isinstance(one, type)]
    base = next((one for one in choices if issubclass(one, ModelOutput)), CausalLMOutputWithPast)
    fields = {
        "__annotations__": {"cal": CALOutput | None},
        "cal": None,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    return dataclasses.dataclass(type(base.__name__, (base,), fields))


_dropout_mentioned = False


def _mention_dropout(decoder: Any) -> None:
    global _dropout_mentioned
    if not _dropout_mentioned and decoder.training and (rate := decoder_dropout(decoder)) > 0:
        _dropout_mentioned = True
        logger.warning(
            "the decoder trains with dropout up to %g: Δ compares the training pass with a pass without dropout, so it "
            "carries that noise",
            rate,
        )
