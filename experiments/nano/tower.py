"""The tower before anything is said: what a picture shows, as classes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models import parts
from .records import Record


class AttributeHead(nn.Module):
    """A query and a linear layer for each attribute, over the features of a picture's patches.

    Args:
        width: of a feature.
        attributes: name → its values.
    """

    def __init__(self, width: int, attributes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, len(attributes), bias=False)
        self.classes = nn.ModuleList(nn.Linear(width, len(values)) for values in attributes.values())

    def forward(self, features: Tensor) -> list[Tensor]:
        """[B, patches, width] → for each attribute [B, values]."""
        features = self.norm(features)
        looked = torch.einsum("bpa,bpw->baw", self.queries(features).softmax(1), features)
        return [classes(looked[:, place]) for place, classes in enumerate(self.classes)]


def features_of(model: Any, pixels: Mapping[str, Tensor]) -> Tensor:
    """What the language model is given of each image: [B, tokens, width]."""
    found = model.get_image_features(**pixels)
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        found = torch.stack(list(found))
    return found


def pretrained_tower(
    model: Any, processor: Any, records: Sequence[Record], attributes: Mapping[str, Sequence[str]], *,
    steps: int, rate: float, batch: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Trains tower and projector to tell the pictures' attributes; what it reached on the last pictures it saw.

    Returns:
        ``loss`` in nats, summed over the attributes; ``right``: the share of known attributes, of the last tenth of steps.
    """
    images = processor.image_processor
    torch.manual_seed(seed)
    rng = random.Random(f"tower {seed}")
    head = AttributeHead(model.config.get_text_config().hidden_size, attributes).to(model.device)
    tower, projector, _ = parts(model)
    trainable = [*tower, *projector, *head.parameters()]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
    pixels = _pixels(images, [one["images"][0] for one in records])
    names = list(attributes)
    known = torch.tensor([[one["attributes"][name] for name in names] for one in records], device=model.device)
    model.train()
    loss, hits, count = torch.zeros(()), 0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = rng.sample(range(len(records)), min(batch, len(records)))
        given = _batch_of(pixels, chosen, model.device)
        scores = head(features_of(model, given))
        told = known[chosen]
        losses = [
            functional.cross_entropy(one, told[:, place])
            for place, one in enumerate(scores)
            if (told[:, place] >= 0).any()
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if step >= steps * 0.9:
            hits += sum(int((one.argmax(1) == told[:, place]).sum()) for place, one in enumerate(scores))
            count += int((told >= 0).sum())
    optimizer.zero_grad()
    return {"loss": round(float(loss.detach()), 4), "right": round(hits / max(1, count), 4)}


_AT_ONCE = 256


def _pixels(images: Any, pictures: Sequence[Any]) -> list[dict[str, Tensor]]:
    """What the image processor makes of each picture, kept: they are seen many times."""
    found = []
    for start in range(0, len(pictures), _AT_ONCE):
        some = list(pictures[start : start + _AT_ONCE])
        made = images(some, return_tensors="pt")
        if "image_grid_thw" in made:  # the patches of all pictures stand one after the other, as many of each
            each = made["pixel_values"].view(len(some), -1, made["pixel_values"].shape[-1])
            made = {"pixel_values": each, "image_grid_thw": made["image_grid_thw"]}
        found += [{name: value[place] for name, value in made.items()} for place in range(len(some))]
    return found


def _batch_of(pixels: list[dict[str, Tensor]], chosen: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    stacked = {name: torch.stack([pixels[one][name] for one in chosen]).to(device) for name in pixels[0]}
    if "image_grid_thw" in stacked:
        stacked["pixel_values"] = stacked["pixel_values"].flatten(0, 1)
    return stacked
