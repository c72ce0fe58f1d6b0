"""The letter of a multiple-choice answer, by the rules of three benchmarks, which differ.

``choice`` is MMStar's (lmms-eval ``_task_utils/mcq_extract.py``), ``choice_mmt`` MMT-Bench's (``mmt/utils.py``),
``choice_scienceqa`` ScienceQA's (``scienceqa/utils.py``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MMSTAR = "ABCD"
_MMT = "ABCDEFGHI"
_NAMES = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{article}{name} is" for name in _NAMES for article in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# Where a letter may stand, the surest place first
_PLACES = ("start", "end", "phrase", "({})", "{}.", "{}:", "{})", "{} ")


def choice(prediction: str, references: Sequence[str]) -> float:
    """1 if :func:`letter_of` finds the true letter among A to D, else 0. Small letters are not found."""
    return float(letter_of(prediction, _MMSTAR) in {reference.strip().upper() for reference in references})


def letter_of(text: str, letters: str = _MMSTAR) -> str:
    """The letter that a text answers with, "" if it has none.

    The surest place decides: alone at the start, at the end, after a phrase ("the answer is"), then (A), A., A:, A), and A
    before a blank; any A at all if there is none of those. In the same place the one that stands last.

    >>> letter_of("The answer is (B)."), letter_of("I think Donald"), letter_of("b")
    ('B', 'D', '')
    """
    if not text.strip():
        return ""
    text = text.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    text = f" {text} "
    for place in _PLACES:
        found = [(at, -letters.index(letter), letter) for letter, at in _in_place(text, place, letters)]
        if found:
            return max(found)[2]
    return max(((text.rfind(letter), letter) for letter in letters if letter in text), default=(0, ""))[1]


def _in_place(text: str, place: str, letters: str) -> list[tuple[str, int]]:
    """(letter, where) of the letters that stand so in a text with a blank at either end."""
    words = text.strip()
    if place == "start":
        return [(one, 0) for one in letters if words.startswith(one) and not words[1:2].isalpha()]
    if place == "end":
        return [(one, 0) for one in letters if words.endswith(one) and not words[-2:-1].isalpha()]
    if place == "phrase":
        low = text.lower()
        behind = [low.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in low]
        return [(one, at) for start in behind for one in letters if (at := text.find(one, start)) >= 0]
    return [(one, text.rfind(place.format(one))) for one in letters if place.format(one) in text]


def choice_mmt(prediction: str, references: Sequence[str], record: Mapping[str, Any] | None = None) -> float:
    """1 if the letter of the prediction is the reference, else 0: "(A)", else " A ", else "A."; of several the last " A ".

    Where no letter is found one of the record's options is drawn, as in the field; here the draw hangs on the record and
    the answer alone, so that it is the same in every run.

    Args:
        record: its options are the keys A to I that are not empty; all of those letters if it has none.
    """
    record = record or {}
    letters = [letter for letter in _MMT if record.get(letter)] or list(_MMT)
    text = prediction.strip()
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    forms: tuple[Callable[[str], str], ...] = ("({})".format, " {} ".format, "{}.".format)
    for form in forms:
        found = [letter for letter in letters if form(letter) in text]
        if found:
            said = max(found, key=lambda letter: (text.rfind(f" {letter} "), -letters.index(letter)))
            break
    else:
        said = random.Random(f"{record.get('id')}\n{prediction}").choice(letters)
    return float(said in {reference.strip() for reference in references})


def choice_scienceqa(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is the letter, or begins with it as a capital and a period ("A. dog"), else 0."""
    said, wanted = prediction.strip(), {reference.strip().lower() for reference in references}
    begins = len(said) >= 2 and said[0].isupper() and said[1] == "."
    return float(said.lower() in wanted or (begins and said[0].lower() in wanted))
