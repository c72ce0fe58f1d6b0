"""The soft accuracy of VQA and TextVQA, over the answers of ten people (lmms-eval ``_task_utils/vqa_eval_metric.py``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

AGREEING = 3  # others who say the same make an answer right
# A text is as good as four equal answers can make it; with fewer no prediction could reach 1
LEAST_ANSWERS = AGREEING + 1

_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")
# Words that are restored where an apostrophe of theirs is missing ("dont", "couldnt've"). Not among them: those that are
# other words without it, such as "well" and "its".
_SHORT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
""".split()  # noqa: SIM905
_RESTORED = {word[:at] + word[at + 1 :]: word for word in _SHORT for at, letter in enumerate(word) if letter == "'"} | {
    "somebody'd": "somebodyd"
}  # as it stands in the field's table
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # "," and "?" are gone before
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # at most so many are removed: the field's code gives a flag where the count belongs


def vqa(prediction: str, references: Sequence[str]) -> float:
    """The mean over the people of min(1, others who gave the prediction / 3); texts as :func:`normalised` makes them.

    Of ten people 1, 2, 3, 4 and more who said the same make 0.3, 0.6, 0.9 and 1. Without references: 0.
    """
    if not references:
        return 0.0
    said, answers = normalised(prediction), [normalised(answer) for answer in references]
    agreeing = answers.count(said)
    return mean(min(1.0, (agreeing - (answer == said)) / AGREEING) for answer in answers)


def normalised(text: str) -> str:
    """A text as EvalAI compares it: lower case, without punctuation and articles, numbers to ten as digits, apostrophes put
    back into words such as "dont".

    >>> normalised("The Coca-Cola, isnt it?"), normalised("$5.00"), normalised("1,000"), normalised("N.Y.")
    ('coca cola isn\\'t it', '$5.00', '1000', 'ny')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A sign is removed where it touches a blank anywhere in the text; else it becomes a blank. A period stays before a
    digit. (The field also removes it where a number has a comma; by then no comma is left.)"""
    changed = text
    for sign in _PUNCTUATION:
        touches = f"{sign} " in text or f" {sign}" in text
        changed = changed.replace(sign, "" if touches else " ")
    return _PERIOD.sub("", changed, count=_PERIODS)
