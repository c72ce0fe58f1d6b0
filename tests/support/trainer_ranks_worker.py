"""Four steps of CALTrainer for each "batch size x accumulation" given; a rank of test_trainer_ranks.py."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from seecal import CALTrainer
from seecal.ops.distributed import leave
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


def steps(folder, batch_size, accumulation):
    """What the run logged, the weights it ended with, and its evaluation."""
    args = sgd_config(folder, batch_size, accumulation, per_device_eval_batch_size=2)
    data = {"train_dataset": tiny_dataset(32), "eval_dataset": tiny_dataset(7, 3)}
    trainer = CALTrainer(tiny_llava(), args, processing_class=tiny_llava_processor(), **data)
    trainer.train()
    log = [one for one in trainer.state.log_history if "loss" in one]
    return {"log": log, "weights": trainer.model.state_dict(), "eval": trainer.evaluate()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *splits = sys.argv[1:]
    for split in splits:
        found = steps(folder, *map(int, split.split("x")))
        if torch.distributed.get_rank() == 0:
            torch.save(found, os.path.join(folder, f"{split}.pt"))
    leave(0)
