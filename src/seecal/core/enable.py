"""CAL on a model, and off again: enable_cal, disable_cal, visual_delta."""

from __future__ import annotations

import dataclasses
import threading
import types
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from ..constants import TOKEN_WEIGHTS
from ..families.table import check_vlm, head_of, unwrap
from .decoder import keep_four_bits_as_they_are
from .forward import check_undeclared_family, run_passes
from .options import OVER_THE_STEP, CALOptions
from .outputs import VisualDelta
from .patched_forward import PatchedForward, SayGonePast, is_patched
from .state import CALState, keep, state_of
from .weighting import passes_read

# One visual_delta at a time: it stands in for the model's forward while it measures.
_measuring = threading.RLock()


def enable_cal(model: nn.Module, options: CALOptions | None = None) -> nn.Module:
    """From now on ``model(**batch).loss`` is CAL's while the model trains.

    While ``model.training`` and labels are given, forward returns the model's usual output class with ``.loss`` CAL's,
    ``.logits`` None and ``.cal`` (:class:`seecal.CALOutput`). Otherwise the original forward runs, and so it does with a
    cache where no gradients are recorded; what trains without CAL is told of once.
    The forward's signature stays. Call it before or after PEFT, and before the model is wrapped for several ranks.

    ``num_items_in_batch``, with which transformers' Trainer leaves it to the model to divide by the label tokens of a step
    of several micro-batches, is honoured with ``normalize="global"`` and ``"tokens"``: the loss is Σ w·CE / that number, w
    averaging 1 over the forward in the former. With the others ``model.accepts_loss_kwargs`` says that it is not taken.

    Args:
        model: a transformers vision-language model, or a PeftModel around one.
        options: None: the paper's defaults.

    A batch may bring ``token_weights`` [B, L], weights measured before: then they are used, and no image is taken away.

    Returns:
        ``model``, for chaining.

    Raises:
        ValueError: not a vision-language model, or inside a wrapper that hides it; CAL already enabled; an adapter on the
            head, one in 4 bits, or one of virtual tokens; a model that accelerate has prepared for mixed precision already,
            or bitsandbytes for inference. From a training forward: keys and values of an earlier one.
    """
    options = options or CALOptions()
    passes_read(options.weighting)  # a name that leads to no weighting is told now
    target = _vlm_in(model)
    refuse_prompt_learning(model)
    head_of(target)
    if not keep_four_bits_as_they_are(target):
        raise ValueError(
            "bitsandbytes has rewritten this model's 4-bit weights for inference on this CPU (a forward in eval mode under "
            "no_grad does that), and no gradient passes through them. Load the model again, and enable CAL before using it."
        )
    _take_off_pickled(target)
    state, own = state_of(target), target.__dict__.get("forward")
    patched = state.patched and own is not None
    if patched and state.options is not None:
        raise ValueError("CAL is already enabled on this model; call seecal.disable_cal(model) first")
    if not patched:  # else: a wrapper put on after the patch still holds it
        if "_original_forward" in target.__dict__:
            raise ValueError(
                "accelerator.prepare has wrapped this model's forward for mixed precision, and CAL enabled now would run "
                "outside of it, in float32. Call seecal.enable_cal(model) before accelerator.prepare(model)."
            )
        target.forward = PatchedForward(target)
    previous = state.previous_forward if patched else own
    silent = options.normalize not in OVER_THE_STEP and "accepts_loss_kwargs" not in vars(target)
    if silent:  # a trainer then divides by its accumulation, which these need
        target.accepts_loss_kwargs = False  # type: ignore[assignment]
    SayGonePast.put_on(target)
    # A new object: a shallow copy of a model shares the one of its original
    kept = CALState(options, patched=True, previous_forward=previous, tested=state.tested, takes_no_count=silent)
    keep(target, kept)
    return model


def disable_cal(model: nn.Module) -> nn.Module:
    """The model as it was before :func:`enable_cal`; returns it. ValueError if CAL is not enabled."""
    target = unwrap(model)
    state = state_of(target)
    if state.options is None:
        raise ValueError("CAL is not enabled on this model")
    kept = CALState(patched=state.patched, previous_forward=state.previous_forward, tested=state.tested)
    if state.takes_no_count:
        vars(target).pop("accepts_loss_kwargs", None)
    SayGonePast.take_off(target)
    if _take_off_pickled(target):
        kept = CALState(tested=state.tested)
    elif is_patched(target):
        del target.forward
        if state.previous_forward is not None:
            target.forward = state.previous_forward
        kept = CALState(tested=state.tested)
    # else: accelerate wrapped our forward in its own; without options ours just passes through
    keep(target, kept if kept != CALState() else None)
    return model


