"""How long a step and a held-out question take here: a few are run, and the weights stay as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.enable import disable_cal, enable_cal
from ..core.options import CALOptions
from ..data.collators.vision import VisionCollator
from ..data.images.decode import open_image
from ..recipes.trainable import prepare
from .compute import precision
from .emoji import Answer, record
from .measure import measure

# A first step this long is not made noticeably longer by what is set up in it
_SLOW = 5.0


def seconds_a_step(
    model: Any, processor: Any, batches: Sequence[tuple[float, list[tuple[Path, Answer]]]], weighting: str, bf16: bool
) -> float:
    """Mean time of a step of stage 2 over ``batches``: (how often it comes, its questions).

    With a learning rate of 0, so that the optimizer's work is in it and no weight changes. The first step also sets things
    up, so it is run again where it was short.
    """
    prepare(model, ("projector", "language_model"), freeze=("embeddings",))
    enable_cal(model.train(), CALOptions(weighting=weighting))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    collate = VisionCollator(processor)

    def step(asked: list[tuple[Path, Answer]]) -> float:
        start = time.perf_counter()
        records = [{**record(path, reply), "images": [open_image(path)]} for path, reply in asked]
        batch = {name: tensor.to(model.device) for name, tensor in collate(records).items()}
        with precision(model.device, bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        return time.perf_counter() - start

    try:
        first = step(batches[0][1])
        if first < _SLOW:
            first = step(batches[0][1])
        times = [first, *(step(asked) for _, asked in batches[1:])]
    finally:
        disable_cal(model)
        model.requires_grad_(False).eval()
    shares = [share for share, _ in batches]
    return sum(share * spent for share, spent in zip(shares, times, strict=True)) / sum(shares)


def seconds_a_question(model: Any, processor: Any, asked: Sequence[tuple[Path, Answer]], bf16: bool) -> float:
    """Mean time of a held-out question."""
    start = time.perf_counter()
    with precision(model.device, bf16):
        measure(model, processor, asked)
    return (time.perf_counter() - start) / len(asked)
