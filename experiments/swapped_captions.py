"""Does `seecal filter` find captions that belong to another image? swapped_captions.yaml has what was expected.

    python -m experiments.swapped_captions SEECAL-DEMO [--limit N]

SEECAL-DEMO is the folder that `seecal demo` leaves. Runs that have their row are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import seecal
from seecal.demo import emoji, files
from seecal.demo.compute import bf16_pays, precision
from seecal.scoring import RecordScores, read_manifest, read_scores

from .rows import Rows, rounded
from .statistics import grouped_auroc, grouped_share

SEEDS = range(5)
MODELS = {"after stage 1": "run/stage-1/model", "after stage 2": "run/final"}
SHARE = 0.1


def described(demo: Path, limit: int | None) -> list[tuple[emoji.Emoji, Path, emoji.Answer]]:
    """Unseen drawings, the splits in turn, each with its true description."""
    paths = {item.hexcode: demo / "images" / f"{emoji.slug(item.name)}.png" for item in emoji.catalogue()}
    items = [item for item in emoji.catalogue() if paths[item.hexcode].exists()]
    found = []
    for split in (emoji.HELD_IMAGE, emoji.HELD_CONCEPT):
        shown = files.held_out(items, split, len(items))[: None if limit is None else max(limit // 2, 1)]
        found += [(item, paths[item.hexcode], emoji.answer(item, "describe", random.Random(1))) for item in shown]
    return found


def swapped(items: list[emoji.Emoji], seed: int) -> dict[int, int]:
    """record -> record whose caption it gets, for a tenth of them; never one of its own kind of thing."""
    if len({item.kind for item in items}) < 3:
        raise ValueError("the drawings are of one or two kinds, so a caption of another kind cannot be found for each")
    rng = random.Random(seed)
    chosen = rng.sample(range(len(items)), max(round(SHARE * len(items)), 2))
    while True:  # ends: a tenth of the drawings are of many kinds, none of most of them
        others = rng.sample(chosen, len(chosen))
        if all(items[one].kind != items[other].kind for one, other in zip(chosen, others, strict=True)):
            return dict(zip(chosen, others, strict=True))
        if rng.random() < 0.01:  # more than half of one kind, in a small sample: another one
            chosen = rng.sample(range(len(items)), len(chosen))


def scores_of(record: RecordScores) -> dict[str, float]:
    """Higher: the caption fits. What the rules of `seecal filter` look at."""
    columns = record.columns
    delta = columns["delta"].astype(np.float64)
    gain = columns["logprob_with"].astype(np.float64) - columns["logprob_without"]
    return {"delta": float(delta.mean()), "gain": float(gain.mean()), "contradictory": -float((delta < -1).mean())}


def run(demo: Path, limit: int | None, rows: Rows) -> None:
    """All that is missing of the experiment."""
    known = described(demo, limit)
    for name, folder in MODELS.items():
        if not rows.has(model=name, records=len(known), endpoint="auroc", rule="contradictory"):
            for row in measured(name, demo / folder, known):
                told = {key: row[key] for key in ("model", "records", "endpoint", "rule")}
                if not rows.has(**told):  # a run that was stopped between its rows has left the first of them
                    rows.add(row)


def measured(name: str, model: Path, known: list[tuple[emoji.Emoji, Path, emoji.Answer]]) -> list[dict[str, Any]]:
    """The rows of one model."""
    begun, (bf16, _), items = time.monotonic(), bf16_pays(), [item for item, _, _ in known]
    found: dict[str, list[float]] = {rule: [] for rule in ("delta", "gain", "contradictory")}
    planted: list[bool] = []
    removed: dict[str, list[bool]] = {"delta": [], "gain": []}
    for seed in SEEDS:
        plan = swapped(items, seed)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            data, scores = str(write(place / "data.json", known, plan)), place / "scores"
            with precision(torch.device("cpu"), bf16):
                seecal.score(str(model), data, scores, image_root="/", logprobs=True, batch_size=16)
            digest = str(read_manifest(scores).model["weights"])
            for record in read_scores(scores):
                assert isinstance(record, RecordScores)
                for rule, value in scores_of(record).items():
                    found[rule].append(value)
            planted += [number in plan for number in range(len(items))]
            for rule in removed:
                removed[rule] += filtered(place, rule, len(items))
    group, wrong = np.tile(np.arange(len(items)), len(SEEDS)), np.array(planted)
    told = {"experiment": "swapped_captions", "model": name, "weights": digest, "records": len(items)}
    told |= {"seeds": len(SEEDS), "planted": int(wrong.sum()), "bfloat16": bf16}
    told |= {"seecal": seecal.__version__, "torch": torch.__version__, "seconds": round(time.monotonic() - begun)}
    rows = []
    for rule, gone in removed.items():
        share = grouped_share(np.array(gone)[wrong].astype(float), group[wrong])
        rows.append({**told, "endpoint": "found in the tenth removed", "rule": rule, **rounded(share)})
    for rule, values in found.items():
        value = np.array(values)
        interval = grouped_auroc(value[~wrong], group[~wrong], value[wrong], group[wrong])
        rows.append({**told, "endpoint": "auroc", "rule": rule, **rounded(interval)})
    return rows


def write(path: Path, known: list[tuple[emoji.Emoji, Path, emoji.Answer]], plan: dict[int, int]) -> Path:
    """The records, with the captions of ``plan`` exchanged."""
    asked = {
        f"{number}-{item.hexcode}": (image.resolve(), known[plan.get(number, number)][2])
        for number, (item, image, _) in enumerate(known)
    }
    files.write_records(path, asked)
    made = json.loads(path.read_text("utf8"))
    for row, (image, _) in zip(made, asked.values(), strict=True):
        row["image"] = str(image)
    path.write_text(json.dumps(made), "utf8")
    return path


def filtered(place: Path, rule: str, count: int) -> list[bool]:
    """For each record whether `seecal filter --top 0.9` removes it."""
    out = place / f"kept-{rule}.json"
    seecal.filter(place / "scores", out, top=1 - SHARE, by=rule, image_root="/")
    lines = (json.loads(line) for line in Path(f"{out}.removed.jsonl").read_text("utf8").splitlines())
    gone: set[Any] = {line["row"] for line in lines}
    return [number in gone for number in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="records; all unseen drawings if not given")
    options = parser.parse_args()
    run(options.demo.resolve(), options.limit, Rows("swapped_captions"))
