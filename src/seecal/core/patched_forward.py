"""The forward that enable_cal puts on a model: CAL's where the model trains, else the one before; and what it says where
somebody trains without CAL's.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from .forward import cal_forward
from .main_pass import own_inputs
from .state import state_of

logger = logging.getLogger(__name__)


class PatchedForward:
    """A bound method in all but its type, for ``model.forward``.

    A real one is pickled as its name, and would come back as the class's forward: torch.save, or a process that is
    spawned, would switch CAL off and leave the state that says it is on.
    """

    _seecal_patch = True

    def __init__(self, model: Any) -> None:
        self.__self__, self.__func__ = model, _patched(type(model).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchedForward, (self.__self__,)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__func__.__get__(self.__self__))


def is_patched(model: Any) -> bool:
    """Whether ours is the forward on the instance, or what accelerate's unwrapping made of it."""
    return getattr(model.__dict__.get("forward"), "_seecal_patch", False)


def _patched(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward as a function. It looks everything up on ``self``, so copies of the model work alone."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        inputs = {**dict(zip(parameters, args, strict=False)), **kwargs}
        outer, state.inside = state.inside, True
        try:
            if state.options is None or not _trains_with_cal(self, inputs):
                previous = state.previous_forward or functools.partial(type(self).forward, self)
                return previous(*args, **own_inputs(kwargs))
            return cal_forward(self, inputs, state.options)
        finally:
            state.inside = outer

    # generate() and Trainer read the signature. Without the trail to the original, which accelerate follows to take its
    # wrappers off a forward, and ours with them
    forward.__signature__ = signature  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward._seecal_patch = True  # type: ignore[attr-defined]
    return forward


def _trains_with_cal(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether this forward is CAL's. ValueError where it would have to be and cannot."""
    if not model.training:
        return False
    gradients = torch.is_grad_enabled()
    if inputs.get("labels") is None:
        if gradients:  # without them nothing trains: generation, a reference's logits
            _say_no_labels(model, inputs)
        return False
    past, asked, fused = inputs.get("past_key_values") is not None, inputs.get("use_cache"), inputs.get("fused_lm_head")
    if not gradients and (past or asked or fused):
        return False
    if fused:
        raise ValueError(
            "fused_lm_head=True in a training forward with labels: TRL's SFTTrainer makes a loss of its own of what that "
            "returns, and CAL's has no part in it. Use seecal.CALTrainer, or call seecal.disable_cal(model)."
        )
    if past:
        raise ValueError(
            "past_key_values in a training forward with labels: what they hold was computed before this forward, and CAL "
            "would not know of it in the pass without the image. Take them out; instead of PEFT's prefix tuning use an "
            "adapter inside the layers, such as peft.LoraConfig; or call seecal.disable_cal(model)."
        )
    if asked:
        _say_no_cache()
    return True


class SayGonePast:
    """A forward pre-hook of the base model that says once where training goes past CAL's forward.

    trl.SFTTrainer, for one, puts its own over it, which calls the base model and makes the loss itself.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, module: Any, args: Any) -> None:
        state = state_of(self.model)
        if state.options is not None and not state.inside and module.training and torch.is_grad_enabled():
            _say_once(
                self.model,
                "gone past",
                "a training forward of %s has gone past CAL's, which has no part in what is learnt there: a trainer "
                "put its own over it, as trl.SFTTrainer does (use seecal.CALTrainer), or somebody called the base model "
                "alone",
            )

    @staticmethod
    def put_on(model: Any) -> None:
        """On a model that has a base model below its head."""
        SayGonePast.take_off(model)
        if model.base_model is not model:
            model.base_model.register_forward_pre_hook(SayGonePast(model))

    @staticmethod
    def take_off(model: Any) -> None:
        """Off again, also from a copy of the model."""
        hooks = model.base_model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, SayGonePast)]:
            del hooks[key]


def _say_no_labels(model: Any, inputs: dict[str, Any]) -> None:
    _say_once(
        model,
        "no labels",
        "a training forward of %s without labels, only %s: CAL is not applied there, and a loss made of its logits is a "
        "plain one. transformers' Trainer takes the labels out with label_smoothing_factor or compute_loss_func: set "
        "neither; sequence parallelism passes shift_labels in their place: switch it off",
        ", ".join(sorted(name for name, value in inputs.items() if value is not None)),
    )


@torch.compiler.disable
def _say_once(model: Any, what: str, line: str, *parts: str) -> None:
    """Once a model. ``line`` begins with the model's class."""
    state = state_of(model)
    if what not in state.told:
        logger.warning(line, type(model).__name__, *parts)
        state.told |= {what}


@functools.cache
def _say_no_cache() -> None:
    logger.warning("use_cache=True in a training forward: CAL runs without a cache, and returns none")
