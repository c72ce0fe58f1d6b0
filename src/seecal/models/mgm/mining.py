"""Patch info mining: each low-resolution token looks at the high-resolution cells that it covers, and at no others.

    q = W_q LN(x_n);  k_m = W_k LN(y_m);  v_m = W_v LN(y_m)          m over the window of token n
    e_n = sum_m softmax_m(q·k_m / sqrt(C)) v_m;  the token becomes x_n + e_n

Shapes: n pictures, S tokens a side of a picture, C channels of the low-resolution tower; H cells a side of the
high-resolution map and A channels of it; a token's window is p × p cells, p = H / S.

Source: ``unified_resampler`` in MGM's ``mgm/model/mgm_arch.py`` (arXiv 2403.18814, section 3.2). Not carried over: NaN and
infinite scores were made finite there. Here they go on, and training stops at the first of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class MGMMining(nn.Module):
    """One head of attention inside each token's window, without an output projection.

    Args:
        channels: C.
        aux_channels: A.
    """

    def __init__(self, channels: int, aux_channels: int) -> None:
        super().__init__()
        self.query = _normed_linear(channels, channels)
        self.key = _normed_linear(aux_channels, channels)
        self.value = _normed_linear(aux_channels, channels)
        # Set by gradient_checkpointing_enable(). In MGM-HD keys and values are made of 184,320 cells an image.
        self.gradient_checkpointing = False

    def forward(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """What each token adds to itself [n, S², C].

        Args:
            tokens: [n, S², C], row by row.
            cells: [n, A, H, H].

        Raises:
            ValueError: H is no multiple of S.
        """
        if self.gradient_checkpointing and self.training:
            # Not the reentrant kind: it gives no gradient where no input has one, as with frozen towers
            found: Tensor = checkpoint(self._mine, tokens, cells, use_reentrant=False)
            return found
        return self._mine(tokens, cells)

    def _mine(self, tokens: Tensor, cells: Tensor) -> Tensor:
        own = windows(cells, tokens.shape[1])
        query = self.query(tokens)[:, :, None]  # one query a window
        return F.scaled_dot_product_attention(query, self.key(own), self.value(own))[:, :, 0]


def _normed_linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))


def windows(cells: Tensor, tokens: int) -> Tensor:
    """Each token's own cells [n, S², p², A] of a map [n, A, H, H]; windows and the cells in them row by row.

    Raises:
        ValueError: the windows do not divide the map.
    """
    side = round(tokens**0.5)
    pictures, channels, height, width = cells.shape
    if side * side != tokens or height % side or width % side:
        raise ValueError(
            f"{tokens} low-resolution tokens cannot share {height} × {width} high-resolution cells: they must be a square "
            "whose side divides both. Set the processor's sizes to those of the model's config."
        )
    cut = cells.reshape(pictures, channels, side, height // side, side, width // side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(pictures, tokens, -1, channels)


def stacked_stages(stages: Any) -> Tensor:
    """The maps of all stages [n, C_i, H_i, H_i] in the first one's size, on top of each other: [n, ΣC_i, H_0, H_0]."""
    first, *rest = stages
    return torch.cat([first, *(resized(stage, first.shape[-2:]) for stage in rest)], dim=1)


def resized(maps: Tensor, size: Any) -> Tensor:
    """Bilinear, in float32, without antialiasing or aligned corners: how MGM resizes pictures and maps."""
    precise = maps.to(torch.promote_types(maps.dtype, torch.float32))
    made = F.interpolate(precise, size=tuple(size), mode="bilinear", align_corners=False)
    return made.to(maps.dtype)


def tiled(maps: Tensor, grid: int) -> Tensor:
    """[n, grid², A, H / grid, H / grid]: the tiles of each map, row by row."""
    count, channels, height, width = maps.shape
    cut = maps.reshape(count, channels, grid, height // grid, grid, width // grid)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, channels, height // grid, width // grid)
