"""Whether the cells of the nano models say anything: alignment, then a clean stage 2 with plain cross-entropy, of each.

    python -m experiments.nano FOLDER [--models llava ...] [--tasks shapes ...] [--sizes s] [--sides 64] [--seeds 0]

Prints a line of JSON for each cell and seed, and keeps the alignments in FOLDER, where the experiments find them. Settings
are tried with ``--set joint=500 joint_rate=0.002``, fields of the plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from . import ANSWERS, MODELS, SIDES, SIZES, TASKS, Cell, aligned, counts, measure, trained
from .plan import plan_of


def looked_at(cell: Cell, seed: int, folder: Path, changes: dict[str, float], scale: str = "cpu") -> dict[str, Any]:
    """What a cell reaches: the facts of its alignment, ``accuracy`` of each kind of question on the test set after a clean
    stage 2, ``seconds`` of that stage, and whether the cell ``counts``."""
    plan = plan_of(cell, scale)
    types = {name: type(getattr(plan, name)) for name in changes}
    plan = dataclasses.replace(plan, **{name: types[name](value) for name, value in changes.items()})
    made = aligned(cell, seed, folder, scale, plan=plan)
    model, begun = made.model, time.monotonic()
    settings = {"steps": plan.tuning, "rate": plan.tuning_rate, "batch": plan.batch, "seed": seed}
    with tempfile.TemporaryDirectory() as place:
        trained(model, made.processor, made.train, place, weighting="uniform", **settings)
    seconds = round(time.monotonic() - begun, 1)
    exact = measure(model, made.processor, made.test)["exact"]
    kinds: dict[str, list[int]] = {}
    for one, right in zip(made.test, exact.tolist(), strict=True):
        kinds.setdefault(one["kind"], []).append(right)
    found = {kind: round(sum(right) / len(right), 4) for kind, right in sorted(kinds.items())}
    told = {"cell": str(cell), "seed": seed, "changes": changes, "aligned": made.facts, "accuracy": found}
    whole = float(exact.mean())
    return {**told, "all": round(whole, 4), "seconds": seconds, "counts": counts(made.facts, whole)}


def _change(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["llava"], choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--sizes", nargs="+", default=["s"], choices=SIZES)
    parser.add_argument("--sides", nargs="+", type=int, default=[64], choices=SIDES)
    parser.add_argument("--answers", nargs="+", default=["sentence"], choices=ANSWERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--set", nargs="+", type=_change, default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    axes = (options.models, options.tasks, options.sizes, options.sides, options.answers)
    for seed, values in itertools.product(options.seeds, itertools.product(*axes)):
        row = looked_at(Cell(*values), seed, options.folder, dict(options.set), options.scale)
        print(json.dumps(row), flush=True)
