"""Four steps of CALTrainer under DDP, FSDP2 or ZeRO, with the batches that stop naive code; a rank of test_engines.py."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate.state import AcceleratorState, DistributedType
from transformers import AutoModelForImageTextToText

from seecal import CALTrainer, VisionCollator
from seecal.constants import IGNORE_INDEX
from seecal.data.sources.quarantine_file import read_quarantine
from seecal.ops.distributed import leave
from tests.support.deepspeed_worker import deepspeed_settings
from tests.support.ranks_worker import whole
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_image, tiny_llava_processor, tiny_records
from tests.trainer.test_quarantine import damage_image, png, take_answer

# Of the two ranks' batches of four, one after the other
TEXT_ONLY = range(4, 12)  # all of rank 1 in the first step, all of rank 0 in the second
SILENT = range(20, 28)  # all of rank 1 in the third step, all of rank 0 in the fourth: rows without a label
DAMAGED, UNANSWERED = 17, 29  # put aside while the other rank's records are good
SHARDED = ["LlamaDecoderLayer", "CLIPEncoderLayer"]  # the tower's too: a rank that leaves it out is waited for
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": SHARDED}},
    "zero2": {"deepspeed": deepspeed_settings(2)},
    "zero3": {"deepspeed": deepspeed_settings(3)},
}


class Silent(VisionCollator):
    """Rows of :data:`SILENT` have no label: what a collator of the user's own may give."""

    def __call__(self, records):
        batch = super().__call__(records)
        for row, record in enumerate(records):
            if int(record["id"][1:]) in SILENT:
                batch["labels"][row] = IGNORE_INDEX
        return batch


def records(bad):
    """32 records of uneven length; with ``bad``, one damaged image and one conversation without an answer."""
    made = tiny_records(32)
    for index in TEXT_ONLY:
        made[index]["images"] = []
    if bad:
        made[DAMAGED]["images"] = [{"path": None, "bytes": png(tiny_image("red"))}]
        damage_image(made[DAMAGED])
        take_answer(made[UNANSWERED])
    return made


def steps(folder, batch_size, bad, **changes):
    """The trainer after four steps from the model in folder/model, what it logged, and what it put aside."""
    out = Path(folder) / f"batch-{batch_size}-{bad}"
    bad_records = {"on_bad": "skip" if bad else "error"}
    sizes = {"per_device_eval_batch_size": batch_size}
    args = sgd_config(out, batch_size, 1, gradient_checkpointing=True, **bad_records, **sizes, **changes)
    processor = tiny_llava_processor()
    model = AutoModelForImageTextToText.from_pretrained(Path(folder) / "model")
    collator = None if bad else Silent(processor)
    trainer = CALTrainer(model, args, processing_class=processor, train_dataset=records(bad), data_collator=collator)
    trainer.train()
    log = [one for one in trainer.state.log_history if "loss" in one]
    file = out / "quarantine.jsonl"
    told = [(one["id"], one["step"], one["replaced_by"]) for one in read_quarantine(file)] if file.exists() else []
    return trainer, log, sorted(told)


def eval_loss(trainer):
    """Of eight records, the second half of which has no image: all of rank 1's."""
    return trainer.evaluate(records(False)[:8])["eval_loss"]


def fsdp_on_the_cpu():
    """accelerate takes its FSDP path on accelerators alone: here its state says FSDP on two ranks of the CPU too."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp_on_the_cpu()
    folder, engine = sys.argv[1:]
    for bad in (True, False):
        trainer, log, told = steps(folder, 4, bad, **ENGINES[engine])
        if engine == "fsdp2":
            weights = {name: whole(value) for name, value in trainer.model.state_dict().items()}
        else:
            weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        loss = eval_loss(trainer) if engine == "fsdp2" else None
        shards = [type(one).__name__ for one in trainer.model.parameters()]
        if torch.distributed.get_rank() == 0:
            found = {"log": log, "weights": weights, "told": told, "eval_loss": loss, "sharded": "DTensor" in shards}
            torch.save(found, os.path.join(folder, f"{bad}.pt"))
        torch.distributed.barrier()
    leave(0)
