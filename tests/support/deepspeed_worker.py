"""Four steps of CALTrainer under a ZeRO stage of DeepSpeed; a rank of test_deepspeed.py."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from transformers import AutoModelForImageTextToText

from seecal import CALTrainer
from seecal.ops.distributed import leave
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava_processor


def settings(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "fp32_allreduce": True,
    }


def steps(folder, batch_size, **changes):
    changes.setdefault("gradient_checkpointing", False)
    args = sgd_config(folder, batch_size, 1, **changes)
    model = AutoModelForImageTextToText.from_pretrained(os.path.join(folder, "model"))
    trainer = CALTrainer(model, args, processing_class=tiny_llava_processor(), train_dataset=tiny_dataset(32))
    trainer.train()
    log = [one for one in trainer.state.log_history if "loss" in one]
    return trainer, log


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, stage = sys.argv[1:]
    trainer, log = steps(folder, 4, deepspeed=settings(int(stage)))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if torch.distributed.get_rank() == 0:
        torch.save({"log": log, "weights": state}, os.path.join(folder, f"zero{stage}.pt"))
    leave(0)
