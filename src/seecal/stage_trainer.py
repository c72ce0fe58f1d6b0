"""CALTrainer as ``seecal train`` runs it: a learning rate for each group, and a stop that can be resumed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from .ranks import sum_over_ranks, world_size
from .stages import split_by_learning_rate
from .trainer import CALTrainer


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


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: a checkpoint at the next end of a step, then training ends. A second signal ends it at once.

    ``signal`` is the number of the signal that any rank got, 0 before: all ranks stop at the same step.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._got = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {one: signal.signal(one, self._note) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._got = number
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL if one == signal.SIGTERM else signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._got or world_size() > 1:
            terminated = self._got == signal.SIGTERM
            got = torch.tensor([terminated, bool(self._got) and not terminated], dtype=torch.int64, device=args.device)
            by_term, by_key = sum_over_ranks(got).tolist()
            self.signal = int(signal.SIGTERM if by_term else signal.SIGINT if by_key else 0)
        if self.signal:
            control.should_save = control.should_training_stop = True
