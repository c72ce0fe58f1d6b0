"""What a folder of scores says as a whole: where Δ lies, for each source and kind of token, and which words stand out.

Kinds are told from the text alone, so they need no model and are the same for every model: the end of a turn,
punctuation, numbers, function words (of English, by a list) and other words.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .read import RecordScores

KINDS = ("other words", "numbers", "function words", "punctuation", "end of turn")
EDGES = np.arange(-10.0, 15.5, 0.5)  # logits; what lies beyond is counted in the outermost bins
CONTRADICTORY = -1.0  # logits; below it the image speaks against a token
_KEPT = 60  # words and tokens that a summary names
_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Names of tokens, as Llama's and GPT-2's vocabularies write bytes: those that only go on with a character in UTF-8 (80 to
# BF), and blanks, which templates put around the token that ends a turn
_GOES_ON = re.compile(r"<0x[89AB][0-9A-F]>|[\u00a1-\u00ac\u00ae-\u00bf\u0122-\u0143]+")
_BLANKS = re.compile(r"<0x(?:0[9A-D]|20)>|[\s▁ĠĊĉč]+")
FUNCTION_WORDS = frozenset(
    """
    a about above after again against all also although am among an and another any are as at be because been before
    being below between both but by can cannot could did do does doing down during each either else even ever every
    few for from further had has have having he her here hers him his how however i if in into is it its itself just
    like many may me might mine more most much must my neither no nor not of off on once one only onto or other our
    ours out over own per rather same shall she should since so some such than that the their theirs them then there
    these they this those through thus to too toward under until up upon us very was we were what when where whether
    which while who whom whose why will with within without would yet you your yours
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Answers:
    """The answers of a record as its label tokens spell them.

    Attributes:
        texts: each answer.
        turn: [N] which answer each token is of, as a place in ``texts``.
        start, stop: [N] its characters there.
        turns: the number of each answer among the record's assistant turns.
        inside: [N] whether a token only goes on with the character before ``start``, which the tokenizer split.
        ends: [N] whether a token ends its turn.
    """

    texts: list[str]
    turn: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    turns: list[int]
    inside: np.ndarray
    ends: np.ndarray

    @property
    def begin(self) -> np.ndarray:
        """[N] as ``start``, but before the character of those tokens that go on with one."""
        return self.start - self.inside


def answers_of(record: RecordScores) -> Answers:
    """The answers, put together from tokens: their spans tile each."""
    columns = record.columns
    turns, turn = np.unique(columns["turn"], return_inverse=True)
    start, stop = columns["start"], columns["stop"]
    pieces: list[list[str]] = [[] for _ in turns]
    for place, token, begin, end in zip(turn, columns["token"], start, stop, strict=True):
        if end > begin:  # else its text is its name in the vocabulary
            pieces[place].append(token)
    texts = ["".join(of_turn) for of_turn in pieces]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)[turn]
    inside, ends = np.zeros(len(turn), dtype=bool), np.zeros(len(turn), dtype=bool)
    last: dict[int, tuple[bool, int]] = {}  # turn -> (no blank, place) of what ends it, by what is known so far
    for place in np.flatnonzero(start == stop).tolist():
        name = str(columns["token"][place])
        if start[place] < lengths[place] or _GOES_ON.fullmatch(name):
            inside[place] = start[place] > 0
        else:
            found = (not _BLANKS.fullmatch(name), place)
            last[turn[place]] = max(found, last.get(turn[place], found))
    ends[[place for _, place in last.values()]] = True
    return Answers(texts, turn, start, stop, [int(one) for one in turns], inside, ends)


