"""CALTrainer's part of a quarantine: batches that a bad record does not stop, the file, and the end when they are many."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import TrainerCallback

from ..data.collators.quarantine import GuardedDataset, QuarantineCollator
from ..data.sources.quarantine_file import EVALUATION, NAME, TRAINING, QuarantineFile, too_many
from .cal_config import CALConfig
from .resuming import ExactTrainer
from .samples import is_indexed

logger = logging.getLogger(__name__)


_SAID = 10  # records that are also named in the log


class QuarantineTrainer(ExactTrainer):
    """With ``on_bad="skip"``: a record that fails while its batch is made is put aside, and another takes its row.

    The file is ``quarantine.jsonl`` in ``output_dir``; :attr:`quarantine` may be set to another before training.
    """

    args: CALConfig
    _said = 0

    @property
    def quarantine(self) -> QuarantineFile:
        """The file that the records are written to."""
        if getattr(self, "_quarantine", None) is None:
            self._quarantine = QuarantineFile(Path(str(self.args.output_dir)) / NAME)
        return self._quarantine

    @quarantine.setter
    def quarantine(self, file: QuarantineFile) -> None:
        self._quarantine = file

    def _skips(self) -> bool:
        return self.args.on_bad == "skip" and not self._is_tokenised_up_front()

    def _is_tokenised_up_front(self) -> bool:
        return False

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if not self._skips():
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        whole = dataset  # samplers look at its columns
        guarded = GuardedDataset(dataset) if is_indexed(dataset) else None
        plain = self.data_collator
        self.data_collator = cast(Any, QuarantineCollator(plain, guarded, learn=is_training))
        try:
            return super()._get_dataloader(
                dataset if guarded is None else guarded,
                description,
                batch_size,
                None if sampler_fn is None else lambda _: sampler_fn(whole),
                is_training,
                dataloader_key,
            )
        finally:
            self.data_collator = plain

    def _put_aside(self, notes: Sequence[str]) -> None:
        """Write what a batch brought; ValueError when it is too much."""
        if not notes:
            return
        training = cast(Any, self.model).training
        state, args = self.state, self.args
        entries = [
            {
                **json.loads(note),
                "where": TRAINING if training else EVALUATION,
                "step": state.global_step + training,  # a step is counted when it is done
                "epoch": state.epoch,
                "rank": args.process_index,
            }
            for note in notes
        ]
        if not training:  # each evaluation meets them again
            known = {entry["id"] for entry in self.quarantine.read() if entry["where"] == EVALUATION}
            entries = [entry for entry in entries if entry["id"] not in known]
        for entry in entries[: max(0, _SAID - self._said)]:
            place = "its row counts for nothing" if not training else f"{entry['replaced_by']} takes its place"
            logger.warning("put aside in step %d: %s %s", entry["step"], entry["reason"], place)
        if self._said < _SAID <= self._said + len(entries):
            logger.warning("%s has these records, and those from here on, which are not said", self.quarantine.path)
        self._said += len(entries)
        self.quarantine.add(entries)
        if training:
            self._stop_at_too_many()

    def _stop_at_too_many(self) -> None:
        """Counted over all ranks, which write into one file, without asking them."""
        met = [entry for entry in self.quarantine.read() if entry["where"] == TRAINING]
        met = [entry for entry in met if entry["stage"] == self.quarantine.stage]
        args, most = self.args, self.args.max_bad_records
        of_a_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = (self.state.global_step + 1) * of_a_step
        shared = most is not None and 0 < most < 1
        bad = len(met) if shared else len({entry["id"] for entry in met})
        some = [entry["reason"] for entry in met]
        message = too_many(bad, seen, most, "met in training", self.quarantine.path, some)
        if message is not None:
            raise ValueError(message)


class QuarantineCallback(TrainerCallback):
    """Forgets, where a run goes on, what the one before met after the checkpoint: it is met again."""

    def __init__(self, trainer: QuarantineTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._trainer.quarantine.begin(state.global_step)
        self._trainer.accelerator.wait_for_everyone()
