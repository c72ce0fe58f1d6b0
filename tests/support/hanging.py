"""A training that hangs: in the collator, in a worker of the data loader, or on one of two ranks."""

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from seecal import CALTrainer, VisionCollator
from seecal.ops.distributed import leave
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


class Hanging:
    """Makes batches until it sees one record, and then none."""

    def __init__(self, record):
        self.collator, self.record = VisionCollator(tiny_llava_processor()), record

    def __call__(self, records):
        if any(record["id"] == self.record for record in records):
            self.hang_here()
        return self.collator(records)

    def hang_here(self):
        while True:
            time.sleep(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, workers, seconds, record = sys.argv[1:]
    args = sgd_config(folder, 2, 1, hang_timeout=float(seconds), dataloader_num_workers=int(workers), max_steps=8)
    collator = Hanging(record)
    CALTrainer(tiny_llava(), args, collator, tiny_dataset(32), processing_class=tiny_llava_processor()).train()
    print("it ended")
    leave(0)
