"""The tensors of vision towers in their own folders, by the names that transformers 5 has for them in memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .mgm.original_keys import convnext_from_timm
from .weight_files import Lazy, weights_of

_CLIPS_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
# A buffer that old versions saved
_POSITIONS = "embeddings.position_ids"


def clip_tensors(folder: Path) -> dict[str, Lazy]:
    """The vision part of a CLIP: of a whole CLIP's folder or a tower's alone, saved by any transformers.

    Raises:
        ValueError: no weights there.
    """
    state = {name: one for name, one in weights_of(folder).items() if not name.startswith(_CLIPS_TEXT_HALF)}
    return {name.removeprefix("vision_model."): one for name, one in state.items() if not name.endswith(_POSITIONS)}


def convnext_tensors(folder: Path) -> dict[str, Lazy]:
    """A ConvNeXt of transformers', timm's or OpenCLIP's files, without its classifier.

    Raises:
        ValueError: no ConvNeXt there.
    """
    state = {name.removeprefix("convnext."): one for name, one in weights_of(folder).items()}
    if any(name.startswith("embeddings.") for name in state):
        found = {name: one for name, one in state.items() if not name.startswith("classifier.")}
    else:
        trunk = {n.removeprefix("visual.trunk."): t for n, t in state.items() if n.startswith("visual.trunk.")} or state
        found = {new: one for name, one in trunk.items() if (new := convnext_from_timm(name)) is not None}
    if not found:
        raise ValueError(
            f"{folder}: no ConvNeXt here. Give OpenCLIP's folder, timm's, or one of transformers' ConvNext."
        )
    if "layernorm.weight" not in found:  # a norm at the end that Mini-Gemini does not use, and timm's trunk has not
        width, dtype = convnext_sizes(found)[0][-1], next(iter(found.values())).dtype
        found["layernorm.weight"] = Lazy.of(torch.ones(width, dtype=dtype))
        found["layernorm.bias"] = Lazy.of(torch.zeros(width, dtype=dtype))
    return found


def convnext_sizes(state: dict[str, Lazy]) -> tuple[list[int], list[int]]:
    """(channels, number of layers) of each stage of a ConvNeXt, read off its tensors."""
    found: dict[int, list[int]] = {}
    for name, one in state.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.\d+\.dwconv\.weight", name):
            found.setdefault(int(match[1]), []).append(one.shape[0])
    stages = [found[stage] for stage in sorted(found)]
    return [stage[0] for stage in stages], [len(stage) for stage in stages]
