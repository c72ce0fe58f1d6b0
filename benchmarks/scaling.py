"""What CAL costs as one thing grows and the others stay: text length, image tokens, batch, vocabulary.

Rows are those of step.py for hf, mle (ours, plain) and cal (ours), each beside its floor. On a GPU the base is a quarter
of a 7B model (8 of 32 layers, full width), so head and vision tower weigh four times as much as in the whole; the
floors know that. Written after every point, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch
from common import arguments, write
from shapes import SHAPES, Shape
from step import measure

VARIANTS = ("hf", "mle", "cal")


def around(mean: int) -> tuple[int, int]:
    """Text from a third of the mean to five thirds, as 100 to 500 is around 300."""
    return mean // 3, mean * 5 // 3


GPU = dataclasses.replace(SHAPES["llava-1.5-7b"], layers=8, batch=4)
# Axis -> values; the first value of each is the base's own. Only the vocabulary needs another model.
AXES = {
    "gpu": {"text": [300, 100, 900], "image": [576, 1152, 2880], "batch": [4, 8, 16], "vocabulary": [32064, 151936]},
    "tiny": {"text": [39, 120], "image": [64, 192], "batch": [4, 8], "vocabulary": [4096, 8192]},
}
BASES = {"gpu": GPU, "tiny": dataclasses.replace(SHAPES["tiny"], text=around(39))}


def at(base: Shape, axis: str, value: int) -> Shape:
    changed: dict[str, Any] = {
        "text": {"text": around(value)},
        "image": {"tiles": value // base.vision.tokens},
        "batch": {"batch": value},
        "vocabulary": {"vocab": value},
    }[axis]
    return dataclasses.replace(base, **changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=BASES, default="gpu" if torch.cuda.is_available() else "tiny")
    arguments(parser, rounds=3)
    options = parser.parse_args()
    base, begin = BASES[options.size], time.monotonic()
    rows: list[dict[str, Any]] = []
    points = [(axis, value) for axis, values in AXES[options.size].items() for value in values]
    model, vocab = None, None
    measured: dict[Shape, list[dict[str, Any]]] = {}  # the base stands in every axis
    for axis, value in points:
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            print(f"time was up before {axis} = {value}")
            break
        shape = at(base, axis, value)
        if shape not in measured and shape.vocab != vocab:
            model, vocab = None, shape.vocab  # let go of the old weights before there are new ones
        if shape not in measured:
            measured[shape], model = measure(shape, list(VARIANTS), options.rounds, None, model)
        rows += [{"axis": axis, "value": value, **row} for row in measured[shape]]
        write(f"scaling-{options.size}", rows, options.out, show=False)
    write(f"scaling-{options.size}", rows, options.out)


if __name__ == "__main__":
    main()
