"""A whole training, loader included: SFTTrainer and CALTrainer on the same records with JPEG files, with the same labels.

sft           TRL's SFTTrainer with assistant_only_loss, on a ``datasets`` set whose ``image`` column decodes
mle           CALTrainer(weighting="uniform"), plain training, on the records as load_records gives them
cal           CALTrainer, the defaults
weights       CALTrainer with weights that were measured once before (``seecal train --weights``): no pass without the image

Each training is a process of its own, and the arms take turns, in an order drawn for each round. The same model of
random weights, batches, order, optimizer, checkpointed layers and loader workers; the first steps, in which workers
start, are not timed. ``samples_per_s`` and ``wait_share``, the share of the time spent waiting for the next batch, are of
the rest. ``peak_mib`` is the most that the training process had resident, imports included; ``workers_mib`` the most of
its workers together. ``of_sft`` are the ratios of single rounds. Label tokens are counted in every batch: exit code 1 if
an arm learnt from others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import device, percentiles, progress, shuffled, spread, write
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from loader import processor, write_files
from shapes import Shape, Vision, build
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

import seecal
from seecal import CALConfig, CALTrainer
from seecal.data.sources.load import load_records
from seecal.trainer.metrics import Waiting, host_memory

ARMS: dict[str, dict[str, Any]] = {"sft": {}, "mle": {"weighting": "uniform"}, "cal": {}, "weights": {}}


@dataclass(frozen=True)
class Size:
    """``repeats``: sentences of an answer, from the first up to the second. ``warmup``: steps that are not timed."""

    shape: Shape
    files: tuple[int, int]
    records: int
    batch: int
    repeats: tuple[int, int]
    warmup: int


def _shape(vision: Vision, **numbers: int) -> Shape:
    return Shape(heads=4, kv_heads=2, tied=True, tiles=1, batch=1, text=(1, 2), vision=vision, **numbers)


SIZES = {
    "tiny": Size(
        _shape(Vision(hidden=32, inter=64, layers=1, heads=2, image=32, patch=8), layers=2, hidden=32, inter=64, vocab=512),
        files=(96, 64), records=12, batch=4, repeats=(1, 6), warmup=1,
    ),
    # 3 M parameters and 196 image tokens: so small that the loader is felt
    "full": Size(
        _shape(
            Vision(hidden=128, inter=512, layers=2, heads=2, image=224, patch=16),
            layers=4, hidden=192, inter=512, vocab=4096,
        ),
        files=(640, 480), records=208, batch=8, repeats=(4, 24), warmup=2,
    ),
}  # fmt: skip
# TRL asks the template which tokens are the assistant's, ours takes its word too.
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if m.content is string else m.content[0].text }}<|end|>{% endgeneration %}\n{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def prepare(folder: Path, size: Size, count: int) -> float:
    """Files, ``records.jsonl``, the model and its scores under ``folder``. Returns records scored a second."""
    paths = write_files(folder, size.files, count)
    draw = random.Random(0)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for number, path in enumerate(paths):
            colours = draw.choices(("red", "green", "blue", "yellow"), k=draw.randrange(*size.repeats))
            answer = " ".join(f"It is {colour}." for colour in colours)
            turns = [
                {"role": "user", "content": "What colour is it?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"id": f"r{number}", "messages": turns, "images": [Path(path).name]}) + "\n")
    made = processor(size.shape.vision.image, size.shape.vision.patch, TEMPLATE)
    placeholder = made.tokenizer.get_vocab()["<image>"]
    build(size.shape, torch.device("cpu"), torch.float32, placeholder).save_pretrained(folder / "model")
    made.save_pretrained(folder / "model")
    begin = time.perf_counter()
    seecal.score(str(folder / "model"), folder / "records.jsonl", folder / "scores", batch_size=size.batch)
    return count / (time.perf_counter() - begin)


def decoded(folder: Path) -> Dataset:
    """The same records as TRL's documentation has them: a column ``image`` that decodes when it is read."""
    with (folder / "records.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [{"messages": row["messages"], "image": str(folder / row["images"][0])} for row in rows]
    turns = [{"role": Value("string"), "content": Value("string")}]
    return Dataset.from_list(rows, features=Features({"messages": turns, "image": ImageColumn()}))


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end of the training, and what the loader's workers hold."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.start, self.waited, self.workers = warmup, 0.0, 0.0, 0
        self.labels = 0
        self.seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        held = [psutil.Process(child.pid).memory_info().rss for child in multiprocessing.active_children()]
        self.workers = max(self.workers, sum(held))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == self.warmup:
            self.start, self.waited = time.perf_counter(), 0.0
        self.seconds = time.perf_counter() - self.start


def watched(kind: type, clock: Clock) -> type:
    """The trainer, with its waits for batches and their labels added up in ``clock``."""

    class Watched(kind):
        def get_batch_samples(self, epoch_iterator: Any, *args: Any) -> Any:
            waiting = Waiting(epoch_iterator)
            found = super().get_batch_samples(waiting, *args)
            clock.waited += waiting.seconds
            clock.labels += sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in found[0])
            return found

    return Watched


