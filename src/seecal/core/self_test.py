"""Does dropping the image give what masking it gives, and is it really gone? For families that nobody has declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.distributed import max_over_ranks
from .outputs import VisualDelta

# Largest |difference| of logits, relative to the largest logit, that rounding explains.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
_LOW_PRECISION = 5e-2

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
    """

    difference: float
    leak: float
    effect: float
    rounding: float

    @property
    def exact(self) -> bool:
        return self.difference <= self.rounding

    @property
    def leaks(self) -> bool:
        return self.leak > self.rounding

    def sentence(self) -> str:
        """The result in one line."""
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
def self_test(measure: Measure, inputs: dict[str, Any], dtype: torch.dtype) -> Verdict | None:
    """Runs the passes of one batch under both contrasts, and again with other pixels.

    Args:
        measure: runs both passes on a batch.
        inputs: the batch.
        dtype: the model's; says how much is rounding.

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
        ]
    )
    difference, leak, effect, scale, any_seen = max_over_ranks(values).tolist()
    if not any_seen:
        return None
    scale = max(scale, 1.0)
    return Verdict(difference / scale, leak / scale, effect / scale, _ROUNDING.get(dtype, _LOW_PRECISION))


def with_other_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with every ``pixel_values*`` tensor changed where it is not 0 (padding stays padding)."""

    def change(value: Tensor) -> Tensor:
        return value * 1.7 + (value != 0) * 0.3

    return {
        name: change(value) if name.startswith("pixel_values") and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else torch.zeros((), device=values.device)
