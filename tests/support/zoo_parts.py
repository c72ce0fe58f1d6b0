"""What the zoo is put together from: ids, text and vision configurations, and the tensors a vision tower takes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as T

# Ids up to 9 mean something to some family, 10 to 119 are text, 120 to 124 are Ovis 2's indicators.
PAD, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, OTHER = range(9)
VOCABULARY, WIDTH = 128, 64
PATCH_ID, CROSS_ID = VOCABULARY + 1, VOCABULARY  # Molmo 2's and Mllama's image ids lie beyond the text vocabulary


@dataclass(frozen=True)
class Kind:
    """How one kind of model is built and what an image is to it.

    Attributes:
        model: () → the model.
        image: the ids of one image in the text, with the tokens around it.
        vision: (images in each row, draw) → vision inputs; ``draw(*shape)`` gives noise.
        per_token: (ids, labels) → further inputs of shape [B, L].
        placeholder: the id whose embedding the image replaces.
        embed, head: initialisation: spread of the embeddings, factor on an untied head.
        attentions: what its classes accept.
    """

    model: Callable
    image: list
    vision: Callable
    per_token: Callable = field(default=lambda ids, labels: {})
    placeholder: int = IMAGE
    embed: float = 0.7
    head: float = 4.0
    attentions: tuple = ("sdpa", "eager")


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**SMALL, "image_size": 32, "patch_size": 8}
FINE_TOWER = {**SMALL, "image_size": 32, "patch_size": 4}
PINPOINTS = [[32, 32], [64, 32], [64, 64]]


def llama(**changed):
    return T.LlamaConfig(**{**TEXT, **changed})


def qwen2():
    return T.Qwen2Config(**TEXT)


def mistral(window=None):
    return T.MistralConfig(**TEXT, head_dim=16, sliding_window=window)


def clip(**changed):
    return T.CLIPVisionConfig(**{**TOWER, "projection_dim": 16, **changed})


def siglip(**changed):
    return T.SiglipVisionConfig(**{**TOWER, "vision_use_head": False, **changed})


def pixtral(patch_size):
    return T.PixtralVisionConfig(**{**TOWER, "patch_size": patch_size})


def convnext(**changed):
    """Layer scale 1: with the published 1e-6 untrained blocks would change nothing."""
    sizes = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
    return T.ConvNextConfig(**{**sizes, "layer_scale_init_value": 1.0, **changed})


def picture(counts, draw):
    return {"pixel_values": draw(sum(counts), 3, 32, 32)}


def large_picture(counts, draw):
    return {"pixel_values": draw(sum(counts), 3, 64, 64)}


def sized_picture(counts, draw):
    return {**picture(counts, draw), "image_sizes": torch.tensor([[32, 32]] * sum(counts))}


def tiles(counts, draw):
    n = sum(counts)
    return {"pixel_values": draw(n, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]] * n)}


def two_resolutions(counts, draw):
    return {"pixel_values": draw(sum(counts), 3, 32, 32), "pixel_values_aux": draw(sum(counts), 3, 64, 64)}


def tiles_and_large(counts, draw):
    """Tiles row by row and the whole picture, then the picture at four times the tiles' size."""
    return {"pixel_values": draw(sum(counts), 5, 3, 32, 32), "pixel_values_aux": draw(sum(counts), 3, 128, 128)}


def counted_tiles(counts, draw):
    return {**tiles(counts, draw), "batch_num_images": torch.ones(sum(counts), dtype=torch.long)}


def clips(counts, draw):
    return {"pixel_values_videos": draw(sum(counts), 2, 3, 32, 32)}


def patches(counts, draw):
    n = sum(counts)
    return {"pixel_values": draw(n * 24, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 6, 4]] * n)}


def video_patches(counts, draw):
    n = sum(counts)
    return {"pixel_values_videos": draw(n * 32, 3 * 2 * 16), "video_grid_thw": torch.tensor([[2, 4, 4]] * n)}


def grouped(counts, draw):
    pixels = torch.zeros(len(counts), max(counts), 3, 32, 32)
    for row, count in enumerate(counts):
        pixels[row, :count] = draw(count, 3, 32, 32)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(counts), max(counts), 32, 32).bool()}


def positioned(counts, draw):
    steps = torch.arange(4)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, 16, 2)
    return {"pixel_values": draw(sum(counts), 16, 48).sigmoid(), "image_position_ids": grid.expand(sum(counts), -1, -1)}


def shaped(counts, draw):
    n = sum(counts)
    return {
        "pixel_values": draw(n, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]] * n),
        "pixel_attention_mask": torch.ones(n, 16, dtype=torch.long),
    }


def pooled(counts, draw):
    n = sum(counts)
    cells = torch.arange(16).reshape(4, 4).repeat(2, 1)
    return {
        "pixel_values": draw(n, 16, 48),
        "image_token_pooling": torch.cat([cells + 16 * one for one in range(n)]),
        "image_grids": torch.tensor([[2, 2, 2, 2]] * n),
        "image_num_crops": torch.ones(n, dtype=torch.long),
    }


def crossed(counts, draw):
    """[rows, images, 2 tiles, ...] with the first tile in use; the batch stretches the mask's length of 1 over its rows."""
    rows, most = len(counts), max(counts)
    pixels, ratio = torch.zeros(rows, most, 2, 3, 32, 32), torch.zeros(rows, most, dtype=torch.long)
    tiles, may_look = torch.zeros(rows, most, 2, dtype=torch.long), torch.zeros(rows, 1, most, 2)
    tiles[..., 0] = 1
    for row, count in enumerate(counts):
        pixels[row, :count, 0], ratio[row, :count], may_look[row, 0, :count, 0] = draw(count, 3, 32, 32), 1, 1
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": may_look,
    }


def is_image(name, image=IMAGE, video=VIDEO):
    return lambda ids, labels: {name: (ids == image).long() + 2 * (ids == video).long()}


def is_answer(ids, labels):
    return {"token_type_ids": (labels != -100).long()}
