"""One training step: the model's own forward(labels=…), CAL as the paper's code does it, and ours.

hf          the plain step: full logits at every position
released    CAL as published: image positions masked, every one of them computed again, full float32 logits twice
seecal      both passes in one forward, the second over the text alone, logits at label tokens only

Shapes by name are those of METHOD's table; ``tiny`` runs on a CPU in seconds, where only the token counts and the peak
memory mean something.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import device, interleaved, peak_mib, write
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import seecal

IMAGE = 5
_7B = {"layers": 32, "hidden": 4096, "inter": 11008, "heads": 32, "vocab": 32064, "text": (100, 500)}
SHAPES = {
    "tiny": {
        "layers": 4,
        "hidden": 128,
        "inter": 256,
        "heads": 4,
        "vocab": 4096,
        "text": (20, 60),
        "tiles": 1,
        "batch": 4,
    },
    "llava-1.5-7b": {**_7B, "tiles": 1, "batch": 8},
    "llava-next-7b": {**_7B, "tiles": 5, "batch": 4},
    "3b-152k": {**_7B, "layers": 36, "hidden": 2048, "heads": 16, "vocab": 151936, "tiles": 2, "batch": 8},
}
_CLIP_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def checkpoint(model: LlavaForConditionalGeneration) -> None:
    """transformers renamed this in 5.23; the older name warns there, the newer one is missing before."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build(shape: dict, where: torch.device) -> LlavaForConditionalGeneration:
    tiny = shape["hidden"] < 1024
    vision = CLIPVisionConfig(
        **(_CLIP_TINY if tiny else _CLIP_LARGE), image_size=64 if tiny else 336, patch_size=8 if tiny else 14
    )
    text = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inter"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    with torch.device(where):
        model = LlavaForConditionalGeneration(config)
    model.to(torch.float32 if tiny else torch.bfloat16).train()
    checkpoint(model)
    model.model.vision_tower.requires_grad_(False)
    return model


def batch_of(model: LlavaForConditionalGeneration, shape: dict, where: torch.device) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    per_image = (vision.image_size // vision.patch_size) ** 2 * shape["tiles"]
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(shape["batch"]):
        text = torch.randint(
            10, shape["vocab"], (int(torch.randint(*shape["text"], (1,), generator=generator)),), generator=generator
        )
        before = len(text) // 8
        ids = torch.cat([text[:before], torch.full((per_image,), IMAGE), text[before:]])
        labels = ids.clone()
        labels[: before + per_image + (len(text) - before) // 2] = -100
        rows.append((ids, labels))
    pad = lambda index, value: torch.nn.utils.rnn.pad_sequence([row[index] for row in rows], True, value)  # noqa: E731
    ids, labels = pad(0, 0), pad(1, -100)
    pixels = torch.randn(shape["batch"] * shape["tiles"], 3, vision.image_size, vision.image_size, generator=generator)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in rows], True, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(where) for name, value in batch.items()}


def released(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published way, written from METHOD's description."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    masked = batch["attention_mask"] * (batch["input_ids"] != IMAGE)
    with torch.no_grad():
        without = model(**{**inputs, "attention_mask": masked}, use_cache=False).logits.float()[:, :-1]
    logits = model(**inputs, use_cache=False).logits.float()[:, :-1]
    labels = batch["labels"][:, 1:]
    targets = labels.clamp(min=0)[..., None]
    delta = (logits.detach().gather(-1, targets) - without.gather(-1, targets))[..., 0].clamp(1, 5)
    weights = torch.nn.functional.avg_pool1d(delta.reshape(1, 1, -1), 3, 1, 1, count_include_pad=False).view_as(delta)
    weights = weights * (labels != -100)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
    return (weights * ce).sum() / weights.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    where, shape = device(), SHAPES[options.shape]
    model = build(shape, where)
    batch = batch_of(model, shape, where)
    with_cal = copy.copy(model)  # the same parameters under another forward
    seecal.enable_cal(with_cal)

    def step(loss) -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    variants = {
        "hf": lambda: step(lambda: model(**batch, use_cache=False).loss),
        "released": lambda: step(lambda: released(model, batch)),
        "seecal": lambda: step(lambda: with_cal(**batch).loss),
    }
    times = interleaved(variants, options.rounds)
    tokens = batch["input_ids"].numel()
    with torch.no_grad():
        contrast = {"hf": 0, "released": tokens, "seecal": with_cal(**batch).cal.contrast_tokens}
    rows = [
        {
            "shape": options.shape,
            "variant": name,
            **times[name],
            "of_hf": times[name]["p50_ms"] / times["hf"]["p50_ms"],
            "peak_mib": peak_mib(run),
            "main_tokens": tokens,
            "contrast_tokens": contrast[name],
        }
        for name, run in variants.items()
    ]
    write(f"step-{options.shape}", rows, options.out)


if __name__ == "__main__":
    main()
