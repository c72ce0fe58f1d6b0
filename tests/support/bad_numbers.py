"""Numbers that are not finite, planted; and, run under torch.distributed, a training in which one of two ranks has them."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import math
from pathlib import Path

import torch
from torch import nn

from seecal import CALTrainer, VisionCollator
from seecal.core import forward
from seecal.ops.distributed import leave
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


class planted:
    """A collator that puts ``value`` into a pixel of one record's image."""

    def __init__(self, record, value):
        self.collator = VisionCollator(tiny_llava_processor(), with_ids=True)
        self.record, self.value = record, value

    def __call__(self, records):
        batch = self.collator(records)
        with_image = [record["id"] for record in records if record["images"]]
        if self.record in with_image:
            batch["pixel_values"][with_image.index(self.record), 0, 2, 3] = self.value
        return batch


def tell_inf(replace, at_call):
    """Has the ``at_call``-th measurement give an infinite Δ at its first label token."""
    measure, calls = forward.visual_delta_of, []

    def measured(*given, **named):
        found = measure(*given, **named)
        calls.append(None)
        if len(calls) == at_call:
            found.delta[0] = math.inf
        return found

    replace(forward, "visual_delta_of", measured)


class _Inf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


class BackInf(nn.Module):
    """Hands on what it gets; its gradient is not finite, the first ``times`` times."""

    def __init__(self, times=1 << 30):
        super().__init__()
        self.left = times

    def forward(self, values):
        if not (torch.is_grad_enabled() and self.left):
            return values
        self.left -= 1
        return _Inf.apply(values)


def stopped(folder, case):
    """The error of a training on two ranks in which record r7, of rank 1 in step 2, is not finite."""
    rank = int(os.environ["RANK"])
    collator = planted("r7", math.inf if case != "delta" else 0.0)
    normalize = "global" if case == "delta" else case
    if case == "delta" and rank == 1:
        tell_inf(setattr, at_call=2)
    args = sgd_config(folder / case, 2, 1, normalize=normalize)
    trainer = CALTrainer(tiny_llava(), args, collator, tiny_dataset(16), processing_class=tiny_llava_processor())
    try:
        trainer.train()
    except FloatingPointError as error:
        return str(error)
    return "it went on"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in ("global", "micro_batch", "delta"):
        said = stopped(folder, case)
        (folder / f"{case}-{os.environ['RANK']}.txt").write_text(said)
    leave(0)
