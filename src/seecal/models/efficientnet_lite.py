"""EfficientNet-lite0 as a vision tower that transformers' LLaVA can hold.

Plain convolutions: the BatchNorms of the ImageNet weights are folded into them when they are loaded (:func:`fold`),
because the tower stays frozen. So nothing in it behaves differently in train mode, whoever trains the model around it.
Architecture: Tan & Le 2019 (arXiv 1905.11946) in the "lite" variant: no squeeze-and-excite, ReLU6 everywhere.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

MODEL_TYPE = "seecal_efficientnet_lite"
# What the ImageNet weights were trained on, as the image processor counts it: (x / 255 - mean) / std = (x - 127) / 128.
IMAGE_MEAN = 127 / 255
IMAGE_STD = 128 / 255
_BN_EPS = 1e-3

# (kernel, stride, expansion, channels, repeats) of each stage; the stem before it has 32 channels, the head after it 1280
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration of :class:`EfficientNetLiteModel`.

    Args:
        image_size: side of the square input in pixels, a multiple of 32.
        grid: image tokens per side. The feature map (image_size / 32 a side) is average-pooled to grid × grid.
        hidden_size: channels of the last feature map: 1280, fixed by the weights.
    """

    model_type = MODEL_TYPE
    base_config_key = "vision_config"

    image_size: int = 128
    grid: int = 4
    hidden_size: int = 1280

    @property
    def patch_size(self) -> int:
        """Pixels per image token and side: what LlavaProcessor counts tokens with."""
        return self.image_size // self.grid


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding (the odd pixel goes right and below), optionally with ReLU6 after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=True)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[-1], x.shape[-2])]
        if any(pads):
            x = nn.functional.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2])
        x = super().forward(x)
        return nn.functional.relu6(x) if self.relu else x


class Block(nn.Module):
    """Inverted residual: widen, convolve each channel by itself, narrow, and add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = SameConv(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, outputs, 1, relu=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """pixel_values [B, 3, S, S], normalised -> image tokens [B, grid², 1280], row by row from the top left."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = False

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, config.hidden_size, 1)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        x = self.stem(pixel_values.to(self.stem.weight.dtype))
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        if x.shape[-1] != self.config.grid:
            x = nn.functional.adaptive_avg_pool2d(x, self.config.grid)
        tokens = x.flatten(2).transpose(1, 2)
        # LLaVA reads hidden_states[vision_feature_layer]; there is one "layer" to read.
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference package's state dict -> ours, each BatchNorm folded into the convolution before it.

    BN(conv(x)) = scale · (conv(x) − mean) + shift with scale = γ / sqrt(var + ε): the scale multiplies the kernel, the
    rest is a bias.
    """
    pairs = {"_conv_stem": ("stem", "_bn0"), "_conv_head": ("head", "_bn1")}
    for name in weights:
        if match := re.fullmatch(r"(_blocks\.(\d+)\.)_project_conv\.weight", name):
            block, ours = match.group(1), f"blocks.{match.group(2)}."
            pairs[block + "_depthwise_conv"] = (ours + "depthwise", block + "_bn1")
            pairs[block + "_project_conv"] = (ours + "project", block + "_bn2")
            if block + "_expand_conv.weight" in weights:
                pairs[block + "_expand_conv"] = (ours + "expand", block + "_bn0")
    folded = {}
    for theirs, (ours, norm) in pairs.items():
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _BN_EPS).sqrt()
        folded[f"{ours}.weight"] = weights[f"{theirs}.weight"] * scale[:, None, None, None]
        folded[f"{ours}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return folded
