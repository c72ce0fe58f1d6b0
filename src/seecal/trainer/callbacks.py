"""What watches a training: how far it is, a stop that can be resumed, the first gradients."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers import ProgressCallback as TrainersBars
from transformers.trainer_utils import has_length

from ..ops.distributed import sum_over_ranks, world_size
from ..verbosity import Progress, Task

logger = logging.getLogger(__name__)


class ProgressCallback(TrainerCallback):
    """Trainer's steps and evaluations on a :class:`seecal.verbosity.Progress`, in place of Trainer's own bars.

    Args:
        progress: where to show them.
        name: what is trained, "stage 1 of 2" for one.
        logs: whether to print each log as a line, as Trainer does.
    """

    def __init__(self, progress: Progress, name: str, logs: bool = True) -> None:
        self._progress, self._name, self._logs = progress, name, logs
        self._steps: Task | None = None
        self._batches: Task | None = None

    def replace_bars_of(self, trainer: Any) -> None:
        """Take the place of Trainer's own bars and lines."""
        for other in (TrainersBars, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = self._progress.start(self._name, state.max_steps, unit="step", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.advance(state.global_step - self._steps.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
        if self._steps is not None and "cross_entropy" in logs:
            delta = f"  Δ {logs['delta_mean']:+.2f}" if "delta_mean" in logs else ""
            self._steps.advance(0, note=f"loss {logs['cross_entropy']:.2f}{delta}")
        if self._logs and state.is_world_process_zero:
            print({name: f"{one:.4g}" if isinstance(one, float) else one for name, one in logs.items()}, flush=True)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._batches is None:
            # A stream's loader has a __len__, which raises
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._batches = self._progress.start(f"evaluate {self._name}", total, unit="batch")
        self._batches.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._batches is not None:
            self._batches.end()
            self._batches = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.end()


# Those that stop a training, the strongest first. USR1 is what Slurm is asked to send before a job's time is over.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class StopOnSignal(TrainerCallback):
    """SIGTERM, Ctrl-C or USR1: a checkpoint at the next end of a step, then training ends. A second signal ends it at once.

    ``signal`` is the number of the signal that any rank got, 0 before: all ranks stop at the same step.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._got = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block signals are heard; not those that somebody else has a handler for, and only in the main thread,
        where Python allows it."""
        before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {one: signal.getsignal(one) for one in _SIGNALS if signal.getsignal(one) in _DEFAULTS}
        for one in before:
            signal.signal(one, self._note)
        self._before = before
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._got = number
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._got or world_size() > 1:
            got = torch.tensor([self._got == one for one in _SIGNALS], dtype=torch.int64, device=args.device)
            counts = sum_over_ranks(got).tolist()
            self.signal = next((int(one) for one, count in zip(_SIGNALS, counts, strict=True) if count), 0)
        if self.signal:
            control.should_save = control.should_training_stop = True


class GradientCheck(TrainerCallback):
    """After the first step with an image: every trainable tensor has a gradient and no frozen one has.

    What is silently left out of training (a projector behind a wrong LoRA setting, say) is found before the second step.

    Raises:
        ValueError: from ``train()``, naming tensors on the wrong side.
    """

    def __init__(self) -> None:
        self._images = self._done = self._stepped = False
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def note(module: Any, _: Any, inputs: dict[str, Any]) -> None:
            if not module.training:
                return  # an evaluation, or a measurement: its images are not the step's
            given = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
            self._images = self._images or given

        # DeepSpeed keeps gradients in buffers of its own, .grad is empty
        self._done = args.deepspeed_plugin is not None
        self._hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stepped = True
        if self._done or not self._images:
            return
        self._done = True
        named = list(model.named_parameters())
        without = [name for name, one in named if one.requires_grad and one.grad is None]
        frozen = [name for name, one in named if not one.requires_grad and one.grad is not None]
        for names, what in ((without, "trainable tensors got no gradient"), (frozen, "frozen tensors got a gradient")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"step {state.global_step + 1}: {len(names)} {what}: {', '.join(names[:3])}{more}. The loss does not "
                    "reach them as `train` says it should. Change train, or set check_gradients: false to go on."
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._stepped and not self._done:
            logger.warning("no step had an image: the projector has not been trained, and gradients were not checked")
