"""What makes each model family special. One row a family; everything a row does not say is read off the model.

A family is looked up by ``config.model_type``. One that has no row goes by ``GENERIC``: the decoder's inputs are read by a
forward pre-hook during the main pass, so no family's position code is written again here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where configurations keep the ids whose embeddings are replaced by vision features.
_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: ``config.model_type``; empty for the generic row.
        head: config → (scale, softcap) that the VLM class applies to its logits. Read the class, not the config: Gemma 3
            has a soft-cap in its config that its VLM class does not apply.
        dummy_image: (model) → keyword arguments of ``get_image_features`` for one blank image, so that a rank without
            images runs the same modules as the others. None: not known.
        omit: decoder inputs that touch image slots only, so the pass without the image leaves them out.
    """

    name: str = ""
    head: Callable[[Any], tuple[float, float | None]] = lambda config: (1.0, None)
    dummy_image: Callable[[Any], dict[str, Tensor]] | None = None
    omit: tuple[str, ...] = ("visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features")


def _blank(model: Any, *lead: int) -> Tensor:
    """Zeros [*lead, 3, S, S] of the vision tower's own size, dtype and device."""
    side = model.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    like = next(model.base_model.vision_tower.parameters())
    return torch.zeros(*lead, 3, height, width, dtype=like.dtype, device=like.device)


def _plain_image(model: Any) -> dict[str, Tensor]:
    return {"pixel_values": _blank(model, 1)}


def _tiled_image(model: Any) -> dict[str, Tensor]:
    """One image of the tower's own size: the whole picture plus one tile for each cell of the grid that it falls into."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = model.config.vision_config.image_size
    tiles = image_size_to_num_patches([side, side], model.config.image_grid_pinpoints, side)
    pixels = _blank(model, 1, int(tiles))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]], device=pixels.device)}


GENERIC = Family()

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", dummy_image=_plain_image),
        Family("llava_next", dummy_image=_tiled_image),
        Family("llava_onevision", dummy_image=_tiled_image),
    )
}


def family_of(model: Any) -> Family:
    """The row of the model's family, or the generic one."""
    return FAMILIES.get(model.config.model_type, GENERIC)


def decoder_of(model: Any) -> Any:
    """The text decoder without its head (``get_decoder()`` of Llama 4 returns one that carries an lm_head)."""
    decoder = model.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def image_ids(config: Any) -> set[int]:
    """Ids of the placeholder tokens, images and videos alike."""
    found = (getattr(config, name, None) for name in _IMAGE_ID_FIELDS)
    return {value for value in found if isinstance(value, int)}


def check_vlm(model: Any) -> None:
    """ValueError unless ``model`` is a transformers vision-language model with a language-model head."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(f"{name} is not a transformers model; pass a vision-language model such as LLaVA")
    if not image_ids(config):
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) is not a vision-language model: its config names no image token. "
            "CAL compares the same text with and without its image, so it needs one."
        )
    if getattr(model, "base_model", model) is model or model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head; load it with AutoModelForImageTextToText")


def head_of(model: Any) -> Any:
    """The module that holds the head's weight, or ValueError where that weight is not all there is to it."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT trains a whole copy: take that
        head = head.modules_to_save[head.active_adapters[0]] if head.active_adapters else head.original_module
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the head ({type(head).__name__}) carries an adapter. CAL reads the head's weight directly, so the adapter "
            "would be left out. Take lm_head out of target_modules; to train it whole, set modules_to_save=['lm_head']."
        )
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"the head ({type(head).__name__}) has no floating-point weight; do not quantise lm_head")
    if weight.numel() == 0:
        raise ValueError(
            "the head's weight is empty outside its own forward (DeepSpeed ZeRO-3 does that), which this version of "
            "seecal cannot gather. Use FSDP2 or ZeRO-2."
        )
    return head
