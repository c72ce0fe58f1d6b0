"""The loss of one optimizer step over all its micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.outputs import CALOutput
from .metrics import RunningSums


class GlobalStep:
    """normalize="global": Σ w·CE of a step over the Σ w of all its micro-batches and ranks; normalize="tokens": over the
    number of their label tokens, which is known before the first forward, so that nothing is put in its place.

    Σ w of the step is known only after its last forward. Until then any divisor that is the same in all micro-batches and
    ranks will do; the label count keeps fp16 gradients in range. :meth:`finish` puts Σ w in its place.

    A load-balancing loss aux_k of micro-batch k goes in as W_k·aux_k with W_k = Σ w of the micro-batch (or its label
    tokens), so that Σ W_k/W · aux_k is left of it: exactly aux in one micro-batch, the mean weighted by W_k in several.

    Args:
        accelerator: of the trainer.
        sums: ``loss``, of this rank's micro-batches of the step so far; :meth:`finish` leaves the whole step's there.
        device: of the gradients.
        by_tokens: normalize="tokens".
    """

    def __init__(self, accelerator: Any, sums: RunningSums, device: torch.device, by_tokens: bool = False) -> None:
        self._accelerator, self._sums, self._device, self._by_tokens = accelerator, sums, device, by_tokens
        self.forget()

    def forget(self) -> None:
        """Nothing of the step that was begun counts any more."""
        self._sums.clear()
        self._divisor: Tensor | None = None  # of the losses of this step's micro-batches
        self._provisional = False  # whether it stands for a Σ w that was not known yet

    def share(self, cal: CALOutput, label_count: Any) -> Tensor:
        """What to back-propagate for one micro-batch. ``label_count``: of the whole step, over all ranks."""
        weight = torch.full_like(cal.weight_sum, len(cal.weights)) if self._by_tokens else cal.weight_sum
        loss_sum = cal.loss_sum if cal.aux_loss is None else cal.loss_sum + weight * cal.aux_loss
        self._sums.add(loss=loss_sum, weight=weight)
        if self._divisor is None:
            several = not self._accelerator.sync_gradients  # else the first micro-batch is also the last
            self._provisional = several and not self._by_tokens
            if several:
                divisor = torch.as_tensor(label_count)
            else:
                divisor = self._accelerator.reduce(weight.clone(), "sum")
            self._divisor = torch.where(divisor > 0, divisor, 1).to(self._device)
        # Wrappers for several ranks average gradients: a sum over ranks needs their number.
        return loss_sum * (self._accelerator.num_processes / self._divisor)

    def finish(self, model: nn.Module) -> Tensor:
        """Gradients and loss of the step over Σ w of all its micro-batches and ranks, before they are clipped.

        Under an fp16 loss scale the gradients are still scaled here, which a factor does not mind.
        """
        total = self._sums.over_ranks(self._accelerator)
        weight = torch.where(total["weight"] > 0, total["weight"], 1)  # no label anywhere: the gradients are zeros
        assert self._divisor is not None
        factor = (self._divisor / weight).float()
        self._divisor = None
        if self._provisional:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        grad = parameter.grad
                        grad = grad.to_local() if hasattr(grad, "to_local") else grad
                        grad.mul_(factor.to(grad.device))
        loss = (total["loss"] / weight).float()
        self._sums.add(loss=loss)
        return loss
