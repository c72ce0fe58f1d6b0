"""A JSONL file of a million records: what opening it costs, and whether memory stays flat while batches are made of it.

open          CPU seconds of load_records on one core, and the resident set after it
collate       4,000 batches in random order through VisionCollator; the resident set and its slope over the last 2,000
alone         the index without torch, in a process of its own: its resident set while it is opened and 4,000 batches of
              rows are read in random order, and the slope over the last 2,000

Three of four records have an image, one of eight files; the others are text. ``resident`` holds the pages of the mapped
Arrow file that have been read and that the system may take back, ``anonymous`` does not: it is what a leak would show in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import progress, write
from PIL import Image
from torch.utils.data import DataLoader

from seecal.data.collators.vision import VisionCollator
from seecal.data.sources.load import load_records
from seecal.recipes.tiny import tiny_llava_processor
from seecal.trainer.metrics import host_memory

SIZES = {"tiny": {"records": 2_000, "steps": 60}, "full": {"records": 1_000_000, "steps": 4_000}}
_WORDS = (
    "a",
    "the",
    "image",
    "shows",
    "red",
    "green",
    "car",
    "on",
    "street",
    "with",
    "two",
    "people",
    "who",
    "walk",
    "left",
)
_EVERY = 20  # steps between two looks at the memory


def write_records(folder: Path, count: int) -> Path:
    """About 290 bytes a record, in LLaVA's format."""
    names = [f"{number}.jpg" for number in range(8)]
    for number, name in enumerate(names):
        Image.new("RGB", (64, 48), (30 * number, 90, 200)).save(folder / name)
    draw, path = random.Random(0), folder / "data.jsonl"
    with (
        path.open("w", encoding="utf-8") as file,
        progress() as shown,
        shown.task("writing", count, unit="record") as task,
    ):
        for index in range(count):
            image = {"image": names[index % 8]} if index % 4 != 3 else {}
            question = ("<image>\n" if image else "") + " ".join(draw.choices(_WORDS, k=12)) + "?"
            answer = " ".join(draw.choices(_WORDS, k=25)) + "."
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"r{index}", "conversations": turns, **image}) + "\n")
            if index % 10_000 == 0:
                task.advance(min(10_000, count - index))
    return path


def slope(places: list[int], values: list[float]) -> float:
    """Least squares: by how much ``values`` grow from one place to the next."""
    middle, mean = sum(places) / len(places), sum(values) / len(values)
    over = sum((place - middle) ** 2 for place in places)
    return sum((place - middle) * (value - mean) for place, value in zip(places, values, strict=True)) / over


def opened(path: Path, count: int) -> tuple[Any, dict[str, Any]]:
    """(the records, what opening them cost)."""
    before, wall, cpu = host_memory(), time.perf_counter(), time.process_time()
    records = load_records(path)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after = host_memory()
    assert len(records) == count
    return records, {
        "records": count,
        "file_mib": path.stat().st_size / 2**20,
        "open_cpu_s": cpu,
        "open_wall_s": wall,
        "records_per_cpu_s": count / cpu,
        "before_mib": before["resident"] / 2**20,
        "opened_mib": after["resident"] / 2**20,
    }


def collated(records: Any, steps: int, batch: int) -> dict[str, Any]:
    """How the memory of this process grows over ``steps`` batches; the slopes are of their second half."""
    data = DataLoader(
        records, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0),
        collate_fn=VisionCollator(tiny_llava_processor()),
    )  # fmt: skip
    places: list[int] = []
    looks: list[dict[str, int]] = []
    with progress() as shown, shown.task("collating", steps, unit="step") as task:
        for step, _ in zip(range(1, steps + 1), data, strict=False):
            task.advance()
            if step % _EVERY == 0:
                places.append(step)
                looks.append(host_memory())
    half = len(looks) // 2
    found: dict[str, Any] = {"steps": steps, "batch": batch, "peak_mib": looks[-1]["peak"] / 2**20}
    for name in ("resident", "anonymous"):
        kib = [look[name] / 1024 for look in looks]
        found |= {f"{name}_mib": kib[-1] / 1024, f"{name}_kib_per_step": slope(places[half:], kib[half:])}
    return found


_ALONE = """
import json, random, sys
from seecal.data.sources.load import load_records

def resident():
    with open("/proc/self/status", encoding="ascii") as file:
        return {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(("VmRSS", "VmHWM"))}

path, steps, batch, every = sys.argv[1], *map(int, sys.argv[2:])
records, draw = load_records(path), random.Random(0)
opened, looks = resident(), []
for step in range(1, steps + 1):
    records.__getitems__(draw.sample(range(len(records)), batch))
    if step % every == 0:
        looks.append(resident())
assert "torch" not in sys.modules
print(json.dumps({"opened": opened, "looks": looks}))
"""


def alone(path: Path, steps: int, batch: int) -> dict[str, Any]:
    """The resident set of a process that has the index and no torch, in MiB, and its growth in KiB a batch of rows read."""
    command = [sys.executable, "-c", _ALONE, str(path), *map(str, (steps, batch, _EVERY))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    kib = [float(look["VmRSS"]) for look in found["looks"]]
    places, half = [_EVERY * (number + 1) for number in range(len(kib))], len(kib) // 2
    return {
        "alone_opened_mib": found["opened"]["VmHWM"] / 1024,
        "alone_peak_mib": found["looks"][-1]["VmHWM"] / 1024,
        "alone_kib_per_step": slope(places[half:], kib[half:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--records", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[options.size]
    count, steps = options.records or size["records"], options.steps or size["steps"]
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(Path(folder), count)
        records, row = opened(path, count)
        row |= collated(records, steps, options.batch) | alone(path, steps, options.batch)
    row |= {"cores": os.cpu_count()}
    write("records_index" if options.size == "full" else f"records_index-{options.size}", [row], options.out)


if __name__ == "__main__":
    main()
