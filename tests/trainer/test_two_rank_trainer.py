"""CALTrainer on two gloo ranks takes the same steps as on one."""

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.processes import two_ranks
from tests.support.trainer_ranks_worker import steps

SPLITS = ("4x1", "1x4")  # batch size x accumulation, on each of two ranks


def test_two_ranks_are_one(tmp_path):
    two_ranks(ROOT / "tests" / "support" / "trainer_ranks_worker.py", tmp_path, *SPLITS, cwd=tmp_path)

    alone = steps(tmp_path, 8, 1)
    for split in SPLITS:
        two = torch.load(tmp_path / f"{split}.pt", weights_only=True)
        for name in ("loss", "cross_entropy", "grad_norm", "delta_mean", "share_inside", "label_tokens", "num_tokens"):
            expected = [one[name] for one in alone["log"]]
            assert [one[name] for one in two["log"]] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
        assert max((one - two["weights"][name]).abs().max() for name, one in alone["weights"].items()) <= 1e-5
        for name in (
            "eval_loss",
            "eval_label_tokens",
            "eval_mean_token_accuracy",
        ):  # 7 records: one is repeated to fill
            assert two["eval"][name] == pytest.approx(alone["eval"][name], rel=1e-5), name
