"""A model without storage (torch's meta device), run for the sizes of what it computes, not for its numbers."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION = "seecal_storageless"


def storageless_model(config: Any, dtype: torch.dtype) -> Any:
    """A vision-language model of this config on the meta device, in training mode.

    Args:
        config: a transformers config; it is not changed.
        dtype: of its weights, and so of all that it computes.

    Raises:
        ValueError: transformers has no vision-language model for it.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    except ValueError as error:
        raise ValueError(f"{config.model_type}: {str(error).splitlines()[0]}") from None
    model.tie_weights()
    return model.train()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' interface of attention by a kernel that keeps no scores: [B, H, T, K] → [B, T, H, K].

    Left to itself torch would take the plain one on the meta device, with [T, T] scores that no GPU keeps. All pairs of
    tokens are counted, masked or not, as in the usual definition of MFU (PaLM, arXiv 2204.02311, appendix B).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # as transformers does before attention with a mask
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return attended.transpose(1, 2).contiguous(), None


class _Mixed(TorchDispatchMode):
    """Tensors of the CPU go along with those of the meta device: grids and masks keep their values, as long as no weight
    comes into them, because vision towers read them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(one.is_meta for one in tensors) and not all(one.is_meta for one in tensors):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _to_meta(one: Any) -> Any:
    return one.to("meta") if isinstance(one, Tensor) and not one.is_meta else one


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations make, while somebody holds them."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted
        self._alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **kwargs)
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.is_meta and one.untyped_storage()._cdata not in given:
                self._hold(one.untyped_storage())
        return made

    def _hold(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, by: int) -> None:
        self._alive += by
        self._counted.peak = max(self._counted.peak, self._alive)
        self._counted.kept = self._alive


@dataclass
class Counted:
    """What was computed in a block of :func:`counting_flops` or :func:`counting_bytes`.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention.
        kept: bytes of what was made in the block and is still held, for a backward or by the caller.
        peak: the most of that at any time.
    """

    flops: int = 0
    kept: int = 0
    peak: int = 0


@contextlib.contextmanager
def storageless() -> Iterator[None]:
    """Inside the block models without storage run on vision inputs of the CPU."""
    with _Mixed():
        yield


@contextlib.contextmanager
def counting_flops() -> Iterator[Counted]:
    """Inside the block, operations are counted. Read it at the block's end."""
    counted = Counted()
    with _Mixed(), FlopCounterMode(display=False) as counter:
        yield counted
        counted.flops = counter.get_total_flops()


@contextlib.contextmanager
def counting_bytes() -> Iterator[Counted]:
    """Inside the block, bytes are counted. Not together with operations: torch's counter holds on to tensors."""
    counted = Counted()
    gc.freeze()  # so that collecting looks at what the block makes, and is quick
    try:
        with _Mixed(), _Live(counted):
            yield counted
            gc.collect()  # transformers' outputs hold hidden states in circles
    finally:
        gc.unfreeze()
