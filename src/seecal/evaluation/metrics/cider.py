"""CIDEr-D of captions (pycocoevalcap ``cider/cider_scorer.py``), on words that this file tells or that are there already.

The scores of texts that are split into words (``words=str.split``) are those of pycocoevalcap to rounding. That package
splits with a Java program; :func:`tokens` follows its rules without it, so figures of raw captions may differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty for another length, in words

Grams = Counter[tuple[str, ...]]
# Penn Treebank: what belongs to the word before or behind is cut off; words keep their inner hyphens and apostrophes
_PIECES = re.compile(
    r"\d+(?:[.,:/]\d+)*(?!\w|-\w)|(?:[a-z]\.){2,}|\w+(?:-\w+)*(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-/]\w+)*|[^\w\s]",
    re.UNICODE,
)
_LEFT_OUT = frozenset(
    {"'", '"', "`", "(", ")", "[", "]", "{", "}", ".", "?", "!", ",", ":", "-", ";", "''", "``", "--", "..."}
)


def tokens(text: str) -> list[str]:
    """The words of a caption, in lower case, as the Penn Treebank splits them, without punctuation.

    >>> tokens("A man's dog isn't on the T-shirt, (it is 3.5 m away).")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'on', 'the', 't-shirt', 'it', 'is', '3.5', 'm', 'away']
    """
    return [piece for piece in _PIECES.findall(text.lower()) if piece not in _LEFT_OUT]


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    words: Callable[[str], list[str]] = tokens,
) -> list[float]:
    """The score of each of N captions, 0 to 10; the corpus has their mean.

    A score depends on the whole set: how telling an n-gram is is counted over the images whose references have it. One
    image alone has 0.

    Args:
        predictions: N captions.
        references: the true captions of each, one or more.
        words: splits a text.
    """
    true = [[_grams(words(text)) for text in of_image] for of_image in references]
    images_with = Counter(chain.from_iterable({gram for grams in of_image for gram in grams} for of_image in true))
    log_images = math.log(max(len(true), 1))

    def vector(grams: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_images - math.log(max(1, images_with[gram]))) for gram, count in grams.items()}

    scores = []
    for text, of_image in zip(predictions, true, strict=True):
        grams = _grams(words(text))
        said = vector(grams)
        each = [_similarity(said, vector(one), _length(grams) - _length(one)) for one in of_image]
        scores.append(10 * sum(each) / len(each))
    return scores


def _grams(words: Sequence[str]) -> Grams:
    return Counter(tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1))


def _length(grams: Grams) -> int:
    """In pairs of words: so the field counts it, which differs from words only in captions of one word or none."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(said: dict[tuple[str, ...], float], true: dict[tuple[str, ...], float], difference: int) -> float:
    """The mean over 1- to 4-grams of the clipped cosine, less for another length."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        shared = sum(
            min(weight, true[gram]) * true[gram] for gram, weight in said.items() if len(gram) == n and gram in true
        )
        norms = math.sqrt(_squares(said, n)) * math.sqrt(_squares(true, n))
        total += shared / norms if norms else 0.0
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))


def _squares(vector: dict[tuple[str, ...], float], n: int) -> float:
    return sum(weight**2 for gram, weight in vector.items() if len(gram) == n)
