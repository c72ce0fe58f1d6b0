"""METRICS: a row a way to measure answers. Everything that asks for a metric by its name reads this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from .anls import anls
from .choice import choice, choice_mmt, choice_scienceqa
from .cider import cider
from .exact import exact
from .iou import iou, iou_details
from .ocr import ocr
from .references import boxes, one_text, texts
from .relaxed import relaxed
from .vqa import LEAST_ANSWERS, vqa

# (prediction, references, the record's other columns) → the score of one record
Score = Callable[[str, Sequence[Any], Mapping[str, Any]], float]


@dataclass(frozen=True)
class Metric:
    """A way to measure answers.

    Attributes:
        about: what it measures and whose definition it is, in one line.
        score: of one record: (prediction, references, columns) → a number.
        of_all: instead, the scores of all records at once: (predictions, references) → N numbers. For a metric whose scores
            hang on the whole set.
        scale: the figure that is reported is the mean of the scores × this, as the papers print it.
        references: what a column of the data becomes; RecordError where it cannot.
        of_turn: what the last turn of a record becomes, where no column is named.
        least: how many references a record must have.
        groups: columns of the data by which it is also told; the first that a set has.
        mean_of_groups: the figure is the mean of the groups' means, not of the records'.
        details: further scores of one record, by name.
        columns: other columns of the data that ``score`` reads.
    """

    about: str
    score: Score | None = None
    of_all: Callable[[Sequence[str], Sequence[Sequence[Any]]], list[float]] | None = None
    scale: float = 100.0
    references: Callable[[Any], list[Any]] = texts
    of_turn: Callable[[str], list[Any]] = one_text
    least: int = 1
    groups: tuple[str, ...] = ()
    mean_of_groups: bool = False
    details: Callable[[str, Sequence[Any]], dict[str, float]] | None = None
    columns: tuple[str, ...] = ()

    def scores(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[Any]],
        records: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """The scores of N records. ``records``: the other columns of each, None where there are none."""
        if self.of_all is not None:
            return self.of_all(predictions, references)
        assert self.score is not None
        rows = [{}] * len(predictions) if records is None else records
        return [self.score(*row) for row in zip(predictions, references, rows, strict=True)]

    def figure(self, scores: Sequence[float], groups: Sequence[str] | None = None) -> float:
        """What is reported of N scores, whose records belong to ``groups``."""
        if groups is None or not self.mean_of_groups:
            return self.scale * mean(scores)
        return mean(self.by_group(scores, groups).values())

    def by_group(self, scores: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
        """The figure of each group's records."""
        found: dict[str, list[float]] = {}
        for score, group in zip(scores, groups, strict=True):
            found.setdefault(group, []).append(score)
        return {group: self.scale * mean(of_group) for group, of_group in sorted(found.items())}


def _alone(score: Callable[[str, Sequence[Any]], float]) -> Score:
    """A score that no other column changes."""
    return lambda prediction, references, record: score(prediction, references)


_LETTERS = tuple("ABCDEFGHI")

METRICS: dict[str, Metric] = {
    "exact": Metric("the answer is a reference, blanks at the ends aside; in %", _alone(exact)),
    "vqa": Metric(
        "soft accuracy over the answers of ten people (TextVQA, VQAv2); in %", _alone(vqa), least=LEAST_ANSWERS
    ),
    "anls": Metric("similarity by edit distance, from 0.5 on (DocVQA, InfoVQA); in %", _alone(anls)),
    "relaxed": Metric(
        "numbers within 5 %, else the same text (ChartQA); in %", _alone(relaxed), groups=("type", "split")
    ),
    "ocr": Metric(
        "a reference stands in the answer (OCRBench); of 1,000",
        ocr,
        scale=1000.0,
        groups=("question_type", "type"),
        columns=("dataset",),
    ),
    "cider": Metric("CIDEr-D of captions, × 100 (COCO, TextCaps)", of_all=cider),
    "iou": Metric(
        "intersection over union of boxes, and accuracies at thresholds (RefCOCOg); in %",
        _alone(iou),
        references=boxes,
        of_turn=boxes,
        details=iou_details,
    ),
    "choice": Metric(
        "the letter of the answer, the mean of the categories' means (MMStar); in %",
        _alone(choice),
        groups=("l2_category", "category"),
        mean_of_groups=True,
    ),
    "choice_mmt": Metric(
        "the letter by MMT-Bench's rule; in %", choice_mmt, groups=("l2-category", "category"), columns=_LETTERS
    ),
    "choice_scienceqa": Metric("the letter by ScienceQA's rule; in %", _alone(choice_scienceqa)),
}


def metric_named(name: str) -> Metric:
    """The row of :data:`METRICS`. ValueError for a name that is not there."""
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not known: expected one of {', '.join(METRICS)}")
    return METRICS[name]
