"""What the two passes measure (VisualDelta), and what a training forward leaves behind (CALOutput).

B rows of the batch, L columns, N label tokens (``labels[:, 1:] != -100``, row by row in batch order).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VisualDelta:
    """What the image changes at each of the N label tokens. All [N], detached; floats are float32, in logits.

    Attributes:
        delta: Δ, the label's logit (or log-probability, see ``CALOptions.delta``) with the image minus without it. 0 where
            ``has_contrast`` is False.
        labels: the label ids.
        sample: the row of the batch.
        position: the label's column, 1 or more.
        has_contrast: False for text-only samples, for labels before a sample's first image, and for a label directly
            after an image (it has no text predecessor); in training also everywhere with a weighting that does not read
            the pass without the image.
        logit_with, logit_without: the label's raw logit in either pass; where ``has_contrast`` is False both are the
            with-image one.
        logprob_with, logprob_without: the label's log-probability in either pass, in nats; each None unless the options
            ask for both or the weighting reads it.
        delta_grid: Δ on the whole grid [B, L-1], prompt and padding positions taken at vocabulary id 0; only for
            ``pool_scope="released"``.
    """

    delta: Tensor
    labels: Tensor
    sample: Tensor
    position: Tensor
    has_contrast: Tensor
    logit_with: Tensor | None = None
    logit_without: Tensor | None = None
    logprob_with: Tensor | None = None
    logprob_without: Tensor | None = None
    delta_grid: Tensor | None = None

    @property
    def runs(self) -> Tensor:
        """[N] int64: an id that changes when the sample changes or the position skips."""
        first = torch.ones_like(self.sample, dtype=torch.bool)
        first[1:] = (self.sample[1:] != self.sample[:-1]) | (self.position[1:] != self.position[:-1] + 1)
        return first.cumsum(0) - 1

    def __len__(self) -> int:
        return len(self.delta)


@dataclass
class CALOutput:
    """What one CAL forward leaves behind in ``output.cal``. The tensors are this rank's and this micro-batch's own.

    Attributes:
        weights: w, [N] float32, detached, as the weighting gave them (not normalised).
        visual_delta: Δ and its two logits at the N label tokens.
        loss_sum: Σ w·CE in nats, scalar, carries gradients (for a caller that normalises by itself); detached with
            ``normalize="sample"``.
        weight_sum: Σ w, scalar, detached.
        cross_entropy: plain Σ CE / N in nats, scalar, detached; 0 without label tokens.
        aux_loss: the load-balancing loss of a mixture-of-experts decoder times its coefficient, scalar, carries gradients;
            None where there is none. It is in ``output.loss`` and not in ``loss_sum``.
        is_top1: whether no other token is likelier than the label, [N] bool; None unless CALTrainer counts it.
        main_tokens, contrast_tokens: token positions that went through the decoder in either pass, padding included.
    """

    weights: Tensor
    visual_delta: VisualDelta
    loss_sum: Tensor
    weight_sum: Tensor
    cross_entropy: Tensor
    main_tokens: int
    contrast_tokens: int
    aux_loss: Tensor | None = None
    is_top1: Tensor | None = None
