"""What a run on several ranks needs: sums over them, and whole tensors of sharded parameters."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Σ over all ranks, as a new tensor without gradients."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Elementwise maximum over all ranks, as a new tensor without gradients."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def whole_tensor(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter as it is, or gathered from its shards and cast to ``dtype`` when it is a DTensor.

    A head that is an FSDP2 group of its own is still sharded inside the root's forward. Every rank then has the gradient
    of its own samples only: it is their mean that belongs to the shards, as FSDP itself averages.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim).to(dtype)


def leave(code: int) -> NoReturn:
    """End this process as ``sys.exit`` does, and the process group before it.

    Threads of gloo may outlive their group for a moment, and abort an interpreter that ends meanwhile ("terminate called
    without an active exception"): the launcher would then call a rank failed that has done all its work.
    """
    if not (dist.is_available() and dist.is_initialized()):
        sys.exit(code)
    gloo = "gloo" in dist.get_backend()
    if code == 0:  # after an error others may be waiting in the middle of something
        dist.destroy_process_group()
    if not gloo:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
