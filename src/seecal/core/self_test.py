"""Does dropping the image give what masking it gives, is it gone, is the head all there is? For undeclared families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.distributed import max_over_ranks
from .decoder import parameters_of
from .main_pass import NOT_FOR_THE_BASE, own_inputs, takes_labels
from .outputs import VisualDelta

# Largest |difference| of logits, relative to the largest logit, that rounding explains.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
_LOW_PRECISION = 5e-2
# The same for logits of one hidden state, as the head's product and as the class gives them, where that was no float32.
_LOW_PRECISION_HEAD = 1e-2
# Columns of the batch whose logits the class is asked for, at most: a whole batch of them may not fit.
_MOST_COLUMNS = 32
# Parts of the names of inputs that carry what an image shows, and of those that tell its size or place.
_IMAGE_NAMES = ("pixel", "image", "video", "vision")
_NOT_SHOWN = ("mask", "size", "shape", "grid", "position", "second")

# (inputs, contrast) → Δ of the batch under that contrast
Measure = Callable[[dict[str, Any], str], VisualDelta]


@dataclass(frozen=True)
class Verdict:
    """What the self-test found, in logits relative to the largest one.

    Attributes:
        difference: dropped against masked.
        leak: the dropped pass before and after the pixels were changed.
        effect: the pass with the image before and after; 0 would mean that the model does not look at it.
        rounding: what counts as nothing.
        head: the logits with the image against those that the model's class gives.
        head_rounding: what counts as nothing there.
    """

    difference: float
    leak: float
    effect: float
    rounding: float
    head: float = 0.0
    head_rounding: float = 0.0

    @property
    def exact(self) -> bool:
        return self.difference <= self.rounding

    @property
    def leaks(self) -> bool:
        return self.leak > self.rounding

    @property
    def wrong_head(self) -> bool:
        return self.head > self.head_rounding

    @property
    def refusal(self) -> str | None:
        """What to set where CAL must not train on this; None where it may."""
        if self.wrong_head:
            return "Declare the family with what its class does to the logits (head=...; docs/families.md)"
        return "Declare the family (docs/families.md)" if self.leaks else None

    def sentence(self) -> str:
        """The result in one line."""
        if self.wrong_head:
            return (
                f"the model's own logits at labels are not what its head gives (off by {self.head:.1e} of the largest): "
                "its class scales, caps or shifts them, so CAL's loss and Δ would not be the model's"
            )
        unseen = (
            ""
            if self.effect > self.rounding
            else (". The pixels changed nothing in the pass with the image either: is this checkpoint trained?")
        )
        return self._without_the_image() + unseen

    def _without_the_image(self) -> str:
        if self.leaks:
            return (
                f"the pass without the image still changes with the pixels (by {self.leak:.1e} of the largest logit): the "
                "image reaches the decoder by another way than its placeholder tokens, so CAL would compare it with itself"
            )
        if self.exact:
            return f"dropping the image equals masking it (largest difference {self.difference:.1e}): CAL is exact"
        return (
            f"dropping the image differs from masking it (by {self.difference:.1e} of the largest logit), as where a "
            "recurrent state runs through the text; the dropped pass does not see the image, and CAL uses that one"
        )


@torch.no_grad()
def self_test(measure: Measure, inputs: dict[str, Any], model: Any) -> Verdict | None:
    """Runs the passes of one batch under both contrasts, and again with other pixels; and the model's own forward.

    Args:
        measure: runs both passes on a batch.
        inputs: the batch.
        model: bare, as ``measure`` runs it, without dropout. Its dtype says how much is rounding.

    Returns:
        None if no rank's batch has a label token for which an image matters: try another batch.
    """
    dropped, masked = measure(inputs, "drop"), measure(inputs, "mask")
    other = measure(with_other_pixels(inputs), "drop")
    seen = dropped.has_contrast
    logits = [delta.logit_without for delta in (dropped, masked, other)] + [dropped.logit_with, other.logit_with]
    drop, mask, changed, plain, plain_changed = (logit[seen] for logit in logits if logit is not None)
    values = torch.stack(
        [
            _largest(drop - mask),
            _largest(drop - changed),
            _largest(plain - plain_changed),
            _largest(torch.cat([drop, plain])),
            seen.any().float(),
            *_against_own_logits(model, inputs, dropped),
        ]
    )
    difference, leak, effect, scale, any_seen, head, head_rounding = max_over_ranks(values).tolist()
    if not any_seen:
        return None
    scale = max(scale, 1.0)
    rounding = _ROUNDING.get(model.dtype, _LOW_PRECISION)
    return Verdict(difference / scale, leak / scale, effect / scale, rounding, head / scale, head_rounding)


def _against_own_logits(model: Any, inputs: dict[str, Any], delta: VisualDelta) -> tuple[Tensor, Tensor]:
    """(largest difference between ``logit_with`` and the logits of the model's own forward, how much of it is rounding)."""
    given = {name: value for name, value in own_inputs(inputs).items() if name not in NOT_FOR_THE_BASE}
    before = (delta.position - 1).cpu()
    columns = torch.arange(inputs["labels"].shape[1])
    if takes_labels(model):
        given["labels"] = inputs["labels"]
    elif "logits_to_keep" in parameters_of(type(model)):  # type: ignore[arg-type]
        columns = before.unique()[:_MOST_COLUMNS] if len(before) else columns[:1]
        given["logits_to_keep"] = columns
    logits = type(model).forward(model, **given, use_cache=False).logits
    asked = torch.isin(before, columns)
    ours, sample, label = (
        one.cpu()[asked] for one in (delta.logit_with, delta.sample, delta.labels) if one is not None
    )
    own = logits[sample, torch.searchsorted(columns, before[asked]), label].cpu().float()
    device = delta.labels.device
    exact = device.type == "cpu" and not torch.is_autocast_enabled("cpu") and logits.dtype in _ROUNDING
    rounding = _ROUNDING.get(model.dtype, _LOW_PRECISION_HEAD) if exact else _LOW_PRECISION_HEAD
    return _largest(ours - own).to(device), torch.tensor(rounding, device=device)


def with_other_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with everything changed that an image shows, where it is not 0 (padding stays padding)."""

    def change(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(change(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        return value * 1.7 + (value != 0) * 0.3

    return {name: change(value) if _shows_an_image(name, value) else value for name, value in inputs.items()}


def _shows_an_image(name: str, value: Any) -> bool:
    """Pixels under whatever name, or features made of them before; not an image's size, grid or mask."""
    if name.startswith("pixel_values"):
        return True
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    shown = any(part in name for part in _IMAGE_NAMES) and not any(part in name for part in _NOT_SHOWN)
    return shown and isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 1


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else torch.zeros((), device=values.device)
