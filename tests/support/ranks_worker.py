"""One rank of tests/core/test_two_ranks.py; run by torchrun with (file of the results, the cases as JSON).

Each rank first computes the truth alone, on the global batch; then both take the same step on their halves.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import seecal
from seecal import CALOptions
from seecal.ops.distributed import leave, max_over_ranks, sum_over_ranks, whole_tensor
from tests.support.builders import MIXED, Row, batch_of, build

HALVES = {
    "mixed": (MIXED[:2], MIXED[3:]),
    "one rank is text-only": (MIXED[:2], [Row([12, -6]), Row([5, -9])]),
    "one rank has no label": ([Row([3, "image", 4]), Row([2])], MIXED[:2]),
    "both ranks are text-only": ([Row([12, -6])], [Row([5, -9])]),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrap(model, kind, mesh):
    if kind == "ddp":
        # LLaVA reads the layer before the tower's last, so that one never has a gradient, whatever the loss
        return DistributedDataParallel(model, find_unused_parameters=True)
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        fully_shard(layer, mesh=mesh)
    if kind == "fsdp2 with its head apart":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model, batch, factor=1):
    output = model(**batch)
    (output.loss * factor).backward()
    names = [(name.removeprefix("module."), parameter) for name, parameter in model.named_parameters()]
    return output, {name: whole(parameter.grad) for name, parameter in names if parameter.grad is not None}


@dataclass
class Case:
    """What both ranks do together, and what one process gives alone on the same samples."""

    wrapper: str
    halves: str
    family: str
    contrast: str
    normalize: str
    weighting: str = "cal"
    counted: bool = False  # as a Trainer of transformers has it: num_items_in_batch, and the loss times the ranks

    def prepare(self):
        self.model, self.tokens, self.pixels = build(self.family)
        self.options = CALOptions(self.weighting, contrast=self.contrast, normalize=self.normalize)
        self.rows = HALVES[self.halves]
        for index, row in enumerate([*self.rows[0], *self.rows[1]]):
            row.key = index
        alone = seecal.enable_cal(copy.deepcopy(self.model).train(), self.options)
        output, self.gradients = step(alone, self.batch([*self.rows[0], *self.rows[1]]))
        self.loss = float(output.loss.detach())

    def batch(self, rows):
        for index, row in enumerate([*self.rows[0], *self.rows[1]]):
            row.key = index  # rows are shared between cases
        count = {"num_items_in_batch": 100} if self.counted else {}
        return {**batch_of(rows, self.tokens, self.pixels), **count}

    def together(self, rank, mesh, heads):
        heads.clear()
        model = wrap(seecal.enable_cal(self.model.train(), self.options), self.wrapper, mesh)
        batch = self.batch(self.rows[rank])
        factor = 2 if self.counted else 1
        output, got = step(model, batch, factor)
        loss = output.loss.detach() * factor
        dist.all_reduce(loss)
        mine = seecal.visual_delta(model, batch, contrast=self.contrast)  # works on a wrapped model too
        if self.weighting != "dft":  # which trains without a contrast
            torch.testing.assert_close(mine.delta, output.cal.visual_delta.delta)
        assert set(self.gradients) <= set(got)
        # what the one process did not touch has a zero gradient here, because every rank runs every module
        expected = {name: self.gradients.get(name, torch.zeros_like(value)) for name, value in got.items()}
        return {
            "loss": float(loss) / 2,
            "expected_loss": self.loss,
            "gradient": max(float((got[name] - value).abs().max()) for name, value in expected.items()),
            "scale": max(float(value.abs().max()) for value in self.gradients.values()),
            "heads": sorted(heads),
        }


def main():
    results, cases = Path(sys.argv[1]), [Case(*case) for case in json.loads(sys.argv[2])]
    torch.set_num_threads(1)
    for case in cases:  # before the ranks know of each other
        case.prepare()
    heads = set()
    gather = seecal.core.delta.whole_tensor
    seecal.core.delta.whole_tensor = lambda one, dtype: (heads.add(type(one).__name__), gather(one, dtype))[1]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    assert max_over_ranks(torch.tensor([rank, -rank])).tolist() == [1, 0]
    assert sum_over_ranks(torch.tensor([rank, -rank])).tolist() == [1, -1]
    head = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    assert whole_tensor(head, torch.bfloat16).dtype == torch.bfloat16, "a head of its own group, under mixed precision"
    found = [case.together(rank, mesh, heads) for case in cases]
    if rank == 0:
        results.write_text(json.dumps(found))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
