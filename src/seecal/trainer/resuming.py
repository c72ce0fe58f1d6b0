"""SFTTrainer that goes on exactly where a checkpoint was written, or says why it cannot."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState

from ..core.contrasts import contrast_named
from ..core.options import OVER_THE_STEP
from ..data.collators.vision import VisionCollator
from .fingerprint import fingerprint, what_differs
from .manifests import MANIFEST
from .sampling import GROUPED
from .saving import SavingTrainer

logger = logging.getLogger(__name__)

_REMEDY = "or set ignore_data_skip=True to go on with these data from their beginning"


class ExactTrainer(SavingTrainer):
    """What a checkpoint says beside Trainer's own state, and what is made of it when a run goes on there.

    In its manifest: ``data`` (:func:`fingerprint`), ``order``, ``batch``, ``ranks``, and ``running``, for each rank what it
    had summed up since the last log.
    """

    _goes_on: Mapping[str, Any] | None = None  # the manifest of the checkpoint that this run goes on from
    _fingerprint: tuple[Any, dict[str, Any]] | None = None  # of which data set, and what
    _left_over = 0  # micro-batches of a stream's pass that make no step
    _begun_inside: int | None = None  # the pass in the middle of which this run goes on

    # ---- Writing ----

    def _about(self) -> dict[str, Any]:
        running = gather_object([self._running()])
        if not self.args.should_save:
            return {}
        return {**super()._about(), **self._told_now(), "running": running}

    def _told_now(self) -> dict[str, Any]:
        args = self.args
        return {
            "data": self._data_now(),
            "order": {
                "strategy": str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)),
                "seed": args.seed if args.data_seed is None else args.data_seed,
            },
            "ranks": args.world_size,
            "batch": {"per_device": self._train_batch_size, "accumulation": args.gradient_accumulation_steps},
        }

    def _data_now(self) -> dict[str, Any]:
        if self._fingerprint is None or self._fingerprint[0] is not self.train_dataset:
            self._fingerprint = self.train_dataset, fingerprint(self.train_dataset)
        return self._fingerprint[1]

    def _running(self) -> dict[str, Any]:
        """What this rank has summed up since the last log; JSON keeps floats as they are."""
        return {"loss": self._tr_loss.item(), "logged": self._globalstep_last_logged}

    # ---- Reading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._fingerprint = self._goes_on = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_goes_on(self, checkpoint: str | Path) -> None:
        """Look whether a step of this run after ``checkpoint`` has the records that it would have had without the stop.

        Raises:
            ValueError: the data are others, or their order or batches would be; it says what was and is.
        """
        wrong, self._goes_on = self._first_ranks(lambda: self._refusal(Path(checkpoint)))
        if wrong is None:
            return
        if not self.args.ignore_data_skip:
            raise ValueError(f"{checkpoint}: {wrong}, {_REMEDY}.")
        logger.warning("%s: %s. It goes on with ignore_data_skip=True all the same", checkpoint, wrong)

    def _refusal(self, checkpoint: Path) -> tuple[str | None, dict[str, Any] | None]:
        try:
            told = json.loads((checkpoint / MANIFEST).read_text("utf8"))
        except (OSError, ValueError):
            return None, None  # said already, where it matters
        if "data" not in told:
            logger.warning("%s does not say what data it was written with: they may be others than these", checkpoint)
            return None, None
        now = self._told_now()
        wrong = what_differs(told["data"], now["data"], self.train_dataset)
        if wrong is not None:
            wrong = (
                f"train_dataset is not the one that it was written with: {wrong}. Give the data that it was begun with"
            )
        else:
            wrong = self._other_order(told, now) or self._other_batches(told, now)
        return wrong, {"step": told["step"], "ranks": told["ranks"], "running": told["running"]}

    def _other_order(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        if now["data"]["records"] is None:
            return None
        before, here = was["order"], now["order"]
        if before["strategy"] != here["strategy"]:
            one, other = before["strategy"], here["strategy"]
            return f"train_sampling_strategy was {one!r}, is {other!r}. Set it to {one!r}"
        if before["strategy"] != "sequential" and before["seed"] != here["seed"]:
            one, other = before["seed"], here["seed"]
            return f"the seed of the order (data_seed, else seed) was {one}, is {other}. Set data_seed={one}"
        return None

    def _other_batches(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
        """Why a step would have other records with these ranks and batches; None if it has the same."""
        ways = [(one["ranks"], one["batch"]["per_device"], one["batch"]["accumulation"]) for one in (was, now)]
        if ways[0] == ways[1] or self.args.auto_find_batch_size:
            return None
        before, here = (f"{ranks} ranks x {size} x {accumulation}" for ranks, size, accumulation in ways)
        changed = f"ranks x batch x accumulation was {before}, is {here}"
        of_a_step, of_one_now = (ranks * size * accumulation for ranks, size, accumulation in ways)
        if of_a_step != of_one_now:
            return (
                f"{changed}: a step had {of_a_step} records and would have {of_one_now}. Set per_device_train_batch_size "
                f"and gradient_accumulation_steps so that they make {of_a_step} with the ranks"
            )
        again = f". Launch it with {before}"
        records, strategy = now["data"]["records"], now["order"]["strategy"]
        if self.is_deepspeed_enabled and ways[0][0] != ways[1][0]:
            return f"{changed}: DeepSpeed has written each rank's part of the optimizer state for that rank{again}"
        if records is None:
            return f"{changed}: a stream is cut into batches before they are dealt out, which would be others{again}"
        if strategy in GROUPED:
            return f"{changed}: train_sampling_strategy={strategy!r} makes batches for so many ranks{again}"
        normalize = getattr(self.args, "normalize", "global")
        if ways[0][1] != ways[1][1] and normalize not in OVER_THE_STEP:
            return f"{changed}: normalize={normalize!r} averages inside each rank's batch{again}"
        contrast = getattr(self.args, "contrast", "drop")
        if ways[0][1] != ways[1][1] and contrast_named(contrast).takes_others:
            return f"{changed}: contrast={contrast!r} takes an image of the same rank's batch{again}"
        if records % of_a_step and not 0 < self.args.max_steps <= records // of_a_step:
            return (
                f"{changed}: {records} records are no whole number of steps of {of_a_step}, and what is left at the end "
                f"of an epoch is shared out by ranks{again}"
            )
        return None

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Trainer's, which looks for the best checkpoint where it was written, and takes all steps over a stream to be of
        one pass, also where it has ended and begun again."""
        passes, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self._find_best(Path(str(resume_from_checkpoint)), trial)
        if not (resume_from_checkpoint is None or self.args.ignore_data_skip or self._has_length()):
            saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            passes = int(saved.epoch or 0)
            # Trainer counts as though a pass had all steps' batches
            of_a_pass = saved.max_steps * self.args.gradient_accumulation_steps
            batches = round(((saved.epoch or 0) - passes) * of_a_pass)
        self._begun_inside = passes if batches else None
        return passes, batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Trainer's, without what a stream has left where it ends in the middle of a step.

        Trainer would run those micro-batches and never step on them: their gradients and sums would go into the first step
        of the next pass. They are left out like records that fill no batch under ``dataloader_drop_last``, so that a step
        is the same whether its run began before them or goes on after them.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:
            self._left_over, batches = self._left_over or len(batches), []
        return batches, count

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        """Trainer's, which takes a step before it asks whether any is left: the checkpoint may be of the last one.

        Raises:
            ValueError: a stream that ends before its first step; Trainer would begin it again for ever.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if isinstance(self.data_collator, VisionCollator):  # for Trainer's state, all steps over a stream are one epoch
            self.data_collator.epoch = epoch
        before, self._left_over = self.state.global_step, 0
        super()._run_epoch(model, epoch, *args, **kwargs)
        if self._left_over and self.state.global_step == before and epoch != self._begun_inside:
            several = self.args.gradient_accumulation_steps
            raise ValueError(
                f"train_dataset is a stream that ends after {self._left_over} batches, and a step takes {several}: no pass "
                f"over it makes one. Set gradient_accumulation_steps to {self._left_over} or less, or give it more records."
            )

    def _has_length(self) -> bool:
        try:
            return len(self.train_dataset) >= 0  # type: ignore[arg-type]
        except TypeError:
            return False

    def _take_running(self) -> None:
        """The sums that were not logged yet when the checkpoint was written. Of other ranks: all on the first."""
        told = self._goes_on
        if told is None or told["step"] != self.state.global_step:
            return
        here, ranks = self.args.process_index, told["running"]
        if len(ranks) == self.args.world_size:
            self._run_on(ranks[here], 1)
            return
        for one in ranks:
            self._run_on(one, len(ranks), counts=here == 0)

    def _run_on(self, running: Mapping[str, Any], parts: int, counts: bool = True) -> None:
        """Add one rank's sums. ``parts``: the loss is a mean over so many ranks; ``counts``: whether sums go on here."""
        loss = torch.tensor(running["loss"], device=self._tr_loss.device) / parts
        self._tr_loss += loss
        self._total_loss_scalar -= loss.item()  # train_loss is that of this call's steps
        self._globalstep_last_logged = running["logged"]


class ExactCallback(TrainerCallback):
    """Takes over the sums, once Trainer has made its own."""

    def __init__(self, trainer: ExactTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._take_running()
