"""Questions about one coloured shape: easy-vqa 1.0 (Victor Zhou, MIT), its own training and test images of 64 pixels."""

from __future__ import annotations

import functools
import importlib
import random
from typing import Any

from PIL import Image

from ..records import Record, phrases, record

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES}
_CORES = {"colour": "the shape is {%s}", "shape": "it shows a {%s}", "yes or no": "the answer is {%s}"}
# Of the training images; the rest is for validation
_PARTS = {"align": (0.0, 0.4), "train": (0.4, 0.9), "validation": (0.9, 1.0)}


def texts() -> list[str]:
    cores = [core.replace("{%s}", " ") for core in _CORES.values()]
    asked = [question for which in ("train", "test") for question, _, _ in _questions(which)]
    return [*asked, *cores, phrases(), "yes no", *COLOURS, *SHAPES]


def held_out(one: Record) -> None:
    """Nothing but the pictures themselves."""


def records(split: str, count: int, seed: int, side: int, answers: str) -> list[Record]:
    """Two thirds ask for a colour or a shape, the others are answered by yes or no: in the published set those are four of
    five, and hide the rest."""
    which = "test" if split == "test" else "train"
    images = sorted({image for _, _, image in _questions(which)})
    rng = random.Random(f"shapes {split if split == 'test' else seed}")
    rng.shuffle(images)
    if split != "test":
        low, high = (round(len(images) * part) for part in _PARTS[split])
        images = images[low:high]
    chosen, rng = set(images), random.Random(f"shapes {split} {'' if split == 'test' else seed}")
    asked = [one for one in _questions(which) if one[2] in chosen]
    rng.shuffle(asked)
    open_ones = [one for one in asked if one[1] not in ("yes", "no")][: round(count * 2 / 3)]
    closed = [one for one in asked if one[1] in ("yes", "no")][: count - len(open_ones)]
    mixed = open_ones + closed
    rng.shuffle(mixed)
    return [_record(which, number, one, side, answers, rng) for number, one in enumerate(mixed)]


def _record(
    which: str, number: int, asked: tuple[str, str, int], side: int, answers: str, rng: random.Random
) -> Record:
    question, answer, image = asked
    kind = "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes or no"
    known = _known(which).get(image, {})
    attributes = {name: values.index(known[name]) if name in known else -100 for name, values in ATTRIBUTES.items()}
    shown = _picture(which, image, side)
    name = f"{which}-{image}-{number}"
    return record(name, kind, question, _CORES[kind] % answer, shown, answers, rng, attributes=attributes)


def _package() -> Any:
    try:
        return importlib.import_module("easy_vqa")
    except ImportError:
        raise ImportError(
            "the task 'shapes' needs easy-vqa, which is not installed. Run pip install 'seecal[experiments]'"
        ) from None


@functools.cache
def _questions(which: str) -> list[tuple[str, str, int]]:
    """(question, answer, image)."""
    questions, answers, images = getattr(_package(), f"get_{which}_questions")()
    return list(zip(questions, answers, images, strict=True))


@functools.cache
def _known(which: str) -> dict[int, dict[str, str]]:
    """What the open questions tell of each image."""
    known: dict[int, dict[str, str]] = {}
    for _, answer, image in _questions(which):
        for name, values in ATTRIBUTES.items():
            if answer in values:
                known.setdefault(image, {})[name] = answer
    return known


@functools.cache
def _paths(which: str) -> dict[int, str]:
    return getattr(_package(), f"get_{which}_image_paths")()


@functools.lru_cache(maxsize=8000)
def _picture(which: str, image: int, side: int) -> Image.Image:
    with Image.open(_paths(which)[image]) as file:
        shown = file.convert("RGB")
    return shown if shown.size == (side, side) else shown.resize((side, side), Image.Resampling.BICUBIC)
