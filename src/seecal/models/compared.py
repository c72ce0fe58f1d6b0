"""How far the logits of two models may lie apart that should compute the same."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the largest logit: the same sums in another order, or rounded once more
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def rounding_of(dtype: torch.dtype) -> float:
    return ROUNDING.get(dtype, 1e-4)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest logit; infinite where one is not finite."""
    apart = ((one - other).abs().max() / one.abs().max().clamp_min(1e-12)).item()
    return apart if apart == apart else float("inf")
