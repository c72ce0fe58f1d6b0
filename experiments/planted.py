"""Texts that stand beside a drawing that they fit and beside one that they do not fit, a word at a time the same.

Whatever tells the two apart has looked at the image: the words are the same, and so is what stands before them.
"""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seecal.demo import emoji, files
from seecal.demo.emoji import Answer, Emoji

COLOURS = {"red": 0.0, "yellow": 0.15, "green": 0.33, "blue": 0.58, "purple": 0.78}
NUMBERS = ("one", "two", "three", "four")
DRAWINGS = {emoji.HELD_IMAGE: 120, emoji.HELD_CONCEPT: 60}
OBJECT, AFTER_NAME, TAGS, FILLER = "object", "kind after the name", "tags", "filler"
VISUAL = (OBJECT, AFTER_NAME, TAGS)
PLANTED = (OBJECT, AFTER_NAME, FILLER, "kind", "colour", "count", "negation")
Pieces = tuple[tuple[str, str], ...]  # (text, what it is of: one of PLANTED, TAGS or "")


@dataclass(frozen=True)
class Case:
    """An answer beside a drawing.

    Attributes:
        drawing: which, as a number.
        image: a file.
        fits: whether the answer is true of it.
        question: what is asked.
        pieces: of the answer.
    """

    drawing: int
    image: Path
    fits: bool
    question: str
    pieces: Pieces

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Drawing:
    """An unseen drawing with its number and file."""

    number: int
    item: Emoji
    image: Path


def cases(demo: Path, folder: Path, limit: int | None = None) -> list[Case]:
    """Every answer of every kind.

    Args:
        demo: the folder that `seecal demo` leaves.
        folder: takes the drawings that are pasted together.
        limit: drawings of each split at most.
    """
    paths = {item.hexcode: demo / "images" / f"{emoji.slug(item.name)}.png" for item in emoji.catalogue()}
    items = [item for item in emoji.catalogue() if paths[item.hexcode].exists()]
    found: list[Case] = []
    number = 0
    for split, count in DRAWINGS.items():
        shown = files.held_out(items, split, count if limit is None else min(count, limit))
        drawings = [Drawing(number + place, item, paths[item.hexcode].resolve()) for place, item in enumerate(shown)]
        number += len(drawings)
        rng = random.Random(split)
        found += [*described(drawings, rng), *kinds(drawings, rng), *colours(drawings, rng)]
        found += counts(drawings, folder, rng)
    return found


def exchanges(labels: Sequence[Hashable], rng: random.Random, times: int = 1) -> list[dict[int, int]]:
    """Ways to give each item the word of another one with another label, no pair of items twice.

    Each is one to one, so a word is given away as often as it is given. Of a label that more than half of the items have,
    those that are too many are left out, by lot.

    Returns:
        ``times`` of them, fewer where there are not so many; none where there is one label only.
    """
    order = list(range(len(labels)))
    rng.shuffle(order)
    size = Counter(labels[place] for place in order)
    label, most = max(size.items(), key=lambda entry: entry[1], default=(None, 0))
    surplus = [place for place in order if labels[place] == label][: max(2 * most - len(order), 0)]
    order = sorted(set(order) - set(surplus), key=lambda place: (_rank(size, labels[place]), order.index(place)))
    most = max(Counter(labels[place] for place in order).values(), default=0)
    # In the order of their labels, items that are at least a label's length apart have different ones, around the end too
    shifts = range(max(most, 1), len(order) - most + 1)
    chosen = rng.sample(shifts, min(times, len(shifts)))
    return [{place: order[(at + shift) % len(order)] for at, place in enumerate(order)} for shift in chosen]


def _rank(size: Counter[Hashable], label: Hashable) -> int:
    return list(size).index(label)


def described(drawings: list[Drawing], rng: random.Random) -> Iterator[Case]:
    """The drawings' own descriptions, and those of drawings of other kinds."""
    answers = [pieces_of(emoji.answer(one.item, "describe", random.Random(1)), one.item) for one in drawings]
    asked = emoji.QUESTIONS["describe"]
    for one, pieces in zip(drawings, answers, strict=True):
        yield Case(one.number, one.image, True, asked, pieces)
    for plan in exchanges([one.item.kind for one in drawings], rng, times=2):
        for place, other in plan.items():
            yield Case(drawings[place].number, drawings[place].image, False, asked, answers[other])


