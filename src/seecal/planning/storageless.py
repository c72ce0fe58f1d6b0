"""A model without storage (torch's meta device), run for the sizes of what it computes, not for its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._python_dispatch import TorchDispatchMode
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


@dataclass
class Counted:
    """What was computed in a block of :func:`counting`.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention.
        saved: bytes of the tensors kept for the backward, each storage once, weights aside.
    """

    flops: int = 0
    saved: int = 0


@contextlib.contextmanager
def counting(model: Any) -> Iterator[Counted]:
    """Inside the block, forward and backward passes of the model are counted; ``flops`` and ``saved`` are set at its end."""
    counted, kept = Counted(), dict[int, Tensor]()
    weights = {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # The counter outside: what it sees has only tensors of one device
    with _Mixed(), FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        yield counted
    counted.flops = counter.get_total_flops()
    counted.saved = sum(one.untyped_storage().nbytes() for storage, one in kept.items() if storage not in weights)
