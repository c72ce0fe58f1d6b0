"""Rows of experiments as a run would have left them, with effects that the test chooses."""

import zlib

import numpy as np
from experiments.items import packed

ITEMS = 40


def facts_of(visual=2.0, filler=0.2, commonest=0.3, accuracy=0.8, **more):
    calibration = {"alpha": 0.4, "beta": 2.5, "paper": {"at_alpha": 0.7, "at_beta": 0.05}}
    delta = {"visual": visual, "filler": filler}
    seconds = {"tower": 100.0, "joint": 200.0}
    return {
        "accuracy": accuracy, "commonest": commonest, "delta": delta, "cold": False, "seconds": seconds,
        "calibration": calibration, **more,
    }  # fmt: skip


def row_of(run, right=0.8, facts=None, scale="cpu", steps=None):
    """A row of a run: ``right`` of its items are answered, other ones in each seed."""
    draw = np.random.default_rng(zlib.crc32(repr((sorted(run.cell.items()), run.seed, run.noise)).encode()))
    exact = (draw.random(ITEMS) < right).astype(float)
    arrays = {"exact": exact, "nll_visual": 1.2 - exact, "nll_fitted": 1.1 - exact, "nll_filler": draw.random(ITEMS)}
    demo = run.cell["model"] == "demo"
    options = {key: 0.5 if value == "calibrated" else value for key, value in run.arm.options.items()}
    row = {
        "experiment": run.experiment, "key": run.key(scale, steps), "cell": dict(run.cell), "noise": run.noise,
        "seed": run.seed, "arm": run.name, "learning_rate": run.learning_rate, "scale": scale, "options": options,
        "facts": {"exact": 0.5} if demo else facts or facts_of(), "items": "same", "test": packed(arrays),
        "shares": {"at_alpha": 0.5, "inside": 0.4, "at_beta": 0.1} if run.name != "uniform" else {},
        "seconds": {"weighing": 0.0, "training": 60.0, "measuring": 6.0, "all": 70.0},
        "device": "a processor", "threads": 1, "torch": "2", "seecal": "0",
    }  # fmt: skip
    if not demo:
        row["validation"] = packed({key: arrays[key] for key in ("exact", "nll_visual", "nll_filler")})
    if run.arm.trace:
        quarters = {"visual_quartiles": [0.5, 1.0, 1.5], "filler_quartiles": [-0.1, 0.0, 0.1]}
        points = range(run.arm.trace + 1)
        row["trace"] = [{"step": step, "visual": 1.0 + step, "filler": 0.25, **quarters} for step in points]
    return row


def rows_of(plans, right=lambda run: 0.8, facts=lambda run: None):
    """key -> row of every run of the designs."""
    return {run.key(): row_of(run, right(run), facts(run)) for plan in plans for run in plan.runs}
