"""One real training step on the CPU with everything in it counted, for what a plan says to be held against.

    python -m tests.support.counted_step FOLDER '[["llava", ["projector"], true]]'

Each job is a kind of model, what trains, and whether layers are checkpointed. Prints JSON. Bytes are those of real tensors,
each storage once; nothing here knows a formula.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageTextToText, AutoProcessor

import seecal
from seecal.recipes.trainable import prepare
from seecal.trainer.frozen_tower import forward_only
from tests.support.builders import Row
from tests.support.zoo import batch_of, scaled
from tests.support.zoo_models import ZOO

ROWS = [Row([6, "image", 3, -40]), Row([2, "image", 44, -8]), Row([12, -6]), Row([5, "image", 30, -25])]

# torch's counter knows the kernels of GPUs; those of the CPU get the same formulas
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside the block make, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in before:
                self._note(one.untyped_storage())
        return made

    def _note(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size):
        self.now -= size


def storages(tensors):
    """Bytes of distinct storages."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def model_and_batch(kind, folder):
    """What one step trains on: the tiny LLaVA on all records of its data, or a kind of the zoo on long rows."""
    if kind == "llava":
        model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
        records = list(seecal.load_records(folder / "data.json"))
        return model, seecal.VisionCollator(AutoProcessor.from_pretrained(folder / "model"))(records)
    return scaled(ZOO[kind].model(), ZOO[kind]), batch_of(kind, ROWS)


def counted(kind, folder, train, checkpointed):
    """A step of CAL with AdamW: bytes of weights, gradients and optimizer, of what the forward keeps and of all that is
    alive at most beside these three; operations; tokens."""
    model, batch = model_and_batch(kind, folder)
    batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    prepare(model, train)
    seecal.enable_cal(model)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with forward_only(model):
        return counted_steps(model, batch)


def counted_steps(model, batch):
    """:func:`counted` on a model as CALTrainer has it in a step."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model(**batch).loss.backward()  # a first step, which also makes what is kept for all others
    gradients = storages([one.grad for one in trained])
    optimizer.step()
    states = [one for state in optimizer.state.values() for one in state.values()]
    found = {"weights": storages(list(model.parameters())), "gradients": gradients, "optimizer": storages(states)}
    optimizer.zero_grad()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as forward:
        output = model(**batch)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as backward:
        output.loss.backward()
    found |= {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    found |= {"main_tokens": output.cal.main_tokens, "contrast_tokens": output.cal.contrast_tokens}
    found["label_tokens"] = len(output.cal.weights)
    optimizer.zero_grad()
    del output
    for one in trained:  # gradients are counted above: here they go as soon as they are there
        one.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    gc.collect()
    with LiveBytes() as live:
        output = model(**batch)
        gc.collect()  # outputs that hold each other in circles
        found["kept"] = live.now
        output.loss.backward()
    inputs = storages([one for one in batch.values() if one.is_floating_point()])
    return found | {"kept": found["kept"] + inputs, "peak": live.most + inputs}


if __name__ == "__main__":
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps([counted(kind, folder, train, checkpointed) for kind, train, checkpointed in jobs]))
