"""By how much the cheaper ways to run the pass without the image change Δ and the weights, on real weights and images.

The demo's model (SmolLM2-135M behind EfficientNet-lite0) on drawings that its projector was not trained on, or a model that
`seecal demo` has trained (`--model seecal-demo/run/final`). Every way is compared with both passes in float32.

float8              the linear layers of the pass without the image in float8 (fp8_contrast=True)
bfloat16            both passes under bfloat16 autocast: what everybody trains with, for scale
bfloat16, float8    both together
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import device, progress, write

import seecal
from seecal import CALOptions, token_weights, verbosity
from seecal.data.collators.vision import VisionCollator
from seecal.demo import emoji
from seecal.models import micro
from seecal.models.loading import load_vlm

WAYS = {
    "float32": (False, False),
    "float8": (False, True),
    "bfloat16": (True, False),
    "bfloat16, float8": (True, True),
}


def batches(processor: Any, count: int, size: int, folder: Path) -> list[dict[str, Any]]:
    """Questions about drawings of the split that no training sees, in a fixed order."""
    items = emoji.by_split(emoji.catalogue(), emoji.HELD_IMAGE)
    chosen = random.Random(0).sample(items, count)
    images, rng = emoji.render_openmoji(chosen, folder), random.Random(1)
    records = [
        emoji.record(images[item.hexcode], emoji.answer(item, question, rng))
        for item in chosen
        if item.hexcode in images
        for question in ("name", "describe")
    ]
    collate = VisionCollator(processor)
    return [dict(collate(records[start : start + size])) for start in range(0, len(records), size)]


def measured(model: Any, given: list[dict[str, Any]], bf16: bool, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(Δ, weights) of every label token with a contrast."""
    where, deltas, weights = device(), [], []
    options = CALOptions(fp8_contrast=fp8)
    for batch in given:
        inputs = {name: value.to(where) for name, value in batch.items()}
        with torch.autocast(where.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            found = seecal.visual_delta(model, inputs, options=options)
        deltas.append(found.delta[found.has_contrast])
        weights.append(token_weights(found.delta, found.runs)[found.has_contrast])
    return torch.cat(deltas), torch.cat(weights)


def rows_of(name: str, model: Any, processor: Any, drawings: int) -> list[dict[str, Any]]:
    model.to(device()).eval()
    with tempfile.TemporaryDirectory() as folder:
        given = batches(processor, drawings, 16, Path(folder))
        with progress() as shown, shown.task(name, len(WAYS), unit="way") as task:
            found = {}
            for way, how in WAYS.items():
                found[way] = measured(model, given, *how)
                task.advance()
    delta, weights = found["float32"]
    rows = []
    for way, (one, other) in found.items():
        apart, moved = (one - delta).abs(), (other - weights).abs()
        figures = {
            "delta_std": delta.std(),
            "delta_error_mean": apart.mean(),
            "weight_mean": other.mean(),
            "weight_error_mean": moved.mean(),
            "weight_error_max": moved.max(),
            "share_moved_by_a_tenth": (moved > 0.1).float().mean(),
        }
        rounded = {what: round(value.item(), 4) for what, value in figures.items()}
        rows.append({"model": name, "way": way, "label_tokens": len(delta), **rounded})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a trained model, measured beside the one that ships")
    parser.add_argument("--drawings", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    verbosity.quiet()
    with verbosity.no_bars():
        shipped = micro.build()
    rows = rows_of("as shipped", *shipped, options.drawings)
    if options.model is not None:
        rows += rows_of("after seecal demo", *load_vlm(options.model), options.drawings)
    write("weights", rows, options.out)


if __name__ == "__main__":
    main()
