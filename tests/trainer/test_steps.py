"""What one optimizer step is made of where it is not like the others: the last of an epoch, an overflow under fp16."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from seecal import CALTrainer
from seecal.trainer import callbacks
from seecal.trainer.callbacks import StopOnSignal
from tests.support.processes import interruptible
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records


def trainer_of(folder, batch_size, accumulation, n, **changes):
    args = sgd_config(folder, batch_size, accumulation, **changes)
    return CALTrainer(tiny_llava(), args, train_dataset=tiny_dataset(n), processing_class=tiny_llava_processor())


@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample", "tokens", "matched"])
def test_a_last_step_of_fewer_micro_batches_is_a_whole_step(normalize, tmp_path):
    """4 records where a step has two micro-batches of 4: the one that there is counts in full, not by half."""
    found = []
    for accumulation in (1, 2):
        settings = {"normalize": normalize, "max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0}
        trainer = trainer_of(tmp_path / str(accumulation), 4, accumulation, 4, **settings)
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        found.append((log["loss"], trainer.model.lm_head.weight.detach() - before))
    (loss, moved), (split_loss, split_moved) = found
    assert float(moved.abs().max()) > 1e-3
    assert split_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(split_moved, moved, atol=1e-6, rtol=1e-4)


class Stream:
    """Records that are read from the beginning again and again."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


STEP = ("loss", "cross_entropy", "grad_norm", "label_tokens", "delta_mean")


def steps_of(folder, data, batch_size, accumulation, callbacks=(), **changes):
    settings = {"max_steps": 3, "max_grad_norm": 0.0, "gradient_checkpointing": False, **changes}
    args = sgd_config(folder, batch_size, accumulation, **settings)
    trainer = CALTrainer(
        tiny_llava(), args, train_dataset=data, processing_class=tiny_llava_processor(), callbacks=[*callbacks]
    )
    trainer.train()
    return [[entry[name] for name in STEP] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("normalize", ["global", "tokens", "micro_batch", "sample", "matched"])
def test_what_a_stream_has_left_at_its_end_is_in_no_step(tmp_path, normalize):
    """Three micro-batches, the last perhaps of one record, where a step has two: the next pass begins with its own step."""
    expected = steps_of(tmp_path, tiny_records(7)[:4], 2, 2, normalize=normalize)
    for count in (6, 5) if normalize == "global" else (6,):
        assert steps_of(tmp_path, Stream(tiny_records(7)[:count]), 2, 2, normalize=normalize) == expected


@pytest.mark.parametrize(("accumulation", "left"), [(4, 3), (8, 3)])
def test_a_stream_that_makes_no_step_is_an_error(tmp_path, accumulation, left):
    """Trainer would begin it again for ever."""
    with pytest.raises(ValueError, match=rf"ends after {left} batches, and a step takes {accumulation}.*to {left} or"):
        steps_of(tmp_path, Stream(tiny_records(6)), 2, accumulation)


class EndsEarly(TrainerCallback):
    """Ends the first epoch after the first micro-batch of its second step."""

    calls = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.calls += 1
        control.should_epoch_stop = self.calls == 2


@pytest.mark.parametrize("normalize", ["global", "sample"])
def test_a_step_that_a_callback_breaks_off_is_forgotten(tmp_path, normalize):
    """The step after it has the gradients of its own micro-batches alone."""
    changes = {"max_steps": 4, "learning_rate": 0.0, "normalize": normalize}
    first, again, *_ = steps_of(tmp_path, tiny_records(8), 2, 2, [EndsEarly()], **changes)
    assert again[STEP.index("grad_norm")] == first[STEP.index("grad_norm")]
    assert normalize != "global" or again[0] == first[0]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "stops"),
    [
        (1.0, math.inf, 65536.0, False),  # fp16's first steps: the scaler skips them and halves its scale
        (1.0, math.nan, 2.0, False),
        (1.0, math.inf, 0.5, True),  # it has nothing left to halve
        (math.nan, math.inf, 65536.0, True),
        (1.0, math.inf, None, True),  # no scaler: bf16 or float32
        (1.0, 2.0, None, False),
    ],
)
def test_an_overflow_is_the_scalers_as_long_as_it_has_a_scale(loss, norm, scale, stops, tmp_path):
    trainer = trainer_of(tmp_path, 4, 1, 4)
    trainer.accelerator.scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    if stops:
        with pytest.raises(FloatingPointError, match="step 1: the loss is"):
            trainer._stop_unless_finite(torch.tensor(loss), torch.tensor(norm))
    else:
        trainer._stop_unless_finite(torch.tensor(loss), torch.tensor(norm))


def test_an_error_names_the_records_of_its_own_step_only(tmp_path):
    trainer = trainer_of(tmp_path, 2, 1, 6, max_steps=3)
    names = []
    stop = CALTrainer._stop_unless_finite

    def noting(self, *given):
        names.append(self._watch.records)
        stop(self, *given)

    trainer._stop_unless_finite = noting.__get__(trainer)
    trainer.train()
    assert names == [[f"record 'r{index}'" for index in pair] for pair in ((0, 1), (2, 3), (4, 5))]


def test_a_stopped_run_is_saved_and_ends():
    stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
    args = SimpleNamespace(device=torch.device("cpu"))
    stop.on_step_end(args, None, control)
    assert not control.should_save
    for number in (signal.SIGTERM, signal.SIGINT):
        stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
        with interruptible(), stop.listening():
            signal.raise_signal(number)
            stop.on_step_end(args, None, control)
        assert stop.signal == number
        assert control.should_save
        assert control.should_training_stop


def test_all_ranks_stop_where_one_got_the_signal(monkeypatch):
    """The ranks reduce at every step: one that did not get the signal hears of it there."""
    for got, expected in (
        ([1, 0, 0], signal.SIGTERM),
        ([0, 1, 1], signal.SIGINT),
        ([0, 0, 1], signal.SIGUSR1),
        ([0, 0, 0], 0),
    ):
        monkeypatch.setattr(callbacks, "world_size", lambda: 2)
        monkeypatch.setattr(callbacks, "sum_over_ranks", lambda value, got=got: value + torch.tensor(got))
        stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(SimpleNamespace(device=torch.device("cpu")), None, control)
        assert stop.signal == expected
        assert control.should_training_stop is bool(expected)
