"""Four steps of CALTrainer under a ZeRO stage of DeepSpeed; a rank of test_deepspeed.py."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText

from seecal import CALTrainer
from seecal.ops.distributed import leave
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava_processor, tiny_records

TEXT_ONLY = range(4, 12)  # all of rank 1 in the first step, all of rank 0 in the second


def records():
    """32 records, two ranks' batches of four one after the other."""
    made = tiny_records(32)
    for index in TEXT_ONLY:
        made[index]["images"] = []
    return Dataset.from_list(made, features=tiny_dataset(1).features)


def deepspeed_settings(stage):
    zero = {"stage": stage}
    if stage == 3:  # without the threshold a model of this size would be whole everywhere
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def steps(folder, batch_size, **changes):
    """The trainer after four steps from the model in folder/model, and what it logged."""
    args = sgd_config(folder, batch_size, 1, **changes)
    model = AutoModelForImageTextToText.from_pretrained(os.path.join(folder, "model"))
    trainer = CALTrainer(model, args, processing_class=tiny_llava_processor(), train_dataset=records())
    trainer.train()
    return trainer, [one for one in trainer.state.log_history if "loss" in one]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, stage, optim, learning_rate, checkpointing = sys.argv[1:]
    changes = {"optim": optim, "learning_rate": float(learning_rate), "gradient_checkpointing": checkpointing == "True"}
    trainer, log = steps(folder, 4, deepspeed=deepspeed_settings(int(stage)), **changes)
    shared_out = trainer.model.lm_head.weight.numel() == 0
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if torch.distributed.get_rank() == 0:
        torch.save({"log": log, "weights": weights, "shared_out": shared_out}, os.path.join(folder, "ranks.pt"))
    leave(0)