def train(arm: str, folder: Path, size: Size, workers: int) -> dict[str, float]:
    """One training, in this process."""
    clock = Clock(size.warmup)
    settings = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": size.batch, "num_train_epochs": 1,
        "dataloader_num_workers": workers, "dataloader_drop_last": True, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "learning_rate": 1e-4, "max_length": None,
        "bf16": torch.cuda.is_available(), "logging_steps": 10, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    model = str(folder / "model")
    if arm == "sft":
        config, data = SFTConfig(**settings, assistant_only_loss=True), decoded(folder)
        trainer = watched(SFTTrainer, clock)(model, config, train_dataset=data, callbacks=[clock])
    else:
        scores = {"weights": str(folder / "scores")} if arm == "weights" else {}
        config, data = CALConfig(**settings, **ARMS[arm], **scores), load_records(folder / "records.jsonl")
        trainer = watched(CALTrainer, clock)(model, config, train_dataset=data, callbacks=[clock])
    steps = trainer.train().global_step
    return {
        "samples_per_s": (steps - size.warmup) * size.batch / clock.seconds,
        "wait_share": clock.waited / clock.seconds,
        "peak_mib": host_memory().get("peak", 0) / 2**20,
        "workers_mib": clock.workers / 2**20,
        "label_tokens": clock.labels,
    }


def in_a_process(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """:func:`train` in a process of its own. RuntimeError with the end of what it said if it fails."""
    report = folder / "report.json"
    command = [sys.executable, __file__, "--size", options.size, "--workers", str(options.workers)]
    done = subprocess.run(
        [*command, "--arm", arm, "--folder", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the training of {arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(report.read_text(encoding="utf-8"))


def rows_of(arms: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    size = SIZES[options.size]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as name, progress() as shown:
        folder = Path(name)
        scored = prepare(folder, size, options.records or size.records)
        with shown.task("training", options.rounds * len(arms), unit="run") as task:
            for turn in range(options.rounds):
                for arm in shuffled(arms, turn):
                    found[arm].append(in_a_process(arm, folder, options))
                    task.advance(note=arm)
    seconds = {arm: [1 / run["samples_per_s"] for run in runs] for arm, runs in found.items()}
    rows = []
    for arm, runs in found.items():
        row: dict[str, Any] = {"variant": arm, "rounds": len(runs), "workers": options.workers}
        for key, decimals in (("samples_per_s", 2), ("wait_share", 4), ("peak_mib", 0), ("workers_mib", 0)):
            spots = percentiles([run[key] for run in runs])
            row |= {f"{key}_{spot.removesuffix('_ms')}": round(value, decimals) for spot, value in spots.items()}
        against = spread(seconds[arm], seconds["sft"]) if "sft" in seconds else {}
        row |= {f"of_sft_{spot}": round(against[spot], 4) if against else "" for spot in ("p20", "p50", "p80")}
        row["label_tokens"] = int(runs[0]["label_tokens"])
        row["scored_per_s"] = round(scored, 2) if arm == "weights" else ""
        rows.append(row | {"cores": os.cpu_count()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated, of those above")
    parser.add_argument("--records", type=int, default=None, help=f"records ({SIZES['full'].records} for full)")
    parser.add_argument("--workers", type=int, default=1, help="of the loader")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        found = train(options.arm, options.folder, SIZES[options.size], options.workers)
        (options.folder / "report.json").write_text(json.dumps(found), encoding="utf-8")
        return
    arms = options.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: there is no {', '.join(unknown)}; there are {', '.join(ARMS)}")
    rows = rows_of(arms, options)
    kind = "-tiny" if options.size == "tiny" else "-cpu" if device().type == "cpu" else ""
    write(f"trainer{kind}", rows, options.out)
    labels = {row["variant"]: row["label_tokens"] for row in rows}
    if len(set(labels.values())) > 1:
        sys.exit(f"the arms learnt from other labels: {labels}; their figures are not comparable")


if __name__ == "__main__":
    main()
