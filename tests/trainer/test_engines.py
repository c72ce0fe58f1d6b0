"""CALTrainer under DDP, FSDP2 and DeepSpeed's ZeRO, on two gloo ranks of the CPU, takes the steps of one process.

Lengths are uneven; one rank is text-only, one has no label, one meets a bad record: each while the other goes on.
"""

import pytest
import torch

from tests.support.engine_ranks_worker import DAMAGED, ENGINES, UNANSWERED, steps
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.tiny import tiny_llava
from tests.trainer.test_deepspeed import needs_deepspeed

SAME = ("loss", "cross_entropy", "grad_norm", "delta_mean", "share_inside", "label_tokens", "num_tokens")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(the folder with the model, {bad records?: (weights, log, what was put aside)}) of one process."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_llava().save_pretrained(folder / "model")
    found = {}
    for bad in (True, False):
        trainer, log, told = steps(folder, 8, bad)
        found[bad] = trainer.model.state_dict(), log, told
    return folder, found


@pytest.mark.parametrize(
    "engine", [one if "zero" not in one else pytest.param(one, marks=needs_deepspeed) for one in ENGINES]
)
def test_two_ranks_are_one(tmp_path, alone, engine):
    folder, found = alone
    (tmp_path / "model").symlink_to(folder / "model")
    worker = ROOT / "tests" / "support" / "engine_ranks_worker.py"
    two_ranks(worker, tmp_path, engine, cwd=tmp_path, minutes=6 if "zero" in engine else 1)
    for bad, (weights, log, told) in found.items():
        two = torch.load(tmp_path / f"{bad}.pt", weights_only=True)
        assert two["sharded"] == (engine == "fsdp2")
        assert two["told"] == told
        for name in SAME:
            expected = [one[name] for one in log]
            assert [one[name] for one in two["log"]] == pytest.approx(expected, rel=1e-5, abs=1e-5), (bad, name)
        for name, value in weights.items():
            assert (two["weights"][name] - value).abs().max() <= 1e-5, (bad, name)


def test_what_one_process_met(alone):
    weights, log, told = alone[1][True]
    assert {one[0] for one in told} == {f"r{DAMAGED}", f"r{UNANSWERED}"}
    assert any(one["share_inside"] > 0 for one in log), "CAL weights differ from 1"
    silent = alone[1][False][1]
    assert silent[2]["label_tokens"] < log[2]["label_tokens"], "half of the third step has no label"
    assert any((weights[name] != value).any() for name, value in alone[1][False][0].items())
