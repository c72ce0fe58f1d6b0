"""From the hidden states of both passes to Δ at every label token.

B rows, L columns, N label tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families.table import family_of, head_of
from ..ops.distributed import whole_tensor
from ..ops.linear_cross_entropy import label_logits, label_logprobs
from .contrast_pass import ContrastOutput
from .main_pass import MainPass
from .options import CALOptions
from .outputs import VisualDelta
from .token_positions import Array, to_device
from .weighting import BOTH


@dataclass
class Head:
    """The head's weight [V, D] and bias as plain tensors, and what the VLM class does to its logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


@dataclass
class LabelTokens:
    """The N label tokens, row by row: ids, the row and the column of each, on the device."""

    ids: Tensor
    sample: Tensor
    position: Tensor


def label_tokens(labels_BL: Tensor, row: Array, column: Array) -> LabelTokens:
    """The label tokens at these places of the batch."""
    sample, position = to_device(labels_BL.device, row, column)
    return LabelTokens(labels_BL[sample, position], sample, position)


def visual_delta_of(
    labels: LabelTokens,
    hidden_ND: Tensor,
    without: ContrastOutput,
    reach: Tensor,
    head: Head,
    options: CALOptions,
    logprobs: Collection[str],
) -> VisualDelta:
    """Two dot products a label token; nothing here has the vocabulary's size unless log-probabilities are asked for.

    ``logprobs``: of "with" and "without", the passes whose log-probabilities are wanted, in chunks of logits.
    """
    weight, post = head.weight.detach(), {name: _detached(value) for name, value in head.options().items()}
    hidden_ND = hidden_ND.detach()

    def both(score: Callable[..., Tensor], passes: Collection[str] = BOTH) -> tuple[Any, Any]:
        score = functools.partial(score, weight=weight, labels=labels.ids, **post)
        if "with" in passes:
            with_image = score(hidden_ND)
            if "without" not in passes:
                return with_image, None
            return with_image, (
                with_image if without.hidden is None else torch.where(reach, score(without.hidden), with_image)
            )
        if "without" in passes:  # the rows that both passes share are put in before, so that one product does
            return None, score(
                hidden_ND if without.hidden is None else torch.where(reach[:, None], without.hidden, hidden_ND)
            )
        return None, None

    logit_with, logit_without = both(label_logits)
    logprob_with, logprob_without = both(functools.partial(label_logprobs, chunk_size=options.chunk_size), logprobs)
    by_logprob = options.delta == "logprob" and logprob_with is not None and logprob_without is not None
    return VisualDelta(
        delta=logprob_with - logprob_without if by_logprob else logit_with - logit_without,
        labels=labels.ids,
        sample=labels.sample,
        position=labels.position,
        has_contrast=reach,
        logit_with=logit_with,
        logit_without=logit_without,
        logprob_with=logprob_with,
        logprob_without=logprob_without,
    )


def delta_grid(main: MainPass, labels_BL: Tensor, without: ContrastOutput, head: Head) -> Tensor:
    """[B, L-1] Δ as the released code takes it: every slot, vocabulary id 0 where there is no label."""
    targets = labels_BL[:, 1:].clamp(min=0)
    if without.grid is None:
        return torch.zeros(targets.shape, device=targets.device)
    weight, post = head.weight.detach(), {name: _detached(value) for name, value in head.options().items()}

    def logits(hidden_BLD: Tensor) -> Tensor:
        rows = hidden_BLD.detach()[:, :-1].flatten(0, 1)
        return label_logits(rows, weight, targets.flatten(), **post).view_as(targets)

    return logits(main.hidden) - logits(without.grid)


def head_weights(model: Any, dtype: torch.dtype) -> Head:
    """The head's parameters as whole tensors. ``dtype`` is the hidden states'."""
    module = head_of(model)
    scale, softcap = family_of(model).head(model.config)
    bias = getattr(module, "bias", None)
    return Head(whole_tensor(module.weight, dtype), None if bias is None else whole_tensor(bias, dtype), scale, softcap)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