def words_of(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each word. Of a script without blanks each run of letters is one."""
    return [word.span() for word in _WORD.finditer(text)]


def kinds_of(answers: Answers) -> np.ndarray:
    """[N] the kind of each token, as a place in :data:`KINDS`. A token that goes on with a character is of that one's."""
    of_letters = []
    for text in answers.texts:
        kinds = np.full(len(text) + 1, KINDS.index("punctuation"))
        for start, stop in words_of(text):
            word = text[start:stop]
            kind = (
                "numbers" if word.isnumeric() else "function words" if word.lower() in FUNCTION_WORDS else "other words"
            )
            kinds[start:stop] = KINDS.index(kind)
        of_letters.append(kinds)
    found = np.empty(len(answers.turn), dtype=np.int64)
    for place, (turn, start, stop) in enumerate(zip(answers.turn, answers.begin, answers.stop, strict=True)):
        if answers.ends[place]:
            found[place] = KINDS.index("end of turn")
            continue
        inside = of_letters[turn][start : max(stop, start + 1)]
        words = inside[inside != KINDS.index("punctuation")]
        found[place] = words[0] if len(words) else KINDS.index("punctuation")
    return found


WordChange = tuple[str, int, float, float]


@dataclass
class Words:
    """Mean Δ of each word, case folded."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, answers: Answers, delta: np.ndarray, seen: np.ndarray) -> None:
        """The words of a record: a word's Δ is the mean of its tokens'."""
        for turn, text in enumerate(answers.texts):
            of_turn = np.flatnonzero((answers.turn == turn) & seen & (answers.stop > answers.begin))
            if not len(of_turn):
                continue
            starts, stops = answers.begin[of_turn], answers.stop[of_turn]
            for start, stop in words_of(text):
                inside = of_turn[(starts < stop) & (stops > start)]
                if len(inside):
                    entry = self.sums.setdefault(text[start:stop].casefold(), [0, 0.0])
                    entry[0] += 1
                    entry[1] += float(delta[inside].mean())

    def extremes(self, least: int) -> tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]:
        """((word, count, mean Δ) with the highest means, those with the lowest), of words that come ``least`` times."""
        means = [(word, int(count), total / count) for word, (count, total) in self.sums.items() if count >= least]
        means.sort(key=lambda entry: (-entry[2], entry[0]))
        return means[:_KEPT], means[::-1][:_KEPT]

    def changes(self, other: Words, least: int) -> tuple[list[WordChange], list[WordChange]]:
        """((word, count, mean Δ here, mean Δ in ``other``) that rose most, those that fell most), of words that come
        ``least`` times in both."""
        found = []
        for word, (count, total) in self.sums.items():
            again, other_total = other.sums.get(word, (0, 0.0))
            if min(count, again) >= least:
                found.append((word, int(count), total / count, other_total / again))
        found.sort(key=lambda entry: (entry[2] - entry[3], entry[0]))
        rose = [entry for entry in found if entry[3] > entry[2]]
        fell = [entry for entry in found[::-1] if entry[3] < entry[2]]
        return rose[:_KEPT], fell[:_KEPT]


@dataclass
class Summary:
    """Filled record by record (:meth:`add`). A Δ that is not finite counts nowhere but in ``tokens`` and ``seen``.

    Attributes:
        by_source, by_kind: name -> [bins] counts of tokens with an image, between :data:`EDGES`.
        sums: name (source or kind) -> [count, Σ Δ, how many below -1, up to α, at β or above].
        against: the tokens that the image speaks most against: (Δ, record's place in the page, token's place in it).
    """

    alpha: float
    beta: float
    by_source: dict[str, np.ndarray] = field(default_factory=dict)
    by_kind: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    words: Words = field(default_factory=Words)
    _against: list[tuple[float, int, int]] = field(default_factory=list)
    tokens: int = 0
    seen: int = 0

    def add(self, number: int, record: RecordScores, answers: Answers) -> None:
        """Count a record; ``number`` is its place in the page."""
        delta = record.columns["delta"].astype(np.float64)
        seen = record.columns["has_contrast"].astype(bool)
        self.tokens += len(delta)
        self.seen += int(seen.sum())
        seen &= np.isfinite(delta)
        if not seen.any():
            return
        self._count(self.by_source, record.source, delta[seen])
        kinds = kinds_of(answers)
        for place, name in enumerate(KINDS):
            self._count(self.by_kind, name, delta[seen & (kinds == place)])
        self.words.add(answers, delta, seen)
        for token in np.flatnonzero(seen & (delta < CONTRADICTORY) & (kinds != KINDS.index("end of turn"))):
            entry = (-float(delta[token]), -number, -int(token))
            if len(self._against) < _KEPT:
                heapq.heappush(self._against, entry)
            else:
                heapq.heappushpop(self._against, entry)

    def _count(self, into: dict[str, np.ndarray], name: str, delta: np.ndarray) -> None:
        if not len(delta):
            return
        inner = np.clip(delta, EDGES[0], EDGES[-1] - 1e-9)
        into[name] = into.get(name, 0) + np.histogram(inner, EDGES)[0]
        shares = [(delta < CONTRADICTORY).sum(), (delta <= self.alpha).sum(), (delta >= self.beta).sum()]
        self.sums[name] = self.sums.get(name, 0) + np.array([len(delta), delta.sum(), *shares], dtype=np.float64)

    @property
    def against(self) -> list[tuple[float, int, int]]:
        """(Δ, record, token), the lowest Δ first."""
        return [(-delta, -number, -token) for delta, number, token in sorted(self._against, reverse=True)]

    def rows(self, of: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """For each name of ``by_source`` or ``by_kind``: tokens, mean Δ, shares."""
        for name in of:
            count, total, below, low, high = self.sums[name]
            yield {
                "name": name, "tokens": int(count), "mean": total / count,
                "against": below / count, "at_alpha": low / count, "at_beta": high / count,
            }  # fmt: skip
