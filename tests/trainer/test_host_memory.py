"""The resident set in the log: read from the system, and that of the rank with the largest."""

import mmap
import sys

import pytest
import torch

from seecal import CALTrainer
from seecal.trainer import metrics
from seecal.trainer.metrics import host_memory, memory_metrics
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

CPU = torch.device("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_what_a_process_holds_is_seen_and_its_peak_stays():
    before = host_memory()
    held = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # which no allocator keeps
    for page in range(0, 64 << 20, mmap.PAGESIZE):
        held[page] = 1
    during = host_memory()
    assert during["anonymous"] - before["anonymous"] > 60 << 20
    late = 1 << 20  # the kernel counts pages of each thread a little later
    assert during["resident"] >= during["anonymous"] - late
    assert during["peak"] >= during["resident"] - late
    held.close()
    after = host_memory()
    assert during["anonymous"] - after["anonymous"] > 60 << 20
    assert after["peak"] >= during["resident"] - late


def test_the_largest_rank_is_told_and_nothing_where_the_system_is_silent(monkeypatch):
    monkeypatch.setattr(metrics, "host_memory", lambda: {"resident": 2 << 30, "peak": 3 << 30})
    monkeypatch.setattr(metrics, "max_over_ranks", lambda values: values + torch.tensor([1.0, 0.5]))
    assert memory_metrics(CPU) == {"host_memory_gib": 3.0, "host_memory_peak_gib": 3.5}
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "host_memory", dict)
    assert memory_metrics(CPU) == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_each_log_of_the_training_has_it(tmp_path):
    trainer = CALTrainer(
        tiny_llava(),
        sgd_config(tmp_path, 2, 1, max_steps=2),
        train_dataset=tiny_dataset(4),
        processing_class=tiny_llava_processor(),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    now = host_memory()
    for entry in logs:
        assert 0 < entry["host_memory_gib"] <= entry["host_memory_peak_gib"] <= now["peak"] / 2**30 + 1e-3
