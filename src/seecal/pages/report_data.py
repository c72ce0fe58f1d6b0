"""What a report page holds of each record, in a form that a browser reads in a moment.

``index`` has a few columns over all records: enough to search, sort and filter. The numbers of the tokens lie in chunks,
each read when one of its records is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.message_keys import unpacked
from ..data.sources.load import Located
from ..scoring.read import RecordScores
from ..scoring.summary import CONTRADICTORY, Answers

CHUNK = 200  # records
_HUNDREDTHS = 100.0


@dataclass
class PageData:
    """The records of a page, in the order of the scores.

    Attributes:
        index: name -> a value a record.
        chunks: of :data:`CHUNK` records each: for every record ``[turns, token lengths, names, places of tokens that only
            go on with a character, Δ, weights, logits]``, with the same three once more for the second model.
        places: (source, row) -> place in the page.
        not_finite: record -> how many of its tokens have a Δ, logit or weight that is NaN or infinite. They are in no
            figure of ``index``.
    """

    index: dict[str, list[Any]] = field(default_factory=dict)
    chunks: list[list[Any]] = field(default_factory=list)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    not_finite: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def add(self, record: RecordScores, answers: Answers, other: RecordScores | None) -> int:
        """Put a record in; returns its place."""
        number = len(self.places)
        self.places[record.source, record.row] = number
        figures = {"source": record.source, "row": record.row, "id": record.record, "answers": answers.texts}
        figures |= _figures(record, "")
        if other is not None:
            figures |= _figures(other, "2")
        for name, value in {**figures, "questions": []}.items():
            self.index.setdefault(name, []).append(value)
        if number % CHUNK == 0:
            self.chunks.append([])
        self.chunks[-1].append(_tokens(record, answers, other))
        if strange := _not_finite(record, other):
            self.not_finite[number] = strange
        return number

    def add_row(self, number: int, row: Located, turns: list[int]) -> None:
        """The questions of a record, one before each of its answers."""
        assert row.record is not None
        self.index["questions"][number] = questions_of(row.record["messages"], turns)

    def scripts(self) -> Iterator[tuple[str, str]]:
        """(id, JSON that can stand in a script element) of each part."""
        yield "index", script_json(self.index)
        for number, chunk in enumerate(self.chunks):
            yield f"chunk-{number}", script_json(chunk)


def script_json(value: Any) -> str:
    """JSON that cannot end a script element, whatever text is in it. ValueError for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter, escaped in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(letter, escaped)
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be written


def questions_of(messages: list[dict[str, Any]], turns: list[int]) -> list[str]:
    """What was said between each of the assistant's ``turns`` and the one before; images as a sign."""
    found: dict[int, str] = {}
    said: list[str] = []
    turn = 0
    for message in map(unpacked, messages):
        if message["role"] == "assistant":
            found[turn] = "\n".join(said)
            said, turn = [], turn + 1
            continue
        parts = ["🖼" if part["type"] == "image" else part["text"] or "" for part in message["content"]]
        said.append(" ".join(part.strip() for part in parts if part))
    return [found.get(one, "") for one in turns]


def _figures(record: RecordScores, suffix: str) -> dict[str, Any]:
    seen = record.columns["has_contrast"].astype(bool)
    delta = record.columns["delta"][seen].astype(np.float64)
    delta = delta[np.isfinite(delta)]
    none = not len(delta)
    return {
        f"mean{suffix}": None if none else round(float(delta.mean()), 3),
        f"least{suffix}": None if none else round(float(delta.min()), 2),
        f"against{suffix}": None if none else round(float((delta < CONTRADICTORY).mean()), 3),
    }


def _tokens(record: RecordScores, answers: Answers, other: RecordScores | None) -> list[Any]:
    names = {
        place: str(token)
        for place, (token, start, stop) in enumerate(
            zip(record.columns["token"], answers.start, answers.stop, strict=True)
        )
        if start == stop
    }
    lengths = []
    for turn, start, stop in zip(answers.turn, answers.start, answers.stop, strict=True):
        # A browser counts in 16 bits
        lengths.append(len(answers.texts[turn][start:stop].encode("utf-16-le", "surrogatepass")) // 2)
    found = [answers.turn.tolist(), lengths, names, np.flatnonzero(answers.inside).tolist(), *_numbers(record)]
    return found + _numbers(other) if other is not None else found


def _numbers(record: RecordScores) -> list[Any]:
    """[Δ (None without an image), weights, logits with the image], in hundredths."""
    columns = record.columns
    seen = columns["has_contrast"].astype(bool).tolist()
    delta, weight, logit = (_hundredths(columns[name]) for name in ("delta", "weight", "logit_with"))
    return [[one if has else None for one, has in zip(delta, seen, strict=True)], weight, logit]


def _hundredths(values: np.ndarray) -> list[int | str]:
    """In hundredths; "nan", "inf" or "-inf" for what is not finite."""
    hundredths = np.rint(values.astype(np.float64) * _HUNDREDTHS).tolist()
    return [int(one) if math.isfinite(one) else str(one) for one in hundredths]


def _not_finite(*sides: RecordScores | None) -> int:
    """How many of a record's tokens after an image have a number, of either model, that is not finite."""
    strange: Any = 0
    for columns in (side.columns for side in sides if side is not None):
        seen = columns["has_contrast"].astype(bool)
        finite = np.isfinite([columns[name].astype(np.float64) for name in ("delta", "weight", "logit_with")]).all(
            axis=0
        )
        strange = strange | (seen & ~finite)
    return int(np.sum(strange))
