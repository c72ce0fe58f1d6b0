"""One rank of tests/distributed/test_trainer_ranks.py: four steps of CALTrainer."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from seecal import CALConfig, CALTrainer
from tests.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

torch.set_num_threads(1)
batch_size, accumulation, normalize, result = sys.argv[1:]
args = CALConfig(
    result + ".folder",
    per_device_train_batch_size=int(batch_size),
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=int(accumulation),
    normalize=normalize,
    max_steps=4,
    optim="sgd",
    learning_rate=0.05,
    lr_scheduler_type="constant",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)
data = tiny_dataset(32)
trainer = CALTrainer(
    tiny_llava(), args, train_dataset=data, eval_dataset=tiny_dataset(7, 3), processing_class=tiny_llava_processor()
)
trainer.train()
log = [one for one in trainer.state.log_history if "loss" in one]
found = {"log": log, "weights": trainer.model.state_dict(), "eval": trainer.evaluate()}
if trainer.is_world_process_zero():
    torch.save(found, result)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
