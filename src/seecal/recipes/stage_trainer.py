"""CALTrainer as ``seecal train`` runs it: a learning rate for each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..trainer.cal_trainer import CALTrainer
from .trainable import split_by_learning_rate


class StageTrainer(CALTrainer):
    """CALTrainer with learning rates for single groups.

    Args:
        groups: parameter name → group (``Prepared.groups``).
        learning_rates: group → learning rate; the others train at ``args.learning_rate``.
    """

    def __init__(self, *args: Any, groups: Mapping[str, str], learning_rates: Mapping[str, float], **kwargs: Any):
        self._groups, self._rates = groups, learning_rates
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self._rates:
            split_by_learning_rate(optimizer, cast(nn.Module, model or self.model), self._groups, self._rates)
        return optimizer
