"""The pass without the image in 8-bit floats: its products are only compared, never trained on.

M rows, K input and N output features of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max  # 448
_MULTIPLE = 16  # of K and N, for the matrix units


@contextmanager
def fp8_linears(decoder: nn.Module) -> Iterator[None]:
    """Inside the block the decoder's plain linear layers multiply in float8 (e4m3). For passes without gradients.

    Weights are scaled by output feature and inputs by row, both to the type's largest value, in each call: 3 to 4
    significant bits a factor. Layers whose width is no multiple of 16, quantised ones, and PEFT's adapters stay as they
    are; the layer that an adapter sits on does not.

    Raises:
        ValueError: a GPU older than compute capability 8.9, or an AMD one, whose float8 is another type.
    """
    where = next(decoder.parameters()).device
    if where.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(where) < (8, 9)):
        raise ValueError(
            f"fp8_contrast=True on {torch.cuda.get_device_name(where)}: float8 products need an NVIDIA GPU of compute "
            "capability 8.9 (Ada, Hopper) or newer. Set fp8_contrast=False."
        )
    adapters = _adapters(decoder)
    plain = (module for module in decoder.modules() if type(module) is nn.Linear and module not in adapters)
    changed = [module for module in plain if _fits(module)]
    kept = [module.__dict__.get("forward") for module in changed]
    for module in changed:
        object.__setattr__(module, "forward", _Fp8Linear(module))
    try:
        yield
    finally:
        for module, own in zip(changed, kept, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:
                object.__setattr__(module, "forward", own)


def _adapters(decoder: nn.Module) -> set[nn.Module]:
    """What PEFT has put beside the layers that it adapts, which it keeps as their ``base_layer``."""
    parts = (
        part
        for module in decoder.modules()
        if hasattr(module, "base_layer")
        for name, part in module.named_children()
        if name != "base_layer"
    )
    return {inner for part in parts for inner in part.modules()}


def _fits(module: nn.Linear) -> bool:
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0


class _Fp8Linear:
    """The forward of one linear layer. Looks the weight up when it is called: sharded ones are only whole then."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def __call__(self, inputs: Tensor) -> Tensor:
        rows_MK = inputs.reshape(-1, inputs.shape[-1])
        out_MN = fp8_product(rows_MK, self._module.weight)
        if self._module.bias is not None:
            out_MN = out_MN + self._module.bias
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        return out_MN.to(dtype).view(*inputs.shape[:-1], -1)


def fp8_product(rows_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``rows @ weight.T`` of float8 factors with float32 sums: [M, N] bfloat16, without gradients.

    Replaces::

        rows_scale, weight_scale = rows.abs().amax(1, keepdim=True) / 448, weight.abs().amax(1, keepdim=True) / 448
        rows, weight = (rows / rows_scale).to(float8_e4m3fn).float(), (weight / weight_scale).to(float8_e4m3fn).float()
        (rows @ weight.T) * rows_scale * weight_scale.T
    """
    rows, row_scale = _quantised(rows_MK)
    weight, weight_scale = _quantised(weight_NK)
    product: Any = torch._scaled_mm
    out: Tensor = product(rows, weight.t(), scale_a=row_scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16)
    return out


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 values, the scale of each row [rows, 1] float32)."""
    scale = values.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (values / scale).to(_E4M3), scale
