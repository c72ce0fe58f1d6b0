"""CALTrainer under DeepSpeed's ZeRO takes the steps of one process, on two gloo ranks of the CPU.

DeepSpeed is in no environment of the project: its package is built from source. docs/recipes.md has the versions that
this was run with, and how.
"""

import importlib.util

import pytest
import torch

from tests.support.deepspeed_worker import TEXT_ONLY, records, steps
from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.tiny import tiny_llava

REASON = "DeepSpeed is not installed (it builds from source: docs/recipes.md, On several GPUs)"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason=REASON)
CASES = ((2, "sgd", 0.05, True), (3, "sgd", 0.05, False), (3, "adamw_torch", 1e-3, True))


def test_each_rank_has_a_step_with_text_only():
    found = [index for index, record in enumerate(records()) if not record["images"]]
    assert set(TEXT_ONLY) <= set(found)
    assert len(found) < 20


@needs_deepspeed
@pytest.mark.parametrize(("stage", "optim", "rate", "checkpointing"), CASES)
def test_two_ranks_are_one(tmp_path, stage, optim, rate, checkpointing):
    tiny_llava().save_pretrained(tmp_path / "model")
    worker = ROOT / "tests" / "support" / "deepspeed_worker.py"
    # DeepSpeed compiles its sums for the CPU when they are first used
    two_ranks(worker, tmp_path, stage, optim, rate, checkpointing, cwd=tmp_path, minutes=6)
    two = torch.load(tmp_path / "ranks.pt", weights_only=True)
    assert two["shared_out"] == (stage == 3)

    settings = {"optim": optim, "learning_rate": rate, "gradient_checkpointing": checkpointing}
    trainer, log = steps(tmp_path, 8, **settings)
    for name in ("loss", "cross_entropy", "grad_norm", "delta_mean", "share_inside", "label_tokens", "num_tokens"):
        assert [one[name] for one in two["log"]] == pytest.approx([one[name] for one in log], rel=1e-5, abs=1e-5), name
    assert any(one["share_inside"] > 0 for one in log), "CAL weights differ from 1"
    for name, alone in trainer.model.state_dict().items():
        if optim != "sgd" and name.endswith("k_proj.bias"):
            continue  # attention does not depend on it: its gradient is rounding, which AdamW makes a whole step of
        assert (alone - two["weights"][name]).abs().max() <= 1e-5, name
