"""One dummy image as each kind of vision tower takes it: the vision arguments of a batch with a single image.

Of the smallest size that the tower accepts, and grey: what it shows does not matter, that the same modules run does. Not
black, because Idefics leaves images of zeros out as padding.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor


def feature_sum(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    """Σ of the image features that the arguments give: through the vision tower and whatever projects it, float32."""
    return torch.stack([part.float().sum() for part in features(model, arguments)]).sum()


def features(model: Any, arguments: dict[str, Tensor]) -> list[Tensor]:
    """The projected features of the images, one tensor an image; several an image where they enter several layers."""
    owner = model.base_model
    if not hasattr(owner, "get_image_features"):  # Mllama
        output = owner.vision_model(**arguments)
    else:
        accepted = inspect.signature(inspect.unwrap(type(owner).get_image_features)).parameters
        given: dict[str, Any] = {name: arguments[name] for name in arguments if name in accepted}
        if "vision_feature_select_strategy" in accepted:  # no default in older versions of Llama 4
            vision = model.config.vision_config
            strategy = getattr(model.config, "vision_feature_select_strategy", None)
            given["vision_feature_select_strategy"] = strategy or getattr(
                vision, "vision_feature_select_strategy", None
            )
        output = owner.get_image_features(**given)
    pooled = getattr(output, "pooler_output", output if isinstance(output, (list, tuple, Tensor)) else None)
    # Qwen 3 has both; Granite only these, as (layer, features)
    found = _tensors(pooled) + _tensors(getattr(output, "deepstack_features", None))
    if found:
        return found
    # Llama 4 and Mllama project in their forward
    hidden = output.last_hidden_state
    return [owner.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1]))]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested list."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def picture(model: Any) -> dict[str, Tensor]:
    """[1, 3, S, S] of the tower's own size."""
    return {"pixel_values": _grey(model, 1, 3, *_size(model))}


def sized_picture(model: Any) -> dict[str, Tensor]:
    """Towers of any resolution (Pixtral): the picture and its size."""
    height, width = _size(model)
    return {"pixel_values": _grey(model, 1, 3, height, width), "image_sizes": _ints(model, [[height, width]])}


def grouped_picture(model: Any) -> dict[str, Tensor]:
    """[rows, images, 3, S, S] (Idefics)."""
    size = _size(model)
    mask = torch.ones(1, 1, *size, dtype=torch.bool, device=model.device)
    return {"pixel_values": _grey(model, 1, 1, 3, *size), "pixel_attention_mask": mask}


def tiles(model: Any) -> dict[str, Tensor]:
    """LLaVA-NeXT and its kin: the whole picture, and a tile for each cell of the grid that a picture of this size gets."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    height, width = _size(model)
    count = int(image_size_to_num_patches([height, width], model.config.image_grid_pinpoints, height))
    return {
        "pixel_values": _grey(model, 1, count, 3, height, width),
        "image_sizes": _ints(model, [[height, width]]),
    }


def patches(model: Any) -> dict[str, Tensor]:
    """Qwen-VL and GLM-4V: flattened patches of two by two merged cells, and their grid (time, height, width)."""
    vision = model.config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    side = 2 * vision.spatial_merge_size
    return {
        "pixel_values": _grey(model, side * side, width),
        "image_grid_thw": _ints(model, [[1, side, side]]),
    }


def two_resolutions(model: Any) -> dict[str, Tensor]:
    """Mini-Gemini: the picture as CLIP takes it (with tiles [1, tiles + whole, 3, s, s]) and as ConvNeXt does, whose side
    must be a multiple of 32 pixels and hold a whole number of its cells of 4 pixels for each token."""
    config = model.config
    size = _size(model)
    pictures = () if config.pictures == 1 else (config.pictures,)
    side = math.lcm(32, 4 * config.image_grid * config.tokens_per_side)
    return {
        "pixel_values": _grey(model, 1, *pictures, 3, *size),
        "pixel_values_aux": _grey(model, 1, 3, side, side),
    }


def positioned_patches(model: Any) -> dict[str, Tensor]:
    """Gemma 4: patches with the (x, y) of each."""
    vision = model.config.vision_config
    side = 2 * vision.pooling_kernel_size
    steps = torch.arange(side, device=model.device)
    positions = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, -1, 2)
    return {
        "pixel_values": _grey(model, 1, side * side, 3 * vision.patch_size**2),
        "image_position_ids": positions,
    }


def shaped_patches(model: Any) -> dict[str, Tensor]:
    """LFM2-VL (Siglip 2): patches, how many in each direction, and which are not padding."""
    vision = model.config.vision_config
    side = 2 * model.config.downsample_factor
    return {
        "pixel_values": _grey(model, 1, side * side, 3 * vision.patch_size**2),
        "spatial_shapes": _ints(model, [[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long, device=model.device),
    }


def pooled_patches(model: Any) -> dict[str, Tensor]:
    """Molmo 2: patches of one crop, which of them are pooled into one feature, and the grids."""
    vision = model.config.vision_config
    height, width = (size // vision.patch_size for size in _size(model))
    index = torch.arange(height * width, device=model.device).view(height, width)
    pooled = index.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
    return {
        "pixel_values": _grey(model, 1, height * width, 3 * vision.patch_size**2),
        "image_token_pooling": torch.cat([pooled, pooled]),
        "image_grids": _ints(model, [[height // 2, width // 2, height // 2, width // 2]]),
        "image_num_crops": _ints(model, [1]),
    }


def crossed_picture(model: Any) -> dict[str, Tensor]:
    """Mllama: [rows, images, tiles, 3, S, S] with one tile in use, and its aspect ratio."""
    count = model.config.vision_config.max_num_tiles
    used = torch.zeros(1, 1, count, dtype=torch.long, device=model.device)
    used[..., 0] = 1
    return {
        "pixel_values": _grey(model, 1, 1, count, 3, *_size(model)),
        "aspect_ratio_ids": _ints(model, [[1]]),
        "aspect_ratio_mask": used,
    }


def _size(model: Any) -> tuple[int, int]:
    side = model.config.vision_config.image_size
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _grey(model: Any, *shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=model.dtype, device=model.device)


def _ints(model: Any, values: Any) -> Tensor:
    return torch.tensor(values, device=model.device)
