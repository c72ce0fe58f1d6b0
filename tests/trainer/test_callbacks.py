"""Callbacks: a signal that one of two ranks gets, the collator's epoch, evaluations whose length nobody knows."""

import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from seecal import CALTrainer, VisionCollator
from seecal.trainer.callbacks import ProgressCallback, StopOnSignal
from seecal.trainer.checkpoints import damage
from tests.support.paths import ROOT
from tests.support.processes import environment, interruptible, limit, two_ranks
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

WORKER = """
import os, sys, signal
from pathlib import Path
import torch
from transformers import TrainerCallback
from seecal import CALTrainer
from seecal.ops.distributed import leave
from seecal.trainer import StopOnSignal
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

torch.set_num_threads(1)
folder, number = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ["RANK"])

class SignalOne(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank == 1 and state.global_step == 1:
            os.kill(os.getpid(), number)

stop = StopOnSignal()
args = sgd_config(folder / "run", 2, 1, max_steps=6, save_strategy="no")
trainer = CALTrainer(
    tiny_llava(), args, train_dataset=tiny_dataset(32), processing_class=tiny_llava_processor(),
    callbacks=[SignalOne(), stop],
)
with stop.listening():
    trainer.train()
(folder / f"{rank}.txt").write_text(f"{trainer.state.global_step} {stop.signal}")
torch.distributed.barrier()
leave(0)
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_at_one_of_two_ranks_stops_both_at_the_same_step(tmp_path, number):
    """All ranks have to ask each other in each step: were it only the signalled one, it would wait for ever."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    two_ranks(script, tmp_path, int(number))
    expected = f"2 {int(number)}"
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [expected, expected]
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()


def test_the_reduction_happens_in_every_step_of_every_rank(monkeypatch):
    """The same in one process: a rank without a signal takes part in the sum, and hears of the other's."""
    from seecal.trainer import callbacks

    asked = []

    def sum_over_two(values):
        asked.append(values.tolist())
        return values + torch.tensor([1, 0, 0])  # the other rank got SIGTERM

    monkeypatch.setattr(callbacks, "world_size", lambda: 2)
    monkeypatch.setattr(callbacks, "sum_over_ranks", sum_over_two)
    stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_step_end(SimpleNamespace(device=torch.device("cpu")), None, control)
    assert asked == [[0, 0, 0]]
    assert stop.signal == signal.SIGTERM
    assert control.should_save
    assert control.should_training_stop


class Seen(VisionCollator):
    """Notes the epoch of each batch."""

    def __call__(self, records):
        self.__dict__.setdefault("seen", []).append(self.epoch)
        return super().__call__(records)


def test_the_collator_hears_of_each_epoch(tmp_path):
    collator = Seen(tiny_llava_processor())
    args = sgd_config(tmp_path, 4, 1, max_steps=-1, num_train_epochs=3)
    this = CALTrainer(tiny_llava(), args, collator, tiny_dataset(4), processing_class=tiny_llava_processor())
    this.train()
    assert collator.seen == [0, 1, 2]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_collator_hears_of_each_pass_over_a_stream(tmp_path, accumulation):
    """For Trainer's state all of them are one epoch. The same after a resume: the noise of a pass is its own."""
    rows = tiny_records(8)
    data = IterableDataset.from_generator(lambda: iter(rows))

    def trained(folder, resume):
        collator = Seen(tiny_llava_processor(), contrast="noise", strength=0.5)
        changes = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "contrast": "noise"}
        args = sgd_config(folder, 4 // accumulation, accumulation, **changes)
        this = CALTrainer(tiny_llava(), args, collator, data, processing_class=tiny_llava_processor())
        this.train(resume_from_checkpoint=resume)
        return collator.seen, [(one["loss"], one["delta_mean"]) for one in this.state.log_history if "loss" in one]

    seen, whole = trained(tmp_path / "one", None)
    assert seen[: 7 * accumulation] == [step // 2 for step in range(7) for _ in range(accumulation)]
    shutil.copytree(tmp_path / "one" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    _, resumed = trained(tmp_path / "two", True)
    assert resumed == whole


@pytest.mark.parametrize("kind", ["a stream", "a stream with workers", "no len at all"])
def test_an_evaluation_whose_length_nobody_knows(kind):
    """A data loader over a stream has a ``__len__`` that raises TypeError."""
    rows = IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": 2}]))
    loader = iter(()) if kind == "no len at all" else DataLoader(rows, num_workers=int("workers" in kind))
    if kind != "no len at all":
        assert hasattr(loader, "__len__")
    started = []

    class Task(SimpleNamespace):
        def advance(self):
            started[0]["done"] += 1

    def start(name, total, unit):
        started.append({"name": name, "total": total, "done": 0})
        return Task()

    callback = ProgressCallback(SimpleNamespace(start=start), "stage 1")
    for _ in range(2):
        callback.on_prediction_step(None, None, None, eval_dataloader=loader)
    assert started == [{"name": "evaluate stage 1", "total": None, "done": 2}]


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from seecal import CALTrainer
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

torch.set_num_threads(1)
folder, number = Path(sys.argv[1]), int(sys.argv[2])

class SignalOnce(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), number)

args = sgd_config(folder, 2, 1, max_steps=4, save_strategy="steps", save_steps=100)
CALTrainer(
    tiny_llava(), args, train_dataset=tiny_dataset(8), processing_class=tiny_llava_processor(), callbacks=[SignalOnce()]
).train()
print("the script went on")
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_a_plain_script_saves_and_ends_with_a_code_of_the_signal(tmp_path, number):
    (tmp_path / "script.py").write_text(SCRIPT)
    with interruptible():
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run"), str(int(number))],
            cwd=ROOT, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=limit(),
        )  # fmt: skip
    # Python ends itself by the signal after KeyboardInterrupt: a shell sees 130
    assert done.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number), done.stderr[-2000:]
    assert f"stopped by {signal.Signals(number).name} at step 2 of 4; checkpoint-2 is saved" in done.stderr
    assert "went on" not in done.stdout
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def test_signals_that_somebody_handles_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        stop = StopOnSignal()
        with stop.listening():
            signal.raise_signal(signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
            assert signal.getsignal(signal.SIGTERM) == stop._note
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
