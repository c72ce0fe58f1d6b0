"""Batches from JPEG files on disk: TRL's collator and ours, the same files, the same processor, the same workers.

trl           DataCollatorForVisionLanguageModeling on a ``datasets`` set whose ``image`` column decodes in __getitem__
trl images    the same with a column ``images`` that holds lists, whose first image ``datasets`` decodes twice
exact         VisionCollator on the same files; its pixels are compared with those of trl, bit by bit
reduced       VisionCollator(decoding="reduced"); its pixels are compared, in grey levels of 0 to 255

Wall times need a quiet machine; CPU times count only what these processes used. One image a record, 576 image tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import torch
import torchvision
import transformers as hf
from common import cpu_model, percentiles, progress, shuffled, write
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from seecal.data.collators.vision import VisionCollator

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_vlm import CHAT_TEMPLATE, tiny_tokenizer

# width × height and number of the generated files
SIZES = {
    "tiny": {"files": [((96, 64), 8), ((320, 240), 8)], "side": 28, "batch": 4},
    "full": {"files": [((640, 480), 512), ((2000, 1500), 512)], "side": 336, "batch": 8},
}
_MESSAGES = [
    {"role": "user", "content": "What colour is it? Is it red, green, blue or yellow?"},
    {"role": "assistant", "content": "It is red. It is green. It is blue. It is yellow. What colour is it? " * 2},
]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise of four sizes and a little grain, so that JPEG finds about as much in it as in a photograph."""
    draw = np.random.default_rng(seed)
    values = np.full((height, width, 3), 120, np.float32)
    for cells, strength in ((3, 42), (9, 27), (33, 18), (129, 11)):
        coarse = draw.standard_normal((3, cells * height // width + 2, cells + 2), dtype=np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[channel]).resize((width, height), Image.Resampling.BICUBIC)
            values[..., channel] += strength * np.asarray(layer)
    values += 3 * draw.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def write_files(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    paths = [str(folder / f"{size[0]}-{number}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        photo(*size, seed=number).save(path, "JPEG", quality=90, subsampling="4:2:0")
    return paths


def processor(side: int, patch: int = 14, template: str = CHAT_TEMPLATE) -> hf.LlavaProcessor:
    """LLaVA-1.5's image processing (shortest side, centre crop) before a small tokenizer."""
    images = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def dataset(paths: list[str], column: str, decode: bool) -> Dataset:
    messages = [{"role": Value("string"), "content": Value("string")}]
    image = ImageColumn(decode=decode)
    features = Features({"messages": messages, column: Sequence(image) if column == "images" else image})
    rows = [{"messages": _MESSAGES, column: [path] if column == "images" else path} for path in paths]
    return Dataset.from_list(rows, features=features)


def loaders(paths: list[str], side: int, batch: int, workers: int) -> dict[str, DataLoader]:
    made = processor(side)
    sources: dict[str, tuple[Dataset, Any]] = {
        "trl": (dataset(paths, "image", True), DataCollatorForVisionLanguageModeling(made)),
        "trl images": (dataset(paths, "images", True), DataCollatorForVisionLanguageModeling(made)),
        "exact": (dataset(paths, "image", False), VisionCollator(made)),
        "reduced": (dataset(paths, "image", False), VisionCollator(made, decoding="reduced")),
    }
    settings: dict[str, Any] = {"batch_size": batch, "num_workers": workers, "persistent_workers": workers > 0}
    return {name: DataLoader(data, collate_fn=collate, **settings) for name, (data, collate) in sources.items()}


def cpu_seconds() -> float:
    """CPU time of this process and of the workers it has."""
    times = [psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()]
    return time.process_time() + sum(one.user + one.system for one in times)


def timed(passes: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """(wall ms, CPU ms) of each pass in each round, interleaved."""
    spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in passes}
    with progress() as shown, shown.task("measuring", rounds * len(passes), unit="pass") as task:
        for turn in range(rounds):
            for name in shuffled(passes, turn):
                wall, cpu = time.perf_counter(), cpu_seconds()
                passes[name]()
                spent[name][0].append((time.perf_counter() - wall) * 1e3)
                spent[name][1].append((cpu_seconds() - cpu) * 1e3)
                task.advance(note=name)
    return spent


def differences(found: dict[str, DataLoader], reference: str) -> dict[str, dict[str, Any]]:
    """How far the pixels of each are from those of ``reference``, in grey levels of 0 to 255."""
    std = torch.tensor(found[reference].collate_fn.processor.image_processor.image_std).reshape(3, 1, 1)
    apart: dict[str, dict[str, Any]] = {
        name: {"pixel_equal": True, "mean_levels": 0.0, "max_levels": 0.0} for name in found
    }
    count = 0
    for batches in zip(*found.values(), strict=True):
        pixels = {name: batch["pixel_values"] for name, batch in zip(found, batches, strict=True)}
        count += pixels[reference].numel()
        for name, one in apart.items():
            levels = (pixels[name] - pixels[reference]).abs() * std * 255
            one["pixel_equal"] = one["pixel_equal"] and torch.equal(pixels[name], pixels[reference])
            one["mean_levels"] += levels.sum().item()
            one["max_levels"] = max(one["max_levels"], levels.max().item())
    for one in apart.values():
        one["mean_levels"] /= count
    return apart


def compare(size: tuple[int, int], count: int, side: int, batch: int, options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), size, count)
        found = loaders(paths, side, batch, options.workers)
        passes = {name: lambda one=one: sum(len(rows["labels"]) for rows in one) for name, one in found.items()}
        seen = {name: run() for name, run in passes.items()}  # and starts the workers
        spent = timed(passes, options.rounds)
        apart = differences(found, "trl")
    wall = {name: percentiles(both[0]) for name, both in spent.items()}
    cpu = {name: percentiles(both[1])["p50_ms"] for name, both in spent.items()}
    return [
        {
            "files": f"{size[0]}x{size[1]}",
            "variant": name,
            "workers": options.workers,
            "images": seen[name],
            **wall[name],
            "images_per_s": 1e3 * seen[name] / wall[name]["p50_ms"],
            "times_trl": wall["trl"]["p50_ms"] / wall[name]["p50_ms"],
            "images_per_cpu_s": 1e3 * seen[name] / cpu[name],
            "times_trl_cpu": cpu["trl"] / cpu[name],
            **apart[name],
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "pillow": PIL.__version__,
            "torchvision": torchvision.__version__,
        }
        for name in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--images", type=int, default=None, help="files of each size (512 for full)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    shape = SIZES[options.size]
    rows = [
        row
        for size, count in shape["files"]
        for row in compare(size, options.images or count, shape["side"], shape["batch"], options)
    ]
    write("loader" if options.size == "full" else f"loader-{options.size}", rows, options.out)


if __name__ == "__main__":
    main()
