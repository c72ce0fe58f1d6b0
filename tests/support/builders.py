"""Tiny random vision-language models and batches of the LLaVA families.

With transformers' default initialisation |Δ| stays far below 1 and every weight is α, so a test would pass on anything:
the initialisation is scaled up until the image matters.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

PAD, IMAGE, VIDEO, VOCABULARY, WIDTH = 0, 3, 4, 128, 64
TEXT_IDS = (10, 120)
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_PINPOINTS = [[32, 32], [64, 32], [64, 64]]
# 16 features of the whole picture, 8 × 8 of its four tiles, one newline for each of their 8 rows
_TILED_TOKENS = 16 + 8 * 8 + 8


def llava(tied=False, decoder=None, **text):
    """``decoder``: the class of the text config; None: Llama's, or Mistral's where it has a window."""
    decoder = decoder or (MistralConfig if "sliding_window" in text else LlamaConfig)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=decoder(**{**_TEXT, **text}),
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration(config), 16, lambda n, draw: {"pixel_values": draw(n, 3, 32, 32)}


def llava_next(**text):
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**{**_TEXT, **text}),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config), _TILED_TOKENS, _tiles


def llava_onevision(**text):
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=Qwen2Config(**{**_TEXT, **text}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
    )
    pixels = lambda n, draw: {**_tiles(n, draw), "batch_num_images": torch.ones(n, dtype=torch.long)}  # noqa: E731
    return LlavaOnevisionForConditionalGeneration(config), _TILED_TOKENS, pixels


def _tiles(n, draw):
    return {"pixel_values": draw(n, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]] * n)}


FAMILIES = {"llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision}


@dataclass
class Row:
    """One sample as a list of parts: a number of text tokens, ``"image"``, or ``-n`` for n labelled text tokens."""

    parts: list
    images: int = field(init=False)

    def __post_init__(self):
        self.images = self.parts.count("image")


MIXED = [
    Row([6, "image", 3, -20]),  # text before the image
    Row([2, "image", 4, "image", 2, -8]),  # two images
    Row([12, -6]),  # text only
    Row([3, "image", -5]),  # a label directly after an image
    Row([2, -4, "image", 2, -7, 3, -2]),  # labels before the image, two answers
]


def build(family, attention="sdpa", seed=0, **options):
    """(model in eval mode, tokens of one image, pixel maker), with an initialisation under which the image matters."""
    torch.manual_seed(seed)
    model, image_tokens, pixels = FAMILIES[family](**options)
    model.set_attn_implementation(attention)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = 0.7 if "embed" in name else 0.8 / parameter.shape[-1] ** 0.5
            nn.init.normal_(parameter, std=spread)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model.eval(), image_tokens, pixels


def batch_of(rows, image_tokens, pixels, padding="right", seed=1, extra_padding=0):
    """What ``model(**batch)`` takes. A row's tokens and images depend on the seed and on its own place only."""
    length = max(_length(row, image_tokens) for row in rows) + extra_padding
    ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    images = []
    for index, row in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * seed + getattr(row, "key", index))
        tokens, targets = _tokens(row, image_tokens, generator)
        at = slice(0, len(tokens)) if padding == "right" else slice(length - len(tokens), length)
        ids[index, at], labels[index, at], mask[index, at] = tokens, targets, 1
        if row.images:
            images.append(pixels(row.images, lambda *shape, g=generator: torch.randn(*shape, generator=g)))
    out = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for name in images[0] if images else ():
        out[name] = torch.cat([one[name] for one in images])
    return out


def _length(row, image_tokens):
    return sum(image_tokens if part == "image" else abs(part) for part in row.parts)


def _tokens(row, image_tokens, generator):
    tokens, targets = [], []
    for part in row.parts:
        if part == "image":
            tokens.append(torch.full((image_tokens,), IMAGE))
            targets.append(torch.full((image_tokens,), -100))
        else:
            text = torch.randint(*TEXT_IDS, (abs(part),), generator=generator)
            tokens.append(text)
            targets.append(text if part < 0 else torch.full_like(text, -100))
    return torch.cat(tokens), torch.cat(targets)
