"""The models and batches of the benchmarks: a LLaVA of a given shape with random weights, and rows drawn by a fixed seed.

Times and memory depend on shapes, not on what the weights are. B rows, L columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 5  # the placeholder's id; text is drawn from 10 upwards


@dataclass(frozen=True)
class Vision:
    """A CLIP tower; one tile is ``(image // patch) ** 2`` tokens."""

    hidden: int
    inter: int
    layers: int
    heads: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Shape:
    """A model and its batch.

    ``text``: tokens of a sample's text, from the first up to but without the second. ``kv_heads``: heads of keys and
    values; None: as many as of queries. ``tied``: the head's weight is that of the embedding.
    """

    layers: int
    hidden: int
    inter: int
    heads: int
    vocab: int
    tiles: int
    batch: int
    text: tuple[int, int]
    vision: Vision
    projector_only: bool = False
    kv_heads: int | None = None
    tied: bool = False

    @property
    def image_tokens(self) -> int:
        return self.tiles * self.vision.tokens


CLIP_336 = Vision(hidden=1024, inter=4096, layers=24, heads=16, image=336, patch=14)
CLIP_BASE_224 = Vision(hidden=768, inter=3072, layers=12, heads=12, image=224, patch=16)
CLIP_TINY = Vision(hidden=64, inter=128, layers=2, heads=2, image=64, patch=8)
_7B = Shape(
    layers=32, hidden=4096, inter=11008, heads=32, vocab=32064, tiles=1, batch=8, text=(100, 500), vision=CLIP_336
)
_TINY = Shape(layers=4, hidden=128, inter=256, heads=4, vocab=4096, tiles=1, batch=4, text=(20, 60), vision=CLIP_TINY)
GPU_SHAPES = {
    "llava-1.5-7b": _7B,
    "llava-next-7b": dataclasses.replace(_7B, tiles=5, batch=4),
    "3b-152k": dataclasses.replace(_7B, layers=36, hidden=2048, heads=16, vocab=151936, tiles=2),
    "llava-1.5-7b-projector": dataclasses.replace(_7B, projector_only=True),
}
# The decoder is SmolLM2-135M's (its config.json on the hub), the image's tokens are the 196 patches of a ViT-B/16 at 224
# pixels. Batches are what two cores do in a quarter of a minute.
_135M = Shape(
    layers=30, hidden=576, inter=1536, heads=9, kv_heads=3, vocab=49152, tied=True, tiles=1, batch=4, text=(100, 260),
    vision=CLIP_BASE_224,
)  # fmt: skip
CPU_SHAPES = {
    "135m": _135M,
    # a grid of two tiles and the whole image
    "135m-next": dataclasses.replace(_135M, tiles=3, batch=2),
    # the vocabulary of Qwen2.5 over a small decoder, 60 M parameters together
    "60m-152k": dataclasses.replace(_135M, layers=24, hidden=256, inter=896, heads=4, kv_heads=2, vocab=151936),
}
SHAPES = {
    "tiny": _TINY,
    "tiny-projector": dataclasses.replace(_TINY, projector_only=True),
    **GPU_SHAPES,
    **CPU_SHAPES,
}

Row = tuple[torch.Tensor, torch.Tensor]


def build(
    shape: Shape, where: torch.device, dtype: torch.dtype, placeholder: int = IMAGE
) -> LlavaForConditionalGeneration:
    """The model in training mode, every decoder layer checkpointed, the vision tower frozen."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision.hidden,
        intermediate_size=shape.vision.inter,
        num_hidden_layers=shape.vision.layers,
        num_attention_heads=shape.vision.heads,
        image_size=shape.vision.image,
        patch_size=shape.vision.patch,
    )
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=placeholder,
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in its own precision: 7 B parameters in float32 first would be 28 GB
    try:
        with torch.device(where):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    checkpoint(model)
    model.model.vision_tower.requires_grad_(False)
    if shape.projector_only:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    return model


def checkpoint(model: LlavaForConditionalGeneration) -> None:
    """transformers renamed this in 5.23; the older name warns there, the newer one is missing before."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def draw(shape: Shape) -> tuple[list[Row], torch.Generator]:
    """(ids, labels) of every sample, without padding: text, image, text; the second half of the text after it is labels.

    The same rows in every run; also the generator, to go on drawing pixels from.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(shape.batch):
        length = int(torch.randint(*shape.text, (1,), generator=generator))
        text = torch.randint(10, shape.vocab, (length,), generator=generator)
        before = length // 8
        ids = torch.cat([text[:before], torch.full((shape.image_tokens,), IMAGE), text[before:]])
        labels = ids.clone()
        labels[: before + shape.image_tokens + (length - before) // 2] = -100
        rows.append((ids, labels))
    return rows, generator


def batch_of(shape: Shape, where: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The rows of :func:`draw` as ``model(**batch)`` takes them, padded on the right to the longest, and random pixels."""
    rows, generator = draw(shape)
    pad = torch.nn.utils.rnn.pad_sequence
    side = shape.vision.image
    batch = {
        "input_ids": pad([ids for ids, _ in rows], True, 0),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], True, 0),
        "labels": pad([labels for _, labels in rows], True, -100),
        "pixel_values": torch.randn(shape.batch * shape.tiles, 3, side, side, generator=generator).to(dtype),
    }
    return {name: value.to(where) for name, value in batch.items()}
