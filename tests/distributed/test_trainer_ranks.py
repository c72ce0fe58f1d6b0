"""CALTrainer on two gloo ranks takes the same steps as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(folder, ranks, batch_size, accumulation, normalize="global"):
    result = folder / f"{ranks}-{batch_size}-{accumulation}-{normalize}.pt"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = str(ROOT / "tests" / "distributed" / "trainer_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, script, str(batch_size), str(accumulation), normalize, str(result)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(result, weights_only=True)


def test_two_ranks_are_one(tmp_path):
    alone = run(tmp_path, 1, 8, 1)
    for batch_size, accumulation in ((4, 1), (1, 4)):
        two = run(tmp_path, 2, batch_size, accumulation)
        for name in ("loss", "cross_entropy", "grad_norm", "delta_mean", "share_inside", "label_tokens", "num_tokens"):
            expected = [one[name] for one in alone["log"]]
            assert [one[name] for one in two["log"]] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
        worst = max((one - two["weights"][name]).abs().max() for name, one in alone["weights"].items())
        assert worst <= 1e-5
        for name in (
            "eval_loss",
            "eval_label_tokens",
            "eval_mean_token_accuracy",
        ):  # 7 records: one is repeated to fill
            assert two["eval"][name] == pytest.approx(alone["eval"][name], rel=1e-5), name
