"""Hangs: every rank writes its stacks and ends with a code of its own; what is only slow goes on."""

import faulthandler
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from trl import SFTTrainer

from seecal import CALConfig, CALTrainer
from seecal.trainer import hangs, manifests
from seecal.trainer.checkpoints import finish
from seecal.trainer.hangs import HANG_EXIT_CODE, Watchdog
from tests.support.paths import ROOT
from tests.support.processes import environment, limit
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

WORKER = str(ROOT / "tests" / "support" / "hanging.py")


def seconds(number):
    """That many on a machine as fast as ours, more on a slower or busier one."""
    return number * limit() / 60


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=limit(2),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_collator_that_hangs_in_this_process_or_in_a_worker(tmp_path, workers):
    out = tmp_path / "run"
    done = run(WORKER, out, workers, seconds(2), "r5")
    assert done.returncode == HANG_EXIT_CODE == 75, done.stderr[-3000:]
    assert "it ended" not in done.stdout
    written = (out / "hang-rank-0.txt").read_text()
    assert "rank 0 " in written
    assert "no progress for " in written
    assert "the last was: a micro-batch of step 1 has gone through" in written  # accelerate fetches one ahead
    assert "hang_here" in written, "the stack of who hangs, in a worker too"
    assert "hang_here" in done.stderr
    if workers:
        assert "pt_data_worker" in written or "Process-" in written


