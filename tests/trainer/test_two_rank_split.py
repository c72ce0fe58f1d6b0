"""(8 x 1) = (4 x 2) = (1 x 8) = 2 ranks x 4: the same losses and weights, however the 8 records of a step are split.

And so is `seecal train` launched on two ranks, adapters, merge and all. Run by torchrun, this file is a rank of the first.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seecal import CALTrainer
from seecal.ops.distributed import leave
from seecal.recipes import run as train
from tests.support.processes import two_ranks
from tests.support.run_example import run_example
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

# What each step is divided by, and the 8 records of a step as batch size x micro-batches, on each of two ranks
ON_TWO_RANKS = ("global-4x1", "global-2x2", "micro_batch-4x1", "tokens-2x2")


def trajectory(folder, split):
    """Losses and final weights of 4 SGD steps in float32 over 32 records in order."""
    normalize, sizes = split.split("-")
    batch_size, accumulation = map(int, sizes.split("x"))
    args = sgd_config(folder / "trainer", batch_size, accumulation, normalize=normalize)
    trainer = CALTrainer(tiny_llava(), args, train_dataset=tiny_dataset(32), processing_class=tiny_llava_processor())
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    return {"losses": losses, "weights": dict(trainer.model.state_dict())}


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    two_ranks("-m", "tests.trainer.test_two_rank_split", folder, minutes=3)
    alone = ("global-8x1", "global-4x2", "global-1x8", "micro_batch-8x1", "micro_batch-4x2", "tokens-8x1", "tokens-1x8")
    two = {f"2 x {split}": torch.load(folder / f"{split}.pt", weights_only=True) for split in ON_TWO_RANKS}
    return {**{split: trajectory(folder, split) for split in alone}, **two}


@pytest.mark.parametrize("split", ["global-4x2", "global-1x8", "2 x global-4x1", "2 x global-2x2"])
def test_global_does_not_see_the_split(split, found):
    whole = found["global-8x1"]
    assert distance(whole["weights"], dict(tiny_llava().state_dict())) >= 1e-3, "the weights move"
    assert found[split]["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert distance(found[split]["weights"], whole["weights"]) <= 1e-5


@pytest.mark.parametrize("split", ["tokens-1x8", "2 x tokens-2x2"])
def test_tokens_does_not_see_the_split_either(split, found):
    whole = found["tokens-8x1"]
    assert whole["losses"] != pytest.approx(found["global-8x1"]["losses"], abs=1e-3), "another divisor"
    assert found[split]["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert distance(found[split]["weights"], whole["weights"]) <= 1e-5


@pytest.mark.parametrize("split", ["micro_batch-4x2", "2 x micro_batch-4x1"])
def test_micro_batch_sees_it(split, found):
    whole = found["micro_batch-8x1"]
    assert distance(whole["weights"], found["global-8x1"]["weights"]) <= 1e-5, "in one piece they are the same"
    assert distance(found[split]["weights"], whole["weights"]) > 1e-4


def test_seecal_train_on_two_ranks_is_one(tmp_path):
    """A LoRA recipe: adapters and projector, merged and saved by rank 0."""
    run_example("tiny_folder.py", tmp_path / "tiny")
    settings = {
        "model": tmp_path / "tiny" / "model",
        "data": tmp_path / "tiny" / "data.json",
        "eval_data": tmp_path / "tiny" / "eval.json",
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "train_sampling_strategy": "sequential",
        "lora.r": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    two = [*arguments, f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=4"]
    done = two_ranks("-m", "seecal", "train", *two, cwd=tmp_path, minutes=3)
    for line in ("stage 1 of 1, projector, lora:", "stage 1 of 1: 4 steps", "stage 1 of 1: step 4 of 4 in"):
        assert done.stdout.count(line) == 1, "only one rank speaks"
    one = [*arguments, f"--output_dir={tmp_path / 'one'}", "--per_device_train_batch_size=8"]
    assert train.run(one) == 0
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")]
    assert distance(*weights) <= 1e-5
    assert distance(weights[0], load_file(tmp_path / "tiny" / "model" / "model.safetensors")) >= 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    for split in ON_TWO_RANKS:
        result = trajectory(Path(sys.argv[1]), split)
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(sys.argv[1]) / f"{split}.pt")
    leave(0)