def visual_delta(
    model: nn.Module, batch: dict[str, Any], *, contrast: str = "drop", options: CALOptions | None = None
) -> VisualDelta:
    """Δ at every label token of a batch, without gradients.

    Args:
        model: a transformers vision-language model, bare, in PEFT, DDP or FSDP2, with CAL enabled or not. Its train or
            eval mode stays as it is (the pass without the image runs without dropout either way).
        batch: what ``model(**batch)`` takes, with ``labels`` [B, L] and ``attention_mask`` [B, L].
        contrast: how the image is taken away; overrides the options', its default too.
        options: None: the defaults.

    Returns:
        :class:`seecal.VisualDelta`, all [N]: the label tokens row by row.

    Raises:
        ValueError: no labels, no attention mask, not a vision-language model, or no ``contrast_*`` inputs for a contrast
            that changes pixels.
    """
    for name in ("labels", "attention_mask", "input_ids"):
        if batch.get(name) is None:
            raise ValueError(f"visual_delta needs {name} in the batch; it has {', '.join(sorted(batch))}")
    chosen = _with_contrast(options or CALOptions(), contrast)
    target = _vlm_in(model)
    keep_four_bits_as_they_are(target)
    thread = threading.get_ident()

    def measure(self: Any, *args: Any, **inputs: Any) -> Any:
        if threading.get_ident() != thread:  # somebody else's call
            return before(*args, **inputs) if before else type(self).forward(self, *args, **inputs)
        inputs.pop(TOKEN_WEIGHTS, None)  # what somebody measured before is not what is asked
        check_undeclared_family(self, inputs)
        return run_passes(self, inputs, chosen).delta

    # Through the outermost module's own call, so that sharded parameters are there.
    with _measuring, torch.no_grad():
        before = target.__dict__.get("forward")
        target.forward = types.MethodType(measure, target)
        try:
            return model(**batch)
        finally:
            if before is None:
                del target.forward
            else:
                target.forward = before


def refuse_prompt_learning(model: Any, *more: Any) -> None:
    """ValueError for adapters that put virtual tokens before the text, such as prompt and prefix tuning.

    Args:
        model: whose adapters to look at, if it has any.
        more: configs of adapters that it is to have.
    """
    for config in [*more, *dict(getattr(getattr(model, "module", model), "peft_config", None) or {}).values()]:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__}: virtual tokens stand before the text there, so that labels and images are no "
                "longer where both passes of CAL look for them. Use an adapter inside the layers, such as peft.LoraConfig."
            )


def _vlm_in(model: Any) -> Any:
    """The transformers model inside DDP and PEFT. ValueError where it is none, or hidden in a wrapper that is neither."""
    outer = getattr(model, "module", model)
    if any(isinstance(one, FullyShardedDataParallel) for one in (model, outer)):
        raise ValueError(
            "FullyShardedDataParallel (FSDP version 1) makes flat vectors of the weights, and CAL reads the head's as a "
            "matrix. Use FSDP2 (torch's fully_shard; fsdp_version: 2 in accelerate's config) or DDP."
        )
    target = unwrap(model)
    check_vlm(target)
    if not isinstance(getattr(target, "_orig_mod", target), PreTrainedModel):  # torch.compile's may stand around it
        raise ValueError(
            f"{type(target).__name__} only answers for the model inside of it, whose forward CAL has to be put on. Call "
            "seecal.enable_cal on the model itself, before it is wrapped."
        )
    return target


def _take_off_pickled(target: Any) -> bool:
    """Takes off what pickling made of a forward that a wrapper, such as accelerate's, stood around: the class's own."""
    if getattr(target.__dict__.get("forward"), "__func__", None) is not type(target).forward:
        return False
    del target.forward
    return True


def _with_contrast(options: CALOptions, contrast: str) -> CALOptions:
    """The options under another contrast: what belongs to the one before goes with it."""
    if contrast == options.contrast:
        return options
    return dataclasses.replace(options, contrast=contrast, contrast_strength=None, pool_scope="answer")
