"""Both passes inside one forward of the model, and the loss made of them.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..constants import TOKEN_WEIGHTS
from ..families.table import GENERIC, family_of, image_ids
from ..ops.distributed import sum_over_ranks, world_size
from ..ops.float8 import fp8_linears
from ..ops.linear_cross_entropy import reciprocal_or_zero, weighted_sum_of_ce
from . import main_pass
from .aux_loss import aux_loss_of, wants_router_logits
from .contrast_pass import ContrastOutput, pixel_pass, prefix_positions, tokens_with_contrast
from .contrasts import contrast_named
from .decoder import TextDecoder, without_dropout
from .delta import Head, HeadAccess, delta_grid, visual_delta_of
from .main_pass import MainPass
from .options import OVER_THE_STEP, CALOptions
from .outputs import CALOutput, VisualDelta
from .self_test import self_test
from .state import keep, state_of
from .token_positions import Array, read_batch
from .weighting import BOTH, logprobs_read, passes_read, weights_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BothPasses:
    """What the two passes of one batch gave.

    Attributes:
        main: the pass with the image.
        contrast: the pass without it.
        hidden: [N, D] where the label tokens are predicted, with gradients.
        head: where the head's parameters can be read.
        delta: Δ at every label token.
    """

    main: MainPass
    contrast: ContrastOutput
    hidden: Tensor
    head: HeadAccess
    delta: VisualDelta


@torch.compiler.disable  # layouts change with every batch, and are made on the host
def cal_forward(model: Any, inputs: dict[str, Any], options: CALOptions) -> Any:
    """One training forward: both passes, the weights, the loss. Returns the model's output class with ``.cal``."""
    step_labels = _labels_of_step(inputs, options.normalize)
    precomputed = inputs.get(TOKEN_WEIGHTS)
    skipped = state_of(model).next_step() % options.contrast_every > 0 and precomputed is None
    passes = passes_read(options.weighting) if precomputed is None and not skipped else ()
    if "without" in passes:
        check_undeclared_family(model, inputs)
    both = run_passes(model, inputs, options, passes)
    delta = both.delta
    if precomputed is not None:
        _say_precomputed()
        weights = precomputed[delta.sample, delta.position].float()
    else:
        weights = torch.ones_like(delta.delta) if skipped else weights_of(delta, options)
    weight_sum = weights.sum()
    samples = len(both.main.batch.valid)
    rows, factor = _normaliser(weights, weight_sum, delta, options.normalize, samples, step_labels)
    is_top1 = torch.zeros_like(delta.labels, dtype=torch.bool) if state_of(model).counts_top1 else None

    # Divided before the sum: see weighted_linear_cross_entropy
    def weighted_sum(head: Head, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        size = options.chunk_size
        return weighted_sum_of_ce(
            hidden_ND, head.weight, delta.labels, rows * factor, chunk_size=size, is_top1=is_top1, **head.options()
        )

    loss, ce_N = both.head.call(weighted_sum, both.hidden)
    loss_sum = (weights * ce_N).sum() if options.normalize == "sample" else loss * reciprocal_or_zero(factor)
    if options.normalize == "matched":
        loss = loss * (ce_N.mean() * reciprocal_or_zero(loss.detach()) if len(ce_N) else 1)
    aux = aux_loss_of(model, both.main)
    weighted_aux = None if aux is None else aux[0] * aux[1]
    cal = CALOutput(
        weights=weights,
        visual_delta=delta,
        loss_sum=loss_sum,
        weight_sum=weight_sum,
        cross_entropy=ce_N.sum() / max(len(delta), 1),
        main_tokens=both.main.tokens,
        contrast_tokens=both.contrast.tokens,
        aux_loss=weighted_aux,
        is_top1=is_top1,
        token_losses=ce_N,
    )
    output_class = _output_class(type(model))  # type: ignore[arg-type]
    names = {field.name for field in dataclasses.fields(output_class)} - {"loss", "logits", "past_key_values"}
    outputs = both.main.outputs
    passed_on = {name: getattr(outputs, name) for name in names if hasattr(outputs, name)}
    if aux is not None and weighted_aux is not None:
        # The share of the step: else each of its micro-batches adds the whole of it
        share = 1 if step_labels is None else len(delta) / step_labels
        loss, passed_on["aux_loss"] = loss + weighted_aux.to(loss.device) * share, aux[0]
    output = output_class(loss=loss, cal=cal, **passed_on)
    return output.to_tuple() if inputs.get("return_dict") is False else output


@torch.compiler.disable
def run_passes(model: Any, inputs: dict[str, Any], options: CALOptions, passes: tuple[str, ...] = BOTH) -> BothPasses:
    """Both passes of one batch. ``passes``: those that somebody reads; without "without" the image is not taken away."""
    decoder = TextDecoder.of(model)
    if "without" in passes:
        _mention_dropout(decoder)
    batch = read_batch(inputs, image_ids(model.config))
    released, all_ranks = options.pool_scope == "released", world_size() > 1
    own = main_pass.own_inputs(inputs)
    if wants_router_logits(model, inputs):
        own["output_router_logits"] = True
    main = main_pass.run(
        model,
        decoder,
        batch,
        own,
        # The released pooling reads Δ at every position of the padded grid
        padding_free=False if released else options.padding_free,
        all_ranks=all_ranks,
        prefixes=prefix_positions(batch, decoder.family) if _keeps_prefixes(decoder, options, passes) else None,
    )
    on_pixels = contrast_named(options.contrast).on_pixels
    has_contrast = tokens_with_contrast(batch, decoder.family, keeps_image=on_pixels)
    if "without" in passes:
        contrast = _contrast_pass(model, main, inputs, has_contrast, options, all_ranks)
    else:  # nothing to measure
        has_contrast, contrast = has_contrast & False, ContrastOutput(None, 0)
    hidden_ND = main.hidden_at_labels()
    head, wants_grid = HeadAccess(model, hidden_ND.dtype), released and "without" in passes
    logprobs, found = logprobs_read(options, passes), []

    def measure(whole: Head, hidden_ND: Tensor) -> None:
        found.append(visual_delta_of(batch.labels, hidden_ND, contrast, has_contrast, whole, options, logprobs))
        if wants_grid:
            found[0].delta_grid = delta_grid(main, inputs["labels"], contrast, whole, options)

    with torch.no_grad():
        head.call(measure, hidden_ND.detach())
    (delta,) = found
    return BothPasses(main, contrast, hidden_ND, head, delta)


def _contrast_pass(
    model: Any, main: MainPass, inputs: dict[str, Any], has_contrast: Array, options: CALOptions, all_ranks: bool
) -> ContrastOutput:
    """The pass without the image, as the options' contrast takes it away."""
    row = contrast_named(options.contrast)
    with fp8_linears(main.decoder.module) if options.fp8_contrast else contextlib.nullcontext():
        if not row.on_pixels:
            return row.function(main, has_contrast, options, all_ranks)
        if main.batch.has_image or all_ranks:
            return pixel_pass(model, main, inputs, options.contrast, options.padding_free, all_ranks)
    return ContrastOutput(None, 0)


def _keeps_prefixes(decoder: TextDecoder, options: CALOptions, passes: tuple[str, ...]) -> bool:
    """Whether the pass without the image may take what comes before the first image from the pass with it."""
    same = not decoder.module.training or decoder.dropout == 0  # dropout would make it another pass
    return same and options.contrast == "drop" and "without" in passes and decoder.family.packs_main


def check_undeclared_family(model: Any, inputs: dict[str, Any]) -> None:
    """On the first batch with an image: does CAL work on a family that has no row? Says so once, or ValueError."""
    state = state_of(model)
    if family_of(model) is not GENERIC or state.tested:
        return

    def measure(batch: dict[str, Any], contrast: str) -> VisualDelta:
        return run_passes(model, batch, CALOptions(contrast=contrast)).delta

    with without_dropout(model):
        verdict = self_test(measure, inputs, model)
    if verdict is None:
        return
    line = (
        f"model_type {model.config.model_type!r} has no row in seecal.FAMILIES; on the first batch {verdict.sentence()}"
    )
    if verdict.refusal is not None:
        raise ValueError(f"{line}. {verdict.refusal} or train without CAL.")
    logger.warning(line)
    state.tested = True
    keep(model, state)


@functools.cache
def _say_precomputed() -> None:
    logger.warning(
        "the batches bring %s: those are used, nothing is contrasted and the weighting is not asked", TOKEN_WEIGHTS
    )


def _labels_of_step(inputs: dict[str, Any], normalize: str) -> Tensor | None:
    """``num_items_in_batch``: the label tokens of the whole optimizer step, where a trainer gives them; else None.

    ValueError where they cannot be honoured: whoever gives them leaves it to the model to divide by its accumulation.
    """
    count = inputs.get("num_items_in_batch")
    if count is None:
        return None
    if normalize not in OVER_THE_STEP:
        raise ValueError(
            f"normalize={normalize!r} with num_items_in_batch={int(count)}: a trainer that gives it does not divide by its "
            "gradient accumulation, and label tokens are not what this normalize counts. Call seecal.enable_cal(model, "
            "options) before the trainer is made, or set trainer.model_accepts_loss_kwargs = False, or use "
            "seecal.CALTrainer or normalize='global'."
        )
    return torch.as_tensor(count).clamp(min=1)


def _normaliser(
    weights: Tensor, weight_sum: Tensor, delta: VisualDelta, normalize: str, samples: int, step_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weight of every row [N], factor of the sum): loss = factor · Σ row · CE.

    Data parallel wrappers average gradients over ranks, so what is divided by a sum over all ranks is multiplied by their
    number. Not where a trainer gives the label tokens of the step: it does that itself, and takes Σ row · CE / their number
    for the loss, as the models' own is. Weights then average 1 over the label tokens of this forward and of all ranks: the
    Σ w of the step is not known yet.
    """
    if normalize in ("micro_batch", "matched"):
        return weights, reciprocal_or_zero(weight_sum)
    if normalize in OVER_THE_STEP:
        of_ranks, labels = sum_over_ranks(torch.stack([weight_sum, torch.full_like(weight_sum, len(weights))]))
        divisor = of_ranks if normalize == "global" else labels
        return weights, reciprocal_or_zero(divisor) * (world_size() if step_labels is None else labels / step_labels)
    per_sample = torch.zeros(samples, device=weights.device).index_add_(0, delta.sample, weights.float())
    labelled = torch.zeros_like(per_sample).index_fill_(0, delta.sample, 1)
    labelled_samples = sum_over_ranks(labelled.sum())
    return weights * reciprocal_or_zero(per_sample)[delta.sample], reciprocal_or_zero(labelled_samples) * world_size()


@functools.cache
def _output_class(model_class: Any) -> Any:
    """The output class that the model's forward names, with a ``cal`` field.

    A field and not just an attribute: DDP and accelerate take outputs apart and build them again from their fields.
    """
    named = inspect.unwrap(model_class.forward).__annotations__.get("return")
    choices = [choice for choice in (named, *typing.get_args(named)) if isinstance(choice, type)]
    base = next((choice for choice in choices if issubclass(choice, ModelOutput)), CausalLMOutputWithPast)
    fields = {
        "__annotations__": {"cal": CALOutput | None},
        "cal": None,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    return dataclasses.dataclass(type(base.__name__, (base,), fields))


def _mention_dropout(decoder: TextDecoder) -> None:
    if decoder.module.training and (rate := decoder.dropout) > 0:
        _say_dropout(rate)


@functools.cache
def _say_dropout(rate: float) -> None:
    logger.warning(
        "the decoder trains with dropout up to %g: Δ compares the training pass with a pass without dropout, so it carries "
        "that noise",
        rate,
    )
