"""CALTrainer as ``seecal train`` runs it: a learning rate for each group, and a stop that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..trainer.cal_trainer import CALTrainer
from .trainable import split_by_learning_rate


class _GroupedByEpoch(LengthGroupedSampler):
    """Batches that depend on the seed and the epoch alone: the same on all ranks, and after a resume."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class StageTrainer(CALTrainer):
    """CALTrainer with learning rates for single groups.

    Args:
        groups: parameter name → group (``Prepared.groups``).
        learning_rates: group → learning rate; the others train at ``args.learning_rate``.
    """

    def __init__(self, *args: Any, groups: Mapping[str, str], learning_rates: Mapping[str, float], **kwargs: Any):
        self._groups, self._rates = groups, learning_rates
        super().__init__(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        if self.args.length_column_name not in columns:
            columns.append(self.args.length_column_name)  # the sampler looks for it in what is left

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # transformers' own draws from the global random numbers, which differ after a resume and between ranks
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _GroupedByEpoch(sampler.batch_size, sampler.lengths, seed)

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
