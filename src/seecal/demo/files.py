"""What ``seecal demo`` writes before it trains, as a user would: ``data.json``, ``eval.json`` and ``recipe.yaml``."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import emoji
from .emoji import Answer, Emoji
from .plan import Plan

HELD_OUT = (emoji.HELD_IMAGE, emoji.HELD_CONCEPT)
MIX = {"name": 5, "kind": 2, "describe": 3}  # how often a training batch asks which question
Asked = dict[tuple[str, str], list[tuple[Path, Answer]]]  # (split, question) -> (image, true answer)


def questions(items: Sequence[Emoji], steps: int, batch_size: int, seed: int) -> list[tuple[Emoji, Answer]]:
    """The questions of so many steps about the drawings to train on, in an order that depends on the seed only.

    The first steps are the same however many follow. Each batch asks one kind of question: one long answer would pad all
    the short ones.
    """
    rng = random.Random(seed)
    train = emoji.by_split(items, emoji.TRAIN)
    queue: list[Emoji] = []
    found: list[tuple[Emoji, Answer]] = []
    for _ in range(steps):
        question = rng.choices(list(MIX), list(MIX.values()))[0]
        while len(queue) < batch_size:
            queue += rng.sample(train, len(train))
        batch, queue = queue[:batch_size], queue[batch_size:]
        found += [(item, emoji.answer(item, question, rng)) for item in batch]
    return found


def held_out(items: Sequence[Emoji], split: str, count: int) -> list[Emoji]:
    """The first ``count`` of a split in an order that has nothing to do with code points or names."""
    return sorted(emoji.by_split(items, split), key=lambda item: random.Random(item.hexcode).random())[:count]


def write_data(path: Path, asked: Sequence[tuple[Emoji, Answer]], images: Mapping[str, Path]) -> None:
    """Training records in LLaVA's format, image paths relative to the file."""
    _write(path, [_row(f"{i}-{item.hexcode}", images[item.hexcode], answer) for i, (item, answer) in enumerate(asked)])


def write_eval(path: Path, shown: Mapping[str, Sequence[Emoji]], images: Mapping[str, Path]) -> None:
    """The held-out questions, name and kind of each drawing in ``shown`` (split -> drawings). The id says which."""
    rows = []
    for split, items in shown.items():
        for question in ("name", "kind"):
            for item in items:
                answer = emoji.answer(item, question, random.Random(0))
                rows.append(_row(f"{split}/{question}/{item.hexcode}", images[item.hexcode], answer))
    _write(path, rows)


def write_records(path: Path, asked: Mapping[str, tuple[Path, Answer]]) -> None:
    """Records in LLaVA's format: id -> (image, the question with its true answer)."""
    _write(path, [_row(name, image, answer) for name, (image, answer) in asked.items()])


def read_eval(path: Path) -> Asked:
    """What :func:`write_eval` wrote: these answers are words of the image from end to end."""
    found: Asked = {}
    for row in json.loads(path.read_text("utf8")):
        split, question, _ = row["id"].split("/")
        asked, reply = (turn["value"] for turn in row["conversations"])
        answer = Answer(asked.removeprefix("<image>\n"), ((reply, True),))
        found.setdefault((split, question), []).append((path.parent / row["image"], answer))
    return found


def _row(name: str, image: Path, answer: Answer) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{answer.question}"}, {"from": "gpt", "value": answer.text}]
    return {"id": name, "image": f"{image.parent.name}/{image.name}", "conversations": turns}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", "utf8")


@dataclass(frozen=True)
class Part:
    """A recipe of the demo's by the names that it reads and writes below the demo's folder, and its stages."""

    file: str = "recipe.yaml"
    model: str = "start"
    data: str = "data.json"
    run: str = "run"
    stages: tuple[str, ...] = ("align", "tune")


def recipe(
    out: Path,
    plan: Plan,
    *,
    batch_size: int,
    weighting: str,
    seed: int,
    on_cpu: bool,
    bf16: bool,
    part: Part | None = None,
    tune: Mapping[str, Any] | None = None,
) -> str:
    """The recipe of the demo, with comments.

    Args:
        part: of the demo; None: both stages in one recipe.
        tune: settings of stage 2 that replace the demo's or come to them.
    """
    part = part or Part()
    names = ("eval.json", "mine", part.file, part.model, part.data, part.run)
    quoted = {name: json.dumps(str(out / name)) for name in names}
    comes = "as they come" if part.model == "start" else "trained so far"
    head = f"""\
# Written by seecal demo. Change what you like and run it again, into a folder of its own:
#   seecal train --config {quoted[part.file]} --output_dir {quoted["mine"]}
# {plan.why}

model: {quoted[part.model]} # EfficientNet-lite0, a projector, SmolLM2-135M, {comes}
data: {quoted[part.data]}
# eval_data: {quoted["eval.json"]} # the demo measures these itself, apart for each kind of question
output_dir: {quoted[part.run]}

use_cpu: {_yaml(on_cpu)}
bf16: {_yaml(bf16)} # what is faster here
gradient_checkpointing: false
per_device_train_batch_size: {batch_size}
train_sampling_strategy: sequential # the data are in their order: each batch asks one kind of question
cache_vision_features: true # the tower is frozen: it runs once for each image
lr_scheduler_type: cosine
logging_steps: 1
save_strategy: "no" # Ctrl-C saves a checkpoint all the same; --resume goes on there
dataloader_pin_memory: false
max_length: null
report_to: none
seed: {seed}
data_seed: {seed}

stages:
"""
    stages = {"align": _ALIGN.format(warmup=_warmup(plan.align_steps), steps=plan.align_steps)}
    settings = {"learning_rate": "3.0e-4", **(tune or {})}
    stages["tune"] = _TUNE.format(
        name=Path(part.run).name if part.stages == ("tune",) else "tune",  # which of several it is
        weighting=weighting,
        warmup=_warmup(plan.tune_steps),
        steps=plan.tune_steps,
        settings="".join(f"\n    {name}: {_yaml(value)}" for name, value in settings.items()),
    )
    return head + "".join(stages[name] for name in part.stages)


_ALIGN = """\
  - name: align
    train: projector
    weighting: uniform # before the language model can read the image tokens, Δ says little
    learning_rate: 5.0e-4
    warmup_steps: {warmup} # below 1: a share of all steps
    max_steps: {steps}
"""
_TUNE = """\
  - name: {name}
    train: [projector, language_model]
    freeze: embeddings # the word table, also the output layer: a fifth of all parameters, half of the time of a step
    weighting: {weighting}{settings}
    warmup_steps: {warmup}
    max_steps: {steps}
"""


def _warmup(steps: int) -> float:
    """The first step of a warm-up is at a learning rate of 0: of few steps that is too much to lose."""
    return 0.05 if steps >= 10 else 0


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_model(folder: Path, model: Any, processor: Any) -> None:
    """A model and its processor in a folder that is there when it is whole; what a stopped run left of one goes."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    aside.rename(folder)
