"""Questions over bar and line charts of real numbers: tables of vega-datasets (BSD), some of them for the test alone."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..records import Record, phrases, record

# (file, columns)
_TRAINING = (
    ("stocks.csv", ("price",)),
    (
        "us-employment.csv",
        ("construction", "manufacturing", "information", "utilities", "government", "nonfarm_change"),
    ),
    ("seattle-weather.csv", ("temp_max", "temp_min", "wind")),
    ("cars.json", ("Horsepower", "Weight_in_lbs", "Acceleration", "Displacement", "Miles_per_Gallon")),
    ("barley.json", ("yield",)),
    ("iris.json", ("sepalLength", "sepalWidth", "petalLength")),
    ("sf-temps.csv", ("temp",)),
)
_TEST = (
    ("wheat.json", ("wheat", "wages")),
    ("ohlc.json", ("open", "high", "low", "close", "ret")),
    ("iowa-electricity.csv", ("net_generation",)),
    ("driving.json", ("miles", "gas")),
    ("crimea.json", ("wounds", "other", "disease")),
)
COLOURS = {"red": (214, 39, 40), "blue": (31, 90, 200), "green": (44, 150, 44), "orange": (255, 150, 14)}
PLACES = ("first", "second", "third", "fourth")
FORMS = ("bars", "line")
_POINTS = len(PLACES)
ATTRIBUTES = {"form": FORMS, "highest": PLACES, "lowest": PLACES, "colour of highest": (*COLOURS, "none")}
_ASKED = {
    "form": ("what kind of chart is this ?", "does the chart have bars or a line ?"),
    "highest place": ("where is the highest value ?", "which value is the largest ?"),
    "lowest place": ("where is the lowest value ?", "which value is the smallest ?"),
    "highest colour": ("which colour has the highest bar ?", "what is the colour of the largest bar ?"),
}
_CORES = {
    "form": "the chart is drawn with {%s}",
    "highest place": "the highest value is the {%s} one",
    "lowest place": "the lowest value is the {%s} one",
    "highest colour": "the highest bar is the {%s} one",
}
_GAP = 0.05  # of the height, between the answer and the next value: two or three pixels


def texts() -> list[str]:
    cores = [core.replace("{%s}", " ") for core in _CORES.values()]
    asked = [question for questions in _ASKED.values() for question in questions]
    return [*asked, *cores, phrases(), *COLOURS, *PLACES, *FORMS]


def held_out(one: Record) -> str:
    """Its table."""
    return str(one["table"])


def records(split: str, count: int, seed: int, side: int, answers: str) -> list[Record]:
    """An eighth asks for the form, the others for places and colours. A split takes its charts from another part of each
    table than the other splits."""
    rng = random.Random(f"charts {split} {'' if split == 'test' else seed}")
    tables = _series(_TEST if split == "test" else _TRAINING, split)
    found = []
    for number in range(count):
        asked = "form" if rng.random() < 0.125 else rng.choice(("highest place", "lowest place", "highest colour"))
        form = "bars" if asked == "highest colour" or rng.random() < 0.5 else "line"
        table, heights = _window(tables, rng)
        colours = rng.sample(list(COLOURS), _POINTS)
        order = sorted(range(_POINTS), key=heights.__getitem__)
        high, low = order[-1], order[0]
        told = {"form": form, "highest": PLACES[high], "lowest": PLACES[low]}
        told["colour of highest"] = colours[high] if form == "bars" else "none"
        said = {
            "form": form,
            "highest place": PLACES[high],
            "lowest place": PLACES[low],
            "highest colour": colours[high],
        }
        attributes = {name: tuple(values).index(told[name]) for name, values in ATTRIBUTES.items()}
        shown = _picture(form, heights, colours, side, rng)
        more = {"attributes": attributes, "table": table}
        core, question = _CORES[asked] % said[asked], rng.choice(_ASKED[asked])
        found.append(record(f"{split}-{number}", asked, question, core, shown, answers, rng, **more))
    return found


@functools.cache
def _folder() -> Path:
    found = importlib.util.find_spec("vega_datasets")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "the task 'charts' needs vega-datasets, which is not installed. Run pip install 'seecal[experiments]'"
        )
    return Path(found.submodule_search_locations[0]) / "_data"


@functools.cache
def _table(name: str) -> list[dict[str, str]]:
    text = (_folder() / name).read_text("utf8")
    return list(csv.DictReader(text.splitlines())) if name.endswith(".csv") else json.loads(text)


def _series(tables: Sequence[tuple[str, tuple[str, ...]]], split: str) -> list[tuple[str, list[list[float]]]]:
    """(table, its columns), each column cut to the part that is the split's."""
    low, high = {"align": (0.0, 0.4), "train": (0.4, 0.9), "validation": (0.9, 1.0), "test": (0.0, 1.0)}[split]
    found = []
    for name, columns in tables:
        kept = []
        for column in columns:
            values = [float(row[column]) for row in _table(name) if row.get(column) not in ("", None)]
            kept.append(values[round(low * len(values)) : round(high * len(values))])
        found.append((name, [values for values in kept if len(values) >= _POINTS]))
    return found


def _window(tables: list[tuple[str, list[list[float]]]], rng: random.Random) -> tuple[str, list[float]]:
    """(table, heights from 0.1 to 1 of values that follow each other with an even step)."""
    while True:
        name, columns = rng.choice(tables)
        values = rng.choice(columns)
        step = rng.randrange(1, max(2, min(6, len(values) // _POINTS + 1)))
        start = rng.randrange(max(1, len(values) - step * (_POINTS - 1)))
        shown = values[start : start + step * _POINTS : step][:_POINTS]
        if len(shown) < _POINTS or max(shown) == min(shown):
            continue
        spread = max(shown) - min(shown)
        heights = [0.1 + 0.9 * (value - min(shown)) / spread for value in shown]
        ordered = sorted(heights)
        if ordered[-1] - ordered[-2] >= _GAP and ordered[1] - ordered[0] >= _GAP:
            return name, heights


def _picture(form: str, heights: list[float], colours: list[str], side: int, rng: random.Random) -> Image.Image:
    light = rng.randrange(225, 256)
    image = Image.new("RGB", (side, side), (light, light, rng.randrange(225, 256)))
    draw = ImageDraw.Draw(image)
    left, bottom, top = side * rng.uniform(0.06, 0.12), side * rng.uniform(0.9, 0.95), side * rng.uniform(0.05, 0.12)
    draw.line([(left, top), (left, bottom), (side, bottom)], fill=(90, 90, 90))
    width = (side - left) / _POINTS
    tops = [bottom - height * (bottom - top) for height in heights]
    if form == "bars":
        thin = width * rng.uniform(0.1, 0.2)
        for place, (high, colour) in enumerate(zip(tops, colours, strict=True)):
            draw.rectangle(
                (left + place * width + thin, high, left + (place + 1) * width - thin, bottom), COLOURS[colour]
            )
    else:
        points = [(left + (place + 0.5) * width, high) for place, high in enumerate(tops)]
        draw.line(points, fill=COLOURS[rng.choice(list(COLOURS))], width=max(2, side // 32))
    return image
