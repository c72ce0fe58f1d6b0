"""Does Δ tell visual from irrelevant tokens, and wrong from right ones? token_kinds.yaml has what was expected.

    python -m experiments.token_kinds SEECAL-DEMO [--limit N]

SEECAL-DEMO is the folder that `seecal demo` leaves. Runs that have their row are not made again.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import seecal
from seecal import CALOptions
from seecal.demo import emoji, files
from seecal.demo.compute import bf16_pays, precision
from seecal.demo.emoji import Answer, Emoji
from seecal.scoring import RecordScores, read_manifest, read_scores

from .rows import Rows, rounded
from .statistics import grouped_auroc
from .swapped_captions import MODELS

CONTRASTS = ("drop", "mask", "blur", "noise")
WEIGHTINGS = ("cal", "negative", "vig")
COLOURS = {"red": 0.0, "yellow": 0.15, "green": 0.33, "blue": 0.58, "purple": 0.78}
NUMBERS = ("one", "two", "three", "four")
DRAWINGS = {emoji.HELD_IMAGE: 120, emoji.HELD_CONCEPT: 60}
Pieces = tuple[tuple[str, str], ...]  # (text, "visual", "filler", "right", "wrong" or "")


@dataclass(frozen=True)
class Case:
    """A caption of a drawing.

    Attributes:
        kind: "caption", or what is planted.
        drawing: which, as a number.
        image: a file.
        pieces: of the caption, with their labels.
    """

    kind: str
    drawing: int
    image: Path
    pieces: Pieces

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def cases(demo: Path, folder: Path, limit: int | None) -> list[Case]:
    """Every caption, right ones and wrong ones; ``folder`` takes the drawings pasted together."""
    paths = {item.hexcode: demo / "images" / f"{emoji.slug(item.name)}.png" for item in emoji.catalogue()}
    items = [item for item in emoji.catalogue() if paths[item.hexcode].exists()]
    found: list[Case] = []
    number = 0
    for split, count in DRAWINGS.items():
        shown = files.held_out(items, split, count if limit is None else min(count, limit))
        for item in shown:
            rng = random.Random(item.hexcode)
            found += of_drawing(number, item, paths[item.hexcode].resolve(), shown, folder, rng)
            number += 1
    return found


def of_drawing(
    number: int, item: Emoji, image: Path, others: list[Emoji], folder: Path, rng: random.Random
) -> Iterator[Case]:
    """The captions of one drawing."""
    answer = emoji.answer(item, "describe", random.Random(1))
    yield Case("caption", number, image, tuple((text, "visual" if seen else "filler") for text, seen in answer.pieces))
    strangers = [other for other in others if other.kind != item.kind]
    if strangers:
        other = rng.choice(strangers)
        for kind, right, wrong in (("object", item.name, other.name), ("kind", item.kind, other.kind)):
            yield from pair(kind, number, image, answer, right, wrong)
    kind = item.kind
    for label, text in (("right", kind), ("wrong", f"not {kind}")):
        yield Case("negation", number, image, (("It is ", ""), (text, label), (".", "")))
    if (hue := clear_hue(image)) is not None:
        for label, colour in (("right", hue), ("wrong", rng.choice([one for one in COLOURS if one != hue]))):
            yield Case(
                "colour", number, image, ((answer.text + " Its main colour is ", ""), (colour, label), (".", ""))
            )
    count = rng.randrange(len(NUMBERS))
    pasted = paste(image, count + 1, folder / f"{number}.png")
    other_count = rng.choice([one for one in range(len(NUMBERS)) if one != count])
    for label, place in (("right", count), ("wrong", other_count)):
        yield Case(
            "count", number, pasted, (("The number of them in the picture is ", ""), (NUMBERS[place], label), (".", ""))
        )


def pair(kind: str, number: int, image: Path, answer: Answer, right: str, wrong: str) -> Iterator[Case]:
    """The caption with ``right`` marked, and with ``wrong`` in its place; nothing else differs."""
    for label, text in (("right", right), ("wrong", wrong)):
        done, pieces = False, []
        for piece, seen in answer.pieces:
            here = seen and piece == right and not done
            done = done or here
            pieces.append((text if here else piece, label if here else ""))
        if done:
            yield Case(kind, number, image, tuple(pieces))


def clear_hue(image: Path) -> str | None:
    """The colour of which a drawing has much more than of any other; None where there is none."""
    pixels = np.asarray(Image.open(image).convert("RGB").resize((48, 48))).reshape(-1, 3) / 255
    counts = dict.fromkeys(COLOURS, 0)
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        if saturation > 0.35 and value > 0.3:
            nearest = min(COLOURS, key=lambda name: min(abs(COLOURS[name] - hue), 1 - abs(COLOURS[name] - hue)))
            counts[nearest] += 1
    first, second = sorted(counts.values(), reverse=True)[:2]
    return max(counts, key=lambda name: counts[name]) if first > 150 and first > 3 * second else None


def paste(image: Path, count: int, out: Path) -> Path:
    """One to four of the drawing on white."""
    drawing = Image.open(image).convert("RGB").resize((112, 112))
    canvas = Image.new("RGB", (224, 224), "white")
    for place in range(count):
        canvas.paste(drawing, (112 * (place % 2), 112 * (place // 2)))
    canvas.save(out)
    return out


@dataclass
class Tokens:
    """Values of the tokens of one label, and the drawing that each is of."""

    values: list[float]
    drawings: list[int]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.values, dtype=np.float64), np.array(self.drawings, dtype=np.int64)


def by_label(case: Case, record: RecordScores, column: str) -> Iterator[tuple[str, float]]:
    """(label, value) of each token that starts in a labelled piece (blanks before it aside)."""
    ends = np.cumsum([len(text) for text, _ in case.pieces])
    starts, stops = record.columns["start"], record.columns["stop"]
    for value, start, stop in zip(record.columns[column], starts, stops, strict=True):
        if start == stop:
            continue
        inside = case.text[start:stop]
        first = start + len(inside) - len(inside.lstrip())
        label = case.pieces[int(np.searchsorted(ends, min(first, stop - 1), side="right"))][1]
        if label:
            yield label, float(value)


def measured(
    model: Path, found: list[Case], contrast: str, weighting: str, bf16: bool
) -> tuple[dict[tuple[str, str, str], Tokens], str]:
    """((kind of case, label, "delta" or "weight") -> tokens, digest of the model)."""
    tokens: dict[tuple[str, str, str], Tokens] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data.json"
        turns = [
            [{"from": "human", "value": f"<image>\n{emoji.QUESTIONS['describe']}"}, {"from": "gpt", "value": case.text}]
            for case in found
        ]
        rows = [
            {"id": str(number), "image": str(case.image), "conversations": chat}
            for number, (case, chat) in enumerate(zip(found, turns, strict=True))
        ]
        data.write_text(json.dumps(rows), "utf8")
        options = CALOptions(contrast=contrast, weighting=weighting)
        with precision(torch.device("cpu"), bf16):
            seecal.score(str(model), str(data), Path(place) / "scores", options=options, image_root="/", batch_size=16)
        digest = str(read_manifest(Path(place) / "scores").model["weights"])
        for case, record in zip(found, read_scores(Path(place) / "scores"), strict=True):
            assert isinstance(record, RecordScores)
            for column in ("delta", "weight"):
                for label, value in by_label(case, record, column):
                    entry = tokens.setdefault((case.kind, label, column), Tokens([], []))
                    entry.values.append(value)
                    entry.drawings.append(case.drawing)
    return tokens, digest


def run(demo: Path, limit: int | None, rows: Rows) -> None:
    """All that is missing of the experiment."""
    bf16, _ = bf16_pays()
    with tempfile.TemporaryDirectory() as folder:
        found = cases(demo, Path(folder), limit)
        drawings = len({case.drawing for case in found})
        plans = [(contrast, "cal") for contrast in CONTRASTS] + [("drop", weighting) for weighting in WEIGHTINGS[1:]]
        for name, model in MODELS.items():
            for contrast, weighting in plans:
                keys = {"model": name, "contrast": contrast, "weighting": weighting, "drawings": drawings}
                if rows.has(**keys, endpoint="visual against irrelevant"):
                    continue
                begun = time.monotonic()
                tokens, digest = measured(demo / model, found, contrast, weighting, bf16)
                told = {"experiment": "token_kinds", **keys, "weights": digest, "bfloat16": bf16}
                told |= {
                    "seecal": seecal.__version__,
                    "torch": torch.__version__,
                    "seconds": round(time.monotonic() - begun),
                }
                for row in endpoints(tokens):
                    rows.add({**told, **row})


def endpoints(tokens: dict[tuple[str, str, str], Tokens]) -> list[dict[str, Any]]:
    """One row an endpoint and column; the primary one last, so that it says that the run is whole."""
    planted = sorted({kind for kind, label, _ in tokens if label == "wrong"})
    compared = [("right against wrong", kind, "right", "wrong") for kind in planted]
    compared.append(("visual against irrelevant", "caption", "visual", "filler"))
    found = []
    for endpoint, kind, high, low in compared:
        for column in ("weight", "delta"):
            one, other = tokens.get((kind, high, column)), tokens.get((kind, low, column))
            if one is None or other is None:
                continue
            (highs, of_highs), (lows, of_lows) = one.arrays(), other.arrays()
            interval = grouped_auroc(highs, of_highs, lows, of_lows)
            found.append(
                {
                    "endpoint": endpoint,
                    "planted": kind,
                    "of": column,
                    "tokens": [len(highs), len(lows)],
                    **rounded(interval),
                }
            )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="drawings of each split")
    options = parser.parse_args()
    run(options.demo.resolve(), options.limit, Rows("token_kinds"))