def test_one_of_two_ranks_hangs_and_both_write_their_stacks(tmp_path):
    """r6 is rank 1's in the second step; rank 0 waits for its gradients."""
    out = tmp_path / "run"
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, out, 0, seconds(3), "r6")
    assert done.returncode != 0
    assert f"exitcode  : {HANG_EXIT_CODE}" in done.stderr
    first, second = ((out / f"hang-rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "hang_here" in second
    assert "hang_here" not in first
    assert "most recent call first" in first
    assert done.stderr.count(f"ends with exit code {HANG_EXIT_CODE}") == 2


def trainer_of(folder, ended, timeout, **changes):
    args = sgd_config(folder, 2, 1, hang_timeout=timeout, per_device_eval_batch_size=2, **changes)
    data = {"train_dataset": tiny_dataset(16), "eval_dataset": tiny_dataset(8, 3)}
    trainer = CALTrainer(tiny_llava(), args, processing_class=tiny_llava_processor(), **data)
    trainer.__dict__["_watchdog"] = Watchdog(timeout, folder, 0, leave=ended.append)
    return trainer


def slow(method, by):
    def slowed(*args, **kwargs):
        time.sleep(by)
        return method(*args, **kwargs)

    return slowed


@pytest.mark.parametrize("what", ["compute_loss", "prediction_step", "_save_optimizer_and_scheduler"])
def test_what_is_slow_all_the_time_is_progress(tmp_path, what):
    """Steps, batches of evaluations and saves of 0.4 times the time each, 1.6 times in all and more."""
    timeout, ended = seconds(0.5), []
    changes = {"save_strategy": "steps", "save_steps": 1} if what.startswith("_save") else {}
    trainer = trainer_of(tmp_path, ended, timeout, **changes)
    setattr(trainer, what, slow(getattr(trainer, what), 0.4 * timeout))
    if what == "prediction_step":
        trainer.evaluate()
    else:
        trainer.train()
        assert trainer.state.global_step == 4
    assert ended == []
    assert not [*tmp_path.glob("hang-*")]
    assert not [one for one in threading.enumerate() if one.name.startswith("seecal")], "the watch ends with it"


@pytest.mark.parametrize(("what", "part"), [("a save", "_sync"), ("a save", "_digest"), ("the best one", "_digest")])
def test_reading_what_was_written_is_progress(tmp_path, monkeypatch, part, what):
    """Each file to the disk, each block of a large one: none takes the time, all of them together do."""
    timeout, ended = seconds(0.5), []
    trainer = trainer_of(tmp_path, ended, timeout)
    folder = tmp_path / ".saving-1" / "checkpoint-1"
    trainer._save(str(folder))
    if part == "_digest":
        monkeypatch.setattr(manifests, "_BLOCK", 1 << 15)
        slowed = slow(hashlib.sha256().update, 0.1 * timeout)
        monkeypatch.setattr(manifests, "hashlib", SimpleNamespace(sha256=lambda *given: Sums(slowed, *given)))
    else:
        monkeypatch.setattr(manifests, "_sync", slow(manifests._sync, 0.4 * timeout))
    with trainer.watchdog.watching("a save"):
        started = time.monotonic()
        finish(tmp_path, 1, {}, trainer._beat_of_files)
        if what == "the best one":
            trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
            trainer._check_best()
    assert time.monotonic() - started > 1.5 * timeout
    assert ended == []


class Sums:
    """A checksum that is slow to take bytes."""

    def __init__(self, slowed, *given):
        self._slowed, self._plain = slowed, hashlib.sha256(*given)

    def update(self, block):
        self._slowed(b"")
        self._plain.update(block)

    def hexdigest(self):
        return self._plain.hexdigest()


def test_a_rank_that_writes_nothing_waits_for_the_one_that_does(tmp_path, monkeypatch):
    """However long that takes: it is watched where it writes."""
    timeout, ended, seen = seconds(0.5), [], []
    trainer = trainer_of(tmp_path, ended, timeout)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", lambda *_: seen.append(trainer.watchdog.held))
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: seen.append(trainer.watchdog.held))
    monkeypatch.setattr(trainer, "_about", dict)
    trainer._save_checkpoint(trainer.model, None)
    assert seen == [False, True, True, True], "before it; while the others write; while they read it again"
    assert not trainer.watchdog.held


def watched(folder, timeout, before_end=lambda: None, **more):
    """(codes with which it ended, the file) of a block without progress."""
    ended, gone = [], threading.Event()

    def leave(code):
        ended.append(code)
        gone.set()

    dog = Watchdog(timeout, folder, 3, leave, **more)
    with dog.watching("a block"):
        before_end()
        gone.wait(seconds(1))
        time.sleep(0)
    return ended


def test_a_block_without_progress_ends_and_zero_is_never(tmp_path):
    assert watched(tmp_path, 0.2)[:1] == [HANG_EXIT_CODE]
    assert "the last was: a block" in (tmp_path / "hang-rank-3.txt").read_text()
    ended = []
    with Watchdog(0, tmp_path, 0, ended.append).watching("a block"):
        assert not [one for one in threading.enumerate() if one.name.startswith("seecal")]
    assert ended == []


def test_a_rank_whose_neighbour_hangs_writes_at_once(tmp_path):
    """Not so a file that an earlier run has left."""
    (tmp_path / "hang-rank-0.txt").write_text("of an earlier run")
    assert watched(tmp_path, 1000) == []
    says = lambda: (tmp_path / "hang-rank-1.txt").write_text("it hangs")  # noqa: E731
    assert watched(tmp_path, seconds(3), says) == [HANG_EXIT_CODE]
    assert "hang-rank-1.txt says that another rank makes no progress" in (tmp_path / "hang-rank-3.txt").read_text()


def test_the_time_in_which_a_machine_sleeps_is_not_counted(tmp_path, monkeypatch):
    """A clock that jumps by an hour between two looks, as after SIGSTOP or a closed lid, and then by the true time."""
    ended, now, jumps = [], time.monotonic, iter([0, 3600.0])
    shift = [0.0]

    def clock():
        shift[0] += next(jumps, 0)
        return now() + shift[0]

    monkeypatch.setattr(hangs, "time", type("Time", (), {"monotonic": staticmethod(clock), "sleep": time.sleep}))
    dog = Watchdog(seconds(2), tmp_path, 0, ended.append)
    with dog.watching("a block"):
        time.sleep(seconds(0.5))
    assert next(jumps, None) is None, "it has looked twice"
    assert ended == []


def test_what_is_held_may_take_as_long_as_it_likes(tmp_path):
    ended = []
    dog = Watchdog(0.2, tmp_path, 0, ended.append)
    with dog.watching("a block"):
        dog.held = True
        time.sleep(0.6)
        assert ended == []
        dog.beat("the first batch")
        time.sleep(1.0)
    assert ended[:1] == [HANG_EXIT_CODE]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no SIGUSR2")
def test_a_signal_of_somebody_elses_is_left_alone(tmp_path):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with Watchdog(1000, tmp_path, 0).watching("a block"):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.01)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
    with Watchdog(1000, tmp_path, 0).watching("a block"):
        pass
    assert not faulthandler.unregister(signal.SIGUSR2), "it is taken off again"


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_time_that_is_none(tmp_path, value):
    with pytest.raises(ValueError, match=r"hang_timeout=.*expected seconds"):
        CALConfig(str(tmp_path), hang_timeout=value)
