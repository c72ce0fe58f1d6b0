"""CALTrainer as ``seecal train`` runs it: a learning rate for each group, and a stop that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerState

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

    def take(self, checkpoint: Path) -> bool:
        """Load a checkpoint if it is of the last step; False if there are steps left. Trainer would take one step more.

        Not when sharded: the shards are laid out only in ``train()``. Its one step more is at the end of the schedule.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self._rates:
            split_by_learning_rate(optimizer, cast(nn.Module, model or self.model), self._groups, self._rates)
        return optimizer
