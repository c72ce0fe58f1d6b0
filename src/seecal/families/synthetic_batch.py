"""A batch made up for a model: random text around one random image, with the arguments that its family takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from . import dummy_images
from .table import family_of, image_id, image_ids


def synthetic_batch(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random text around one random image, with the arguments that the model's family takes."""
    generator = torch.Generator().manual_seed(seed)
    make = family_of(model).dummy_image or dummy_images.picture
    try:
        vision = make(model)
        features = _feature_count(model, vision)
    except Exception as error:  # an undeclared family's tower may want anything
        raise ValueError(
            f"seecal knows no image for model_type {model.config.model_type!r} ({error}). Declare the family with its "
            "dummy image (docs/families.md); training tests it on your own first batch."
        ) from error
    for name, value in vision.items():
        if name.startswith("pixel_values"):
            noise = torch.rand(value.shape, generator=generator).to(value)
            # a tile that is not in use stays empty
            vision[name] = noise if name != "pixel_values" or "aspect_ratio_mask" not in vision else _one_tile(noise)
    ids = _text(model, 6 + features + 12, generator)
    image = torch.zeros_like(ids, dtype=torch.bool)
    image[:, 3 : 3 + features] = True
    ids[image] = image_id(model.config)
    labels = ids.clone()
    labels[:, : 6 + features] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **vision}
    return {**batch, **_per_token(model, image, labels, vision)}


def _feature_count(model: Any, vision: dict[str, Tensor]) -> int:
    if family_of(model).cross_attention:
        return 1
    with torch.no_grad():
        parts = dummy_images.features(model, vision)  # of one image; where it enters several layers, as many for each
    return parts[0].reshape(-1, parts[0].shape[-1]).shape[0]


def _one_tile(pixels: Tensor) -> Tensor:
    kept = torch.zeros_like(pixels)
    kept[:, :, 0] = pixels[:, :, 0]
    return kept


def _text(model: Any, length: int, generator: torch.Generator) -> Tensor:
    """Ids that mean nothing special: neither placeholders nor among the first and last of the vocabulary."""
    size = model.config.get_text_config().vocab_size
    special = image_ids(model.config)
    plain = [token for token in range(size // 4, 3 * size // 4) if token not in special]
    chosen = torch.randint(len(plain), (1, length), generator=generator)
    return torch.tensor(plain)[chosen].to(model.device)


def _per_token(model: Any, image: Tensor, labels: Tensor, vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """What some families want to know of every token."""
    accepted = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    made: dict[str, Tensor] = {}
    if "mm_token_type_ids" in accepted:
        made["mm_token_type_ids"] = image.long()
    if "token_type_ids" in accepted:  # PaliGemma marks what is predicted, Gemma 3 what is an image
        made["token_type_ids"] = (
            (labels != IGNORE_INDEX).long() if model.config.model_type == "paligemma" else image.long()
        )
    if "cross_attention_mask" in accepted:
        tiles = vision["aspect_ratio_mask"].shape[-1]
        made["cross_attention_mask"] = (image.cumsum(1) > 0).long()[:, :, None, None] * vision["aspect_ratio_mask"][
            :, None
        ]
        assert made["cross_attention_mask"].shape[-1] == tiles
    return made
