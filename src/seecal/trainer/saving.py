"""SFTTrainer whose checkpoints are whole or not there, whatever ends the process while one is written."""

from __future__ import annotations

import contextlib
import errno
import logging
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, is_peft_model
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from .. import __version__
from .callbacks import StopOnSignal
from .checkpoints import (
    aside,
    bytes_needed,
    checkpoints_in,
    clear_aside,
    damage,
    finish,
    lack_of_room,
    newest_checkpoint,
    no_room,
    pickled_weights,
)
from .hangs import WatchedTrainer
from .manifests import MANIFEST, check_manifest

logger = logging.getLogger(__name__)

_NONE = 1 << 20  # bytes free on a disk that is full, whatever the error says: torch's zip writer says "unexpected pos"


class SavingTrainer(WatchedTrainer):
    """Where Trainer writes and reads checkpoints: aside first, checked, renamed; verified before one is gone on from."""

    _aside: Path | None = None  # while a checkpoint is written
    _to_push: str | None = None
    _verified: Path | None = None

    # ---- Writing ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own checkpoint, written in a folder aside. It gets its name when every byte is on the disk, and only
        then an older one goes.

        Raises:
            OSError: there is no room for it, or there was none in the middle; earlier checkpoints are as they were.
        """
        folder, step = Path(super()._get_output_dir(trial)), self.state.global_step
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            clear_aside(folder)
        self.accelerator.wait_for_everyone()
        needed = self._bytes_needed(folder)
        if (full := self._first_ranks(lambda: lack_of_room(folder, needed))) is not None:
            raise OSError(errno.ENOSPC, full)
        with self._written_aside(folder, step, needed):
            super()._save_checkpoint(model, trial)
            self._wait_for_the_first()
            self._name_the_best_by(folder, step)
            about = self._about()
            self.accelerator.wait_for_everyone()  # each rank has written its own random numbers
            if self.args.should_save:
                finish(folder, step, about, self._beat_of_files)
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            super()._push_from_checkpoint(str(folder / f"checkpoint-{step}"))
            self._to_push = None
        self.watchdog.beat(f"checkpoint-{step} has its name")
        if self.args.should_save:
            best = self.state.best_model_checkpoint  # it is told from the others by its path
            rotate_checkpoints(str(folder), self.args.save_total_limit, best and str(folder / Path(best).name))

    def _beat_of_files(self) -> None:
        self.watchdog.beat(f"some more of a checkpoint is read after step {self.state.global_step}")

    def _about(self) -> dict[str, Any]:
        """What the manifest says beside the files; all ranks come here."""
        return {"seecal": __version__, "ranks": self.args.world_size}

    def _bytes_needed(self, folder: Path) -> int:
        optimizer = None if self.args.save_only_model or self.is_deepspeed_enabled else self.optimizer
        return bytes_needed(
            folder, self.model, getattr(optimizer, "optimizer", optimizer), trainable_only=is_peft_model(self.model)
        )

    @contextlib.contextmanager
    def _written_aside(self, folder: Path, step: int, needed: int) -> Iterator[None]:
        self._aside = aside(folder, step)
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(folder).free
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)
            if _is_full_disk(error) or free < _NONE:
                raise OSError(errno.ENOSPC, no_room(folder, needed, free)) from error
            raise
        finally:
            self._aside = None

    def _first_ranks(self, answer: Callable[[], Any]) -> Any:
        """What ``answer`` returns on the first rank, on all of them: each would read the same disk."""
        found = [answer() if self.is_world_process_zero() else None]
        return (broadcast_object_list(found) if self.args.world_size > 1 else found)[0]

    def _name_the_best_by(self, folder: Path, step: int) -> None:
        """If it is the best so far, Trainer has noted where it lies now and not where it will."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != self._aside:
            return
        self.state.best_model_checkpoint = str(folder / Path(best).name)
        if self.args.should_save:
            self.state.save_to_json(str(aside(folder, step) / f"checkpoint-{step}" / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._to_push = checkpoint_folder  # once it has its name: the upload goes on in the background

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # The arguments once more, as a pickle that nothing of ours or of Trainer's reads again
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        self.watchdog.beat(f"the weights after step {self.state.global_step} are written")

    # ---- Reading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. A checkpoint is read to its last byte before it is gone on from; SIGTERM, Ctrl-C and USR1 save one
        at the end of the step, unless ``save_strategy`` is "no".

        Args:
            resume_from_checkpoint: True: the newest whole one of ``output_dir``; those that are damaged are named and
                passed over. A folder: that one.

        Raises:
            ValueError: the folder is damaged, or there is no whole one; it was written with other data, or another order or
                size of batches; it says what was wrong.
            KeyboardInterrupt, SystemExit: after Ctrl-C; after SIGTERM (143) or USR1 (138), with a checkpoint saved.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole(resume_from_checkpoint)
            self.check_goes_on(resume_from_checkpoint)
        caller_stops = any(isinstance(one, StopOnSignal) for one in self.callback_handler.callbacks)
        if caller_stops or self.args.save_strategy == SaveStrategy.NO:
            with _pickles_named(resume_from_checkpoint):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        stop = StopOnSignal()
        self.add_callback(stop)
        try:
            with stop.listening(), _pickles_named(resume_from_checkpoint):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(stop)
        if stop.signal and self.state.global_step < self.state.max_steps:
            self._end_by(stop.signal)
        return output

    def _end_by(self, number: int) -> None:
        """The script does not go on as though the training were complete."""
        step = self.state.global_step
        logger.warning(
            "stopped by %s at step %d of %d; checkpoint-%d is saved: train(resume_from_checkpoint=True) goes on there",
            signal.Signals(number).name, step, self.state.max_steps, step,
        )  # fmt: skip
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def check_goes_on(self, checkpoint: str | Path) -> None:
        """ValueError where this run would not go on with what the checkpoint was written in the middle of."""

    def newest_whole(self, folder: str | Path, say: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint there, read by the first rank alone; ``say`` is told on it about the others."""
        self._verified = self._first_ranks(lambda: newest_checkpoint(Path(folder), say))
        return self._verified

    def _whole(self, asked: str | bool) -> str:
        folder = Path(str(self.args.output_dir))
        if asked is True:
            newest = self.newest_whole(folder, logger.warning)
            if newest is None:
                there = ", ".join(f"{one.name} ({damage(one)})" for one in checkpoints_in(folder)) or "none"
                raise ValueError(
                    f"{folder}: no whole checkpoint to resume from; found: {there}. Set resume_from_checkpoint to another "
                    "folder, or leave it out to begin again."
                )
            return str(newest)
        checkpoint = Path(str(asked))
        if checkpoint != self._verified and checkpoint.is_dir():
            self._refuse_damaged(checkpoint)
        return str(checkpoint)

    def _refuse_damaged(self, checkpoint: Path, wrong_with: Callable[[Path], str | None] = damage) -> None:
        if not (checkpoint / MANIFEST).exists():
            if (pickled := self._first_ranks(lambda: pickled_weights(checkpoint))) is not None:
                raise ValueError(f"{checkpoint}: {pickled}. Save them as safetensors, or begin from them as a model.")
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"{checkpoint} has no {MANIFEST}, and reading the shards of FSDP or DeepSpeed unpickles them, which "
                    "can run code. Set resume_from_checkpoint to a checkpoint that seecal wrote."
                )
            logger.warning("%s has no %s: whether it is whole cannot be told", checkpoint, MANIFEST)
        elif (wrong := self._first_ranks(lambda: wrong_with(checkpoint))) is not None:
            raise ValueError(
                f"{checkpoint} is damaged: {wrong}. Set resume_from_checkpoint=True for the newest whole one of output_dir."
            )

    def _find_best(self, checkpoint: Path, trial: Any) -> None:
        """Names the best checkpoint so far, after a resume from ``checkpoint``, by where it lies now. The run may have been
        moved, or its folder be spelled in another way: Trainer then takes it for lost, or for one that may be deleted.

        Raises:
            ValueError: with ``load_best_model_at_end``, it lies outside of this run.
        """
        named = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        if named is None:
            return
        folder = Path(super()._get_output_dir(trial))
        here = folder / Path(str(named)).name
        is_here, is_there = self._first_ranks(lambda: (here in checkpoints_in(folder), Path(str(named)).is_dir()))
        if is_here:
            self.state.best_model_checkpoint = str(here)
        elif not self.args.load_best_model_at_end:
            return
        elif is_there:
            raise ValueError(
                f"the best checkpoint is {named}, outside of {folder}, and there is none of its name inside. Copy it "
                "there, or set load_best_model_at_end=False."
            )
        else:
            logger.warning("%s, the best checkpoint so far, is gone: the best of those from here on is loaded", named)
            self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None

    def _check_best(self) -> None:
        """ValueError where what ``load_best_model_at_end`` reads is damaged. It lies in ``output_dir``: see _find_best."""
        best = Path(str(self.state.best_model_checkpoint))
        self.watchdog.held = not self.is_world_process_zero()  # who reads it
        self._refuse_damaged(
            best, lambda folder: check_manifest(folder, self._beat_of_files) or pickled_weights(folder)
        )
        self._beat_of_files()


@contextlib.contextmanager
def _pickles_named(checkpoint: str | bool | None) -> Iterator[None]:
    """ValueError where a checkpoint's state holds more than numbers: torch reads it with weights_only and runs nothing."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if not checkpoint:
            raise
        raise ValueError(
            f"{checkpoint}: a file of its optimizer, scheduler or random state holds something else than numbers, which "
            "could run code, and is not read. Resume from a checkpoint of your own."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind an error; torch and safetensors raise errors of their own for it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error) or "os error 28" in str(error) or "file write failed" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
