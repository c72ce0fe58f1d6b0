"""What a tensor is called in the layouts of LLaVA, and whether all of them are there.

The layout in the middle, here "hub", is that of the published transformers checkpoints, which every transformers reads:

    original (LLaVA, CAL)                          hub
    model.embed_tokens., model.layers., …          language_model.model.embed_tokens., …
    lm_head.                                       language_model.lm_head.
    model.mm_projector.{0,2}.                      multi_modal_projector.linear_{1,2}.
    model.vision_tower.vision_tower.vision_model.  vision_tower.vision_model.
    model.image_newline                            image_newline
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ..hub_layout import has_level, hub_name

TOWER, NEWLINE, EMBEDDINGS, HEAD = (
    "vision_tower.",
    "image_newline",
    "language_model.model.embed_tokens.weight",
    "language_model.lm_head.weight",
)
PROJECTOR = "multi_modal_projector."
# (original, hub); the longer first
_PREFIXES = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that old versions saved and that are computed now
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")
T = TypeVar("T")


def original_to_hub(state: Mapping[str, T], where: Any) -> tuple[dict[str, T], list[str]]:
    """(tensors by their hub names, names of computed buffers that are left out). ValueError for a name of neither."""
    return _renamed(state, [(old, new) for old, new in _PREFIXES], where)


def hub_to_original(state: Mapping[str, T], where: Any) -> dict[str, T]:
    """The way back. ValueError for a tensor that the original code has no place for."""
    return _renamed(state, [(new, old) for old, new in _PREFIXES], where)[0]


def transformers_to_hub(state: Mapping[str, T], level: bool = True) -> dict[str, T]:
    """Any of transformers' layouts in the hub's."""
    return {hub_name(name, level): one for name, one in state.items() if not _COMPUTED.search(name)}


def _renamed(state: Mapping[str, T], pairs: list[tuple[str, str]], where: Any) -> tuple[dict[str, T], list[str]]:
    found, computed = {}, []
    for name, one in state.items():
        if _COMPUTED.search(name):
            computed.append(name)
            continue
        pair = next((pair for pair in pairs if name.startswith(pair[0])), None)
        if pair is None:
            raise ValueError(
                f"{where}: it holds {name}, which is no tensor of a LLaVA, LLaVA-NeXT or CAL checkpoint, so the conversion "
                "would lose it. Take it out of the file if it is not needed."
            )
        found[pair[1] + name.removeprefix(pair[0])] = one
    return found, computed


def check_complete(state: Mapping[str, Any], config: Any, where: Any, hub: bool = True) -> None:
    """ValueError unless ``state`` holds exactly the tensors of a model of ``config``, in their shapes.

    Args:
        state: tensors (or what has their ``shape``) by hub names.
        config: of a model for images and text.
        where: how errors call it.
        hub: whether the names are the hub's, or those in memory.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(one.shape) for name, one in made.state_dict().items()}
    wanted = transformers_to_hub(wanted, has_level(config)) if hub else wanted
    head = HEAD if hub else "lm_head.weight"
    if config.tie_word_embeddings and head not in state:
        wanted.pop(head, None)
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(
            f"{where}: lacks {len(missing)} of the model's tensors, {missing[0]} for one ({len(wanted)} are needed). Copy "
            "it again, or give what it is to come from (language_model, vision_tower, aux_tower)."
        )
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{where}: it holds {unknown[0]}, for which a {config.model_type} of its config has no place.")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} has the shape {tuple(state[name].shape)}, its config.json says {shape}. Do both come "
                "from one model?"
            )
