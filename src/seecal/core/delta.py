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

from ..families.table import family_of, head_of, is_partitioned
from ..ops.distributed import whole_tensor
from ..ops.linear_cross_entropy import label_logits, label_logprobs
from .contrast_pass import ContrastOutput
from .main_pass import MainPass
from .options import CALOptions
from .outputs import VisualDelta
from .token_positions import Array, LabelTokens, to_device
from .weighting import BOTH


@dataclass(frozen=True)
class Head:
    """The head's weight [V, D] and bias as plain tensors, and what the VLM class does to its logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> Head:
        """The head's parameters as whole tensors. ``dtype`` is the hidden states'."""
        module = head_of(model)
        scale, softcap = family_of(model).head(model.config)
        bias = getattr(module, "bias", None)
        return cls(
            whole_tensor(module.weight, dtype), None if bias is None else whole_tensor(bias, dtype), scale, softcap
        )

    def detached(self) -> Head:
        """The same without gradients."""
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.scale, self.softcap)

    def options(self) -> dict[str, Any]:
        """What the ops take beside the weight."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


class HeadAccess:
    """Where the head's parameters can be read.

    DeepSpeed ZeRO-3 gathers them for the head's own forward and once more for its backward, where their gradients are
    shared out: what needs them runs in the place of that forward. Elsewhere they are read once a training forward.

    Args:
        model: bare.
        dtype: the hidden states'.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._module = model, head_of(model)
        self._whole = None if is_partitioned(self._module) else Head.of(model, dtype)

    def call(self, function: Callable[[Head, Tensor], Any], hidden: Tensor) -> Any:
        """``function(head, hidden)``. It must run alike on all ranks, and return what carries gradients in a tuple."""
        if self._whole is not None:
            _check_devices(self._whole.weight, hidden)
            return function(self._whole, hidden)
        own = vars(self._module).pop("forward", None)
        self._module.forward = lambda hidden: function(Head.of(self._model, hidden.dtype), hidden)
        try:
            return self._module(hidden)
        finally:
            del self._module.forward
            if own is not None:
                self._module.forward = own


def _check_devices(weight: Tensor, hidden: Tensor) -> None:
    if weight.device != hidden.device:
        raise ValueError(
            f"the head's weight is on {weight.device} and the hidden states are on {hidden.device}: a device_map has put "
            "them apart (on meta: offloaded until the head's own forward), and CAL reads that weight directly. Load the "
            "model on one device, such as device_map={'': 0}; to share it out over several, use FSDP2 or DeepSpeed."
        )


def visual_delta_of(
    labels: LabelTokens,
    hidden_ND: Tensor,
    contrast: ContrastOutput,
    has_contrast: Array,
    head: Head,
    options: CALOptions,
    logprobs: Collection[str],
) -> VisualDelta:
    """Two dot products a label token; nothing here has the vocabulary's size unless log-probabilities are asked for.

    ``logprobs``: of "with" and "without", the passes whose log-probabilities are wanted, in chunks of logits.
    """
    hidden_ND, head = hidden_ND.detach(), head.detached()
    (seen,) = to_device(hidden_ND.device, has_contrast)

    def both(score: Callable[..., Tensor], passes: Collection[str] = BOTH) -> tuple[Any, Any]:
        score = functools.partial(score, weight=head.weight, labels=labels.ids, **head.options())
        if "with" in passes:
            with_image = score(hidden_ND)
            if "without" not in passes:
                return with_image, None
            if contrast.hidden is None:
                return with_image, with_image
            return with_image, torch.where(seen, score(contrast.hidden), with_image)
        if "without" in passes:  # the rows that both passes share are put in before, so that one product does
            mixed = hidden_ND if contrast.hidden is None else torch.where(seen[:, None], contrast.hidden, hidden_ND)
            return None, score(mixed)
        return None, None

    logit_with, logit_without = both(label_logits)
    logprob_with, logprob_without = both(functools.partial(label_logprobs, chunk_size=options.chunk_size), logprobs)
    return VisualDelta(
        delta=_difference(options.delta, (logit_with, logit_without), (logprob_with, logprob_without)),
        labels=labels.ids,
        sample=labels.sample,
        position=labels.position,
        has_contrast=seen,
        logit_with=logit_with,
        logit_without=logit_without,
        logprob_with=logprob_with,
        logprob_without=logprob_without,
    )


def _difference(kind: str, logits: tuple[Tensor, Tensor], logprobs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Δ as ``CALOptions.delta`` names it. Where log-probabilities were not measured no image was taken away: 0."""
    with_image, without = logprobs
    if kind == "logit" or with_image is None or without is None:
        return logits[0] - logits[1]
    return with_image - without if kind == "logprob" else with_image.exp() - without.exp()


def delta_grid(main: MainPass, labels_BL: Tensor, contrast: ContrastOutput, head: Head, options: CALOptions) -> Tensor:
    """[B, L-1] Δ as the released codes take it: every position, vocabulary id 0 where there is no label."""
    targets = labels_BL[:, 1:].clamp(min=0)
    if contrast.grid is None:
        return torch.zeros(targets.shape, device=targets.device)
    head = head.detached()

    def score(hidden_BLD: Tensor) -> Tensor:
        rows, more = hidden_BLD.detach()[:, :-1].flatten(0, 1), head.options()
        if options.delta == "logit":
            return label_logits(rows, head.weight, targets.flatten(), **more).view_as(targets)
        more["chunk_size"] = options.chunk_size
        return label_logprobs(rows, head.weight, targets.flatten(), **more).exp().view_as(targets)

    return score(main.hidden) - score(contrast.grid)
