"""Reading a rendered word or a number, in fonts that no training picture has.

The fonts come from PyPI: DejaVu with matplotlib, and the font-* packages of ``seecal[experiments]``.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..records import Record, phrases, record

# (package, folder in it, files)
_TRAINING = (
    ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold")),
    ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSansMono", "DejaVuSansMono-Bold")),
    ("font_source_sans_pro", "files", ("SourceSansPro-Semibold", "SourceSansPro-Bold", "SourceSansPro-It")),
    ("font_source_serif_pro", "files", ("SourceSerifPro-Semibold", "SourceSerifPro-Bold")),
    ("font_manrope", "files", ("Manrope-Medium", "Manrope-Bold")),
)
_TEST = (
    ("font_lato", "files", ("Lato-Regular", "Lato-Bold")),
    ("font_caladea", "files", ("Caladea-Regular", "Caladea-Bold")),
)
WORDS = ("bank", "bus", "cafe", "exit", "hotel", "milk", "open", "park", "shop", "stop", "taxi", "zoo")
# A few that share digits. (Of all numbers of two digits these models read 12 % in another font, after 525 joint steps.)
NUMBERS = ("10", "14", "25", "30", "42", "48", "57", "63", "71", "86", "90", "99")
_NONE = "none"
ATTRIBUTES = {"word": (*WORDS, _NONE), "number": (*NUMBERS, _NONE)}
_ASKED = {
    "word": ("what word is written here ?", "which word can you read ?", "what does the sign say ?"),
    "number": ("what number is written here ?", "which number can you read ?", "what does the plate say ?"),
}
_CORES = {"word": "the word reads {%s}", "number": "the number reads {%s}"}


def texts() -> list[str]:
    cores = [core.replace("{%s}", " ") for core in _CORES.values()]
    asked = [question for questions in _ASKED.values() for question in questions]
    return [*asked, *cores, phrases(), *WORDS, *NUMBERS]


def held_out(one: Record) -> str:
    """The family of its font."""
    return str(one["font"]).split("-")[0]


def records(split: str, count: int, seed: int, side: int, answers: str) -> list[Record]:
    """Half of them words, half numbers."""
    rng = random.Random(f"reading {split} {'' if split == 'test' else seed}")
    paths = [path for group in (_TEST if split == "test" else _TRAINING) for path in _files(*group)]
    found = []
    for number in range(count):
        kind = ("word", "number")[number % 2]
        said = rng.choice(WORDS if kind == "word" else NUMBERS)
        path = rng.choice(paths)
        shown = _picture(said, path, side, rng)
        values = {**dict.fromkeys(ATTRIBUTES, _NONE), kind: said}
        attributes = {name: ATTRIBUTES[name].index(value) for name, value in values.items()}
        core = _CORES[kind] % said
        more = {"attributes": attributes, "font": path.stem}
        found.append(record(f"{split}-{number}", kind, rng.choice(_ASKED[kind]), core, shown, answers, rng, **more))
    return found


@functools.cache
def _files(package: str, folder: str, names: tuple[str, ...]) -> tuple[Path, ...]:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            f"the task 'reading' needs {package.replace('_', '-')}, which is not installed. "
            "Run pip install 'seecal[experiments]'"
        )
    return tuple(Path(found.submodule_search_locations[0]) / folder / f"{name}.ttf" for name in names)


@functools.cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def _picture(text: str, path: Path, side: int, rng: random.Random) -> Image.Image:
    """The text as large as fits, moved, dark on light or light on dark."""
    size = round(side * rng.uniform(0.45, 0.6))
    while (box := _font(path, size).getbbox(text))[2] - box[0] > side * 0.92:
        size -= 1
    light, dark = rng.randrange(190, 256), rng.randrange(0, 70)
    back, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    shade = lambda grey: tuple(min(255, max(0, grey + rng.randrange(-25, 26))) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (side, side), shade(back))
    room = side - (box[2] - box[0]), side - (box[3] - box[1])
    place = [space / 2 + rng.uniform(-0.25, 0.25) * max(0, space) - box[axis] for axis, space in enumerate(room)]
    ImageDraw.Draw(image).text(tuple(place), text, font=_font(path, size), fill=shade(ink))
    return image
