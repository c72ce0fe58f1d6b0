"""CAL on a model, and off again: enable_cal, disable_cal, visual_delta."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..constants import TOKEN_WEIGHTS
from ..families.table import check_vlm, head_of, unwrap
from .decoder import keep_four_bits_as_they_are
from .forward import cal_forward, check_undeclared_family, run_passes
from .main_pass import own_inputs
from .options import CALOptions
from .outputs import VisualDelta
from .state import CALState, keep, state_of
from .weighting import passes_read

# One visual_delta at a time: it stands in for the model's forward while it measures.
_measuring = threading.RLock()


def enable_cal(model: nn.Module, options: CALOptions | None = None) -> nn.Module:
    """From now on ``model(**batch).loss`` is CAL's while the model trains.

    While ``model.training``, labels are given and no cache is in use, forward returns the model's usual output class with
    ``.loss`` CAL's, ``.logits`` None and ``.cal`` (:class:`seecal.CALOutput`). Otherwise the original forward runs.
    The forward's signature stays. Call it before or after PEFT, and before the model is wrapped for several ranks.

    Args:
        model: a transformers vision-language model, or a PeftModel around one.
        options: None: the paper's defaults.

    A batch may bring ``token_weights`` [B, L], weights measured before: then they are used, and no image is taken away.

    Returns:
        ``model``, for chaining.

    Raises:
        ValueError: not a vision-language model; CAL already enabled; an adapter on the head, or one in 4 bits; a model that
            accelerate has prepared for mixed precision already, or bitsandbytes for inference.
    """
    options = options or CALOptions()
    passes_read(options.weighting)  # a name that leads to no weighting is told now
    target = unwrap(model)
    check_vlm(target)
    head_of(target)
    if not keep_four_bits_as_they_are(target):
        raise ValueError(
            "bitsandbytes has rewritten this model's 4-bit weights for inference on this CPU (a forward in eval mode under "
            "no_grad does that), and no gradient passes through them. Load the model again, and enable CAL before using it."
        )
    state, own = state_of(target), target.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is type(target).forward:
        del target.forward  # pickling turned the patched forward into the class's, and kept our state
        own = None
    patched = state.patched and own is not None
    if patched and state.options is not None:
        raise ValueError("CAL is already enabled on this model; call seecal.disable_cal(model) first")
    if not patched:  # else: a wrapper put on after the patch still holds it
        if "_original_forward" in target.__dict__:
            raise ValueError(
                "accelerator.prepare has wrapped this model's forward for mixed precision, and CAL enabled now would run "
                "outside of it, in float32. Call seecal.enable_cal(model) before accelerator.prepare(model)."
            )
        target.forward = types.MethodType(_patched(type(target).forward), target)
    previous = state.previous_forward if patched else own
    # A new object: a shallow copy of a model shares the one of its original
    keep(target, CALState(options, patched=True, previous_forward=previous, tested=state.tested))
    return model


def disable_cal(model: nn.Module) -> nn.Module:
    """The model as it was before :func:`enable_cal`; returns it. ValueError if CAL is not enabled."""
    target = unwrap(model)
    state = state_of(target)
    if state.options is None:
        raise ValueError("CAL is not enabled on this model")
    kept = CALState(patched=state.patched, previous_forward=state.previous_forward, tested=state.tested)
    if getattr(target.__dict__.get("forward"), "_seecal_patch", False):
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
    target = unwrap(model)
    check_vlm(target)
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


def _with_contrast(options: CALOptions, contrast: str) -> CALOptions:
    """The options under another contrast: what belongs to the one before goes with it."""
    if contrast == options.contrast:
        return options
    return dataclasses.replace(options, contrast=contrast, contrast_strength=None, pool_scope="answer")


def _patched(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward to put on an instance. It looks everything up on ``self``, so copies of the model work alone."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        inputs = {**dict(zip(parameters, args, strict=False)), **kwargs}
        cache = inputs.get("past_key_values") is not None or inputs.get("use_cache")
        if state.options is None or not self.training or inputs.get("labels") is None or cache:
            previous = state.previous_forward or functools.partial(type(self).forward, self)
            return previous(*args, **own_inputs(kwargs))
        return cal_forward(self, inputs, state.options)

    # generate() and Trainer read the signature. Without the trail to the original, which accelerate follows to take its
    # wrappers off a forward, and ours with them
    forward.__signature__ = signature  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward._seecal_patch = True  # type: ignore[attr-defined]
    return forward
