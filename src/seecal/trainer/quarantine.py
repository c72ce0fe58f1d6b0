"""CALTrainer's part of a quarantine: batches that a bad record does not stop, the file, and the end when they are many."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import TrainerCallback

from ..data.collators.quarantine import GuardedDataset, QuarantineCollator
from ..data.collators.vision import VisionCollator
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
    _counted: _Met | None = None

    @property
    def quarantine(self) -> QuarantineFile:
        """The file that the records are written to."""
        if getattr(self, "_quarantine", None) is None:
            self._quarantine = QuarantineFile(Path(str(self.args.output_dir)) / NAME)
        return self._quarantine

    @quarantine.setter
    def quarantine(self, file: QuarantineFile) -> None:
        self._quarantine = file

    @property
    def _met(self) -> _Met:
        if self._counted is None:  # an evaluation before any training
            self._counted = _Met(self.quarantine.stage)
        return self._counted

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
        if is_training and isinstance(self.data_collator, VisionCollator):
            self.data_collator.draw_spares_from(dataset if is_indexed(dataset) else None)
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
        met = self._met
        met.add(self.quarantine.follow())
        if not training:  # each evaluation meets them again
            entries = [entry for entry in entries if entry["id"] not in met.evaluated]
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
        met = self._met
        met.add(self.quarantine.follow())
        args, most = self.args, self.args.max_bad_records
        of_a_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = (self.state.global_step + 1) * of_a_step
        shared = most is not None and 0 < most < 1
        bad = met.times if shared else len(met.ids)
        message = too_many(bad, seen, most, "met in training", self.quarantine.path, met.some)
        if message is not None:
            raise ValueError(message)

    def begin_quarantine(self) -> None:
        """All ranks come here before the first step: what a run before this one met after the checkpoint is met again."""
        if self.is_world_process_zero():
            self.quarantine.begin(self.state.global_step)
        self.accelerator.wait_for_everyone()
        self.quarantine.rewind()
        self._counted = _Met(self.quarantine.stage)


class _Met:
    """What the file says that this stage has met so far, on all ranks.

    Attributes:
        times: how often a record was put aside in training.
        ids: of those records.
        some: reasons, the first of them.
        evaluated: ids of records put aside in evaluations.
    """

    def __init__(self, stage: int | None) -> None:
        self._stage = stage
        self.times, self.ids, self.some, self.evaluated = 0, set[Any](), list[str](), set[Any]()

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            if entry["where"] == EVALUATION:
                self.evaluated.add(entry["id"])
            elif entry["where"] == TRAINING and entry["stage"] == self._stage:
                self.times += 1
                self.ids.add(entry["id"])
                if len(self.some) < _SAID:
                    self.some.append(entry["reason"])


class QuarantineCallback(TrainerCallback):
    """Forgets, where a run goes on, what the one before met after the checkpoint: it is met again."""

    def __init__(self, trainer: QuarantineTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_quarantine()
