"""Which modules of a vision-language model are its projector, its tower, its language model, its head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .table import check_vlm, decoder_of

GROUPS = ("projector", "language_model", "vision_tower", "image_newline", "lm_head", "lora")
# What may stay frozen inside a group that trains
FREEZABLE = ("embeddings",)


# Where transformers' models keep them: attributes of the base model, or of the whole one. A new name is one entry.
_PROJECTORS = (
    "multi_modal_projector",  # LLaVA and most others
    "mining",  # Mini-Gemini: what is trained with the projector in both stages
    "connector",  # Idefics 3, SmolVLM
    "visual.merger",  # Qwen-VL
    "visual.deepstack_merger_list",
    "aligner",  # Janus
    "embed_vision",  # Gemma 4
    "vision_projection",  # LightOnOCR
    "visual_embeddings_table",  # Ovis 2
    "layerwise_projectors",  # Granite 4 Vision
    "spatial_projectors",
)


# LLaVA-NeXT, -OneVision: a single vector that ends each row of tiles. The paper's code makes it a parameter of the language
# model: frozen while the projector alone trains, trained with the decoder (CAL's llava/model/llava_arch.py).
_NEWLINES = ("image_newline",)


_TOWERS = ("vision_tower", "vision_tower_aux", "visual", "vision_model", "vision_encoder", "vision_embed_tokens")


def module_groups(model: Any) -> dict[str, tuple[str, ...]]:
    """Group → the modules and parameters that make it up, as names in ``model`` (without PEFT's wrapper).

    ``language_model`` holds the lm_head and the image_newline too, as in the paper's code; ``lm_head`` and
    ``image_newline`` are there to train one alone, or at a learning rate of its own. Groups that the model does not have
    are left out.
    """
    check_vlm(model)
    names = {id(module): name for name, module in model.named_modules()}
    base = names[id(model.base_model)]
    head = names[id(model.get_output_embeddings())]
    newline = _existing(model, base, _NEWLINES)
    groups = {
        "projector": _existing(model, base, _PROJECTORS),
        "language_model": (names[id(decoder_of(model))], head, *newline),
        "vision_tower": _existing(model, base, _TOWERS),
        "image_newline": newline,
        "lm_head": (head,),
    }
    return {group: paths for group, paths in groups.items() if paths}


def _existing(model: Any, base: str, attributes: Iterable[str]) -> tuple[str, ...]:
    found = []
    for path in (prefix + attribute for attribute in attributes for prefix in (f"{base}.", "")):
        value = model
        for part in path.split("."):
            value = getattr(value, part, None)
        if isinstance(value, (nn.Module, nn.Parameter)):
            found.append(path)
    return tuple(found)


def group_of(name: str, groups: Mapping[str, tuple[str, ...]], wanted: Iterable[str]) -> str | None:
    """The group of ``wanted`` that owns a parameter: the one with the longest path above it (visual.merger, not visual).

    A group that is not wanted still owns its own, so that training ``visual`` leaves ``visual.merger`` alone.
    """
    owners = [
        (len(path), group in wanted, group)
        for group, paths in groups.items()
        for path in paths
        if name == path or name.startswith(path + ".")
    ]
    # lm_head and image_newline are in two groups under one path: the one that is wanted owns it, language_model last
    longest = [owner for owner in owners if owner[0] == max(length for length, _, _ in owners)]
    chosen = max(longest, key=lambda owner: (owner[1], owner[2] != "language_model"), default=None)
    return chosen[2] if chosen and chosen[1] else None
