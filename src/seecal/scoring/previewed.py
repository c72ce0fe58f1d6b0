"""What a preview holds: records as the model will see them, and what is wrong with others. Without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

# What can be wrong with a record, in the order in which it is told
KINDS = {
    "format": "is no record of its format",
    "missing": "an image is missing",
    "image": "an image cannot be used",
    "answer": "has no answer to learn: every label is masked",
    "token": "an image token stands inside its text",
    "template": "the chat template does not fit it",
    "processor": "the processor fails on it",
    "weights": "its weights are not those of its tokens",
    "long": "is longer than max_length",
    "image beyond": "an image ends after max_length",
    "answer beyond": "its answers begin after max_length",
}
STOPS, LEFT_OUT, PUT_ASIDE, CUT = "stops", "left out", "put aside, another takes its place", "cut"


@dataclass(frozen=True)
class Piece:
    """A token of a record, or all the tokens of an image.

    Attributes:
        text: what of the rendered text it is; the token's name where it is none of it, "" for a later byte of a character.
        tokens: how many; more than 1 only for images.
        token_id: None for images.
        label: whether it is learnt.
        special: whether it is a special token.
        images: the numbers, from 1, of the images that it stands for.
        cut: whether it lies after ``max_length`` and is cut.
        delta: in logits; None where it was not measured, or no image stands before it.
        weight: of its cross-entropy; None where it was not measured.
    """

    text: str
    tokens: int = 1
    token_id: int | None = None
    label: bool = False
    special: bool = False
    images: tuple[int, ...] = ()
    cut: bool = False
    delta: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a record: a small copy, and its real width and height in pixels."""

    image: Image.Image
    width: int
    height: int


@dataclass
class PreviewedRecord:
    """A record as the model will see it.

    Attributes:
        source, row: its place in the data.
        id: its own, or its place.
        pieces: its tokens in order.
        pictures: its images.
        batch: what the collator made of it: what training gets, but for the images of a pixel contrast.
        measured: whether Δ was measured.
    """

    source: str
    row: int
    id: str
    pieces: list[Piece]
    pictures: list[Picture]
    batch: dict[str, Any] = field(repr=False)
    measured: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens training sees."""
        return sum(piece.tokens for piece in self.pieces if not piece.cut)

    @property
    def labels(self) -> int:
        """How many of them are labels."""
        return sum(piece.label for piece in self.pieces)


@dataclass(frozen=True)
class Bad:
    """A record that training cannot use as it is.

    Attributes:
        kind: a key of :data:`KINDS`.
        reason: one line that names the record.
        fate: "stops" (training ends there), "left out" or "cut".
    """

    kind: str
    reason: str
    fate: str


@dataclass(frozen=True)
class Check:
    """A check that records failed.

    Attributes:
        kind: a key of :data:`KINDS`.
        fate: what becomes of them: "stops" (training ends at the first), "left out" or "cut".
        count: how many records.
        first: of the first of them, one line that names it.
    """

    kind: str
    fate: str
    count: int
    first: str

    @property
    def text(self) -> str:
        """What is wrong."""
        return KINDS[self.kind]

    @property
    def consequence(self) -> str:
        """What training does with such records, in words."""
        return "training stops there" if self.fate == STOPS else self.fate


def checks_of(bad: Iterable[Bad]) -> list[Check]:
    """The records that are bad by kind and fate, in the order of :data:`KINDS`."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in bad:
        found.setdefault((one.kind, one.fate), []).append(one.reason)
    order = list(KINDS)
    pairs = sorted(found, key=lambda pair: (order.index(pair[0]), pair[1]))
    return [Check(kind, fate, len(found[kind, fate]), found[kind, fate][0]) for kind, fate in pairs]


@dataclass
class Preview:
    """What :func:`seecal.preview` found.

    Attributes:
        recipe: its name or path.
        stage: which of its stages, as "stage 2 of 2 (tune)".
        model: whose processor made the batches.
        settings: those of the stage that decide what is learnt, by the names of a recipe's keys.
        records: the first that training can use.
        checks: those that failed.
        looked_at: how many rows of the data were checked.
        more: whether the data has more rows.
        stopped: whether Ctrl-C ended the checks early.
        notes: what else is to be known, one line each.
        measured: whether Δ was measured.
        html: the page, if one was written.
    """

    recipe: str
    stage: str
    model: str
    settings: dict[str, Any]
    records: list[PreviewedRecord] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    looked_at: int = 0
    more: bool = False
    stopped: bool = False
    notes: list[str] = field(default_factory=list)
    measured: bool = False
    html: Path | None = None

    def looked(self) -> str:
        """How much was looked at, in words."""
        rows = f"{self.looked_at:,} record{'s' if self.looked_at != 1 else ''}"
        if self.stopped:
            return f"the first {rows} looked at, then stopped"
        return f"the first {rows} looked at" if self.more else f"{rows} looked at, all there are"

    def verdict(self) -> str:
        """One line: what the checks found."""
        if not self.checks:
            return f"{self.looked()}: every check passed"
        bad = sum(check.count for check in self.checks)
        return f"{self.looked()}: {bad:,} failed a check"