def pieces_of(answer: Answer, item: Emoji) -> Pieces:
    """The description, each piece with what it is of; the kind without its article."""
    found: list[tuple[str, str]] = []
    for text, seen in answer.pieces:
        labels = [label for _, label in found]
        if not seen:
            found.append((text, FILLER))
        elif OBJECT not in labels:
            found.append((text, OBJECT))
        elif AFTER_NAME not in labels:
            found += with_article(item.kind, AFTER_NAME)
        else:
            found.append((text, TAGS))
    return tuple(found)


def with_article(kind: str, label: str) -> Pieces:
    """("a ", "") and ("plant", label); without an article the second alone.

    >>> with_article("a plant", "kind"), with_article("sport", "kind")
    ((('a ', ''), ('plant', 'kind')), (('sport', 'kind'),))
    """
    article, blank, noun = kind.partition(" ")
    return ((article + blank, ""), (noun, label)) if article in ("a", "an") else ((kind, label),)


def both(
    drawings: Sequence[Drawing], words: Sequence[str], rng: random.Random, pieces: dict[str, Pieces], asked: str
) -> Iterator[Case]:
    """Each drawing with its own word's answer, which fits, and with that of another word's drawing, which does not."""
    for plan in exchanges(words, rng):
        for place, other in plan.items():
            one = drawings[place]
            for fits, word in ((True, words[place]), (False, words[other])):
                yield Case(one.number, one.image, fits, asked, pieces[word])


def kinds(drawings: list[Drawing], rng: random.Random) -> Iterator[Case]:
    """The answer to the question for the kind, and what a drawing is not."""
    words = [one.item.kind for one in drawings]
    answers = {word: with_article(word, "kind") for word in words}
    yield from both(drawings, words, rng, answers, emoji.QUESTIONS["kind"])
    for word in answers:
        answers[word] = (("It is not ", ""), *with_article(word, "negation"), (".", ""))
    for case in both(drawings, words, rng, answers, emoji.QUESTIONS["describe"]):
        yield Case(case.drawing, case.image, not case.fits, case.question, case.pieces)


def colours(drawings: list[Drawing], rng: random.Random) -> Iterator[Case]:
    """The main colour of the drawings that have one."""
    hues = [clear_hue(one.image) for one in drawings]
    clear = [(one, hue) for one, hue in zip(drawings, hues, strict=True) if hue is not None]
    answers = {hue: (("Its main colour is ", ""), (hue, "colour"), (".", "")) for hue in COLOURS}
    yield from both([one for one, _ in clear], [hue for _, hue in clear], rng, answers, emoji.QUESTIONS["describe"])


def counts(drawings: list[Drawing], folder: Path, rng: random.Random) -> Iterator[Case]:
    """How many there are of it, on pictures of one to four, each number as often as the others."""
    order = rng.sample(range(len(drawings)), len(drawings))
    words = [NUMBERS[order[place] % len(NUMBERS)] for place in range(len(drawings))]
    pasted = [
        Drawing(one.number, one.item, paste(one.image, NUMBERS.index(word) + 1, folder / f"{one.number}.png"))
        for one, word in zip(drawings, words, strict=True)
    ]
    answers = {word: (("The number of them in the picture is ", ""), (word, "count"), (".", "")) for word in NUMBERS}
    yield from both(pasted, words, rng, answers, emoji.QUESTIONS["describe"])


def clear_hue(image: Path) -> str | None:
    """The colour of which a drawing has much more than of any other; None where there is none."""
    pixels = np.asarray(Image.open(image).convert("RGB").resize((48, 48))).reshape(-1, 3) / 255
    found = dict.fromkeys(COLOURS, 0)
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        if saturation > 0.35 and value > 0.3:
            nearest = min(COLOURS, key=lambda name: min(abs(COLOURS[name] - hue), 1 - abs(COLOURS[name] - hue)))
            found[nearest] += 1
    first, second = sorted(found.values(), reverse=True)[:2]
    return max(found, key=lambda name: found[name]) if first > 150 and first > 3 * second else None


def paste(image: Path, count: int, out: Path) -> Path:
    """One to four of the drawing on white."""
    drawing = Image.open(image).convert("RGB").resize((112, 112))
    canvas = Image.new("RGB", (224, 224), "white")
    for place in range(count):
        canvas.paste(drawing, (112 * (place % 2), 112 * (place // 2)))
    canvas.save(out)
    return out
