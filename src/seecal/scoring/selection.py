"""``seecal filter``: which records stay, by their scores, and the data set without the others."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import read_manifest
from .read import read_scores
from .records import Data
from .shards import Skipped
from .write_back import write_back

BY = ("delta", "gain")


@dataclass
class FilterReport:
    """What a filter did.

    Attributes:
        kept, removed: how many rows of the data stay and go; those without scores go.
        text_only: how many of those that stay have no image to be judged by.
        threshold: with ``top``, the least mean of a record that stays, in logits (by="delta") or nats (by="gain").
        reasons: why -> how many.
        log: the file that names each row that went, and why.
    """

    kept: int = 0
    removed: int = 0
    text_only: int = 0
    threshold: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    log: Path | None = None


@dataclass(frozen=True)
class Rules:
    """What a record must meet to stay; None: no such rule.

    Attributes:
        max_contradictory: largest share of its tokens with an image whose Δ is below ``below``.
        below: in logits.
        min_delta: least mean Δ of its tokens with an image, in logits.
        top: the share of the records with images that stay, those with the highest mean.
        by: what ``top`` compares: "delta", the mean Δ of tokens with an image; "gain", VIG's: the mean over all label
            tokens of log-probability with minus without the image, in nats.
    """

    max_contradictory: float | None = None
    below: float = -1.0
    min_delta: float | None = None
    top: float | None = None
    by: str = "delta"

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by={self.by!r}: expected one of {', '.join(BY)}")
        for name in ("max_contradictory", "top"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a share from 0 to 1")
        if self.max_contradictory is self.min_delta is self.top is None:
            raise ValueError("nothing to filter by. Set max_contradictory, min_delta or top.")


def filter(
    scores: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    image_root: str | Path | None = None,
    max_contradictory: float | None = None,
    below: float = -1.0,
    min_delta: float | None = None,
    top: float | None = None,
    by: str = "delta",
) -> FilterReport:
    """Writes the data set without the records whose scores speak against them, in its own format.

    Rows stay as they are and in order. Records without any image are kept: nothing speaks for or against them. Rows that
    were not scored go. Which rows went, and why, stands in ``OUT.removed.jsonl``.

    Args:
        scores: what :func:`seecal.score` wrote.
        out: the file (for a saved data set or a folder of Parquet files: the folder) to write; it must not be there yet.
        data, image_root: the data that was scored; None: where the scores say it lay.
        max_contradictory: largest share of a record's tokens whose Δ is below ``below`` (in logits).
        min_delta: least mean Δ of a record, in logits.
        top: the share of the records with images to keep, those with the highest mean.
        by: what ``top`` compares: "delta", or "gain" in nats (needs scores with log-probabilities), whose threshold is
            what ``weighting="vig"`` takes.

    Raises:
        ValueError: no rule, scores that are not whole, data that is not what was scored, or an ``out`` that is there.
        FileNotFoundError: no such data.
    """
    rules = Rules(max_contradictory, below, min_delta, top, by)
    if Path(out).exists():
        raise ValueError(f"{out}: is there already. Set --out to a new name.")
    manifest = read_manifest(scores)
    told = manifest.data
    if data is None:
        if told["format"] == "records" or told["name"] == "the data set":
            raise ValueError(f"{scores}: the data was a set in memory. Pass it as data=...")
        data, image_root = told["name"], image_root or told["image_root"]
    source = Data(data, None if told["format"] == "records" else told["format"], image_root)
    fingerprint, _ = source.fingerprint(on_bad="skip")
    if fingerprint != told["fingerprint"]:
        raise ValueError(
            f"{scores}: these are scores of another version of {source.name}: its rows, texts or image names have changed. "
            "Score it again into an empty folder."
        )
    report = FilterReport()
    removed = _removed(scores, rules, report)
    keep = np.ones(int(told["rows"]), dtype=bool)
    log = Path(f"{out}.removed.jsonl")
    lines = []
    for number, row in enumerate(source.rows(lambda number: False)):
        if (why := removed.get((row.source, row.row))) is not None:
            keep[number] = False
            lines.append({"source": row.source, "row": row.row, **why})
    report.kept, report.removed = int(keep.sum()), int((~keep).sum())
    write_back(data, Path(out), keep)
    log.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf8")
    report.log = log
    return report


def _removed(scores: str | Path, rules: Rules, report: FilterReport) -> dict[tuple[str, int], dict[str, Any]]:
    """(source, row) → why it goes. Counts reasons and text-only records in the report."""
    columns = ["has_contrast", "delta", *(["logprob_with", "logprob_without"] if rules.by == "gain" else [])]
    removed: dict[tuple[str, int], dict[str, Any]] = {}
    means: dict[tuple[str, int], tuple[str, float]] = {}

    def remove(place: tuple[str, int], record: str | None, rule: str, value: Any) -> None:
        removed[place] = {"record": record, "why": rule, "value": value}
        report.reasons[rule] = report.reasons.get(rule, 0) + 1

    for scored in read_scores(scores, columns):
        place = (scored.source, scored.row)
        if isinstance(scored, Skipped):
            remove(place, scored.record, "not scored", scored.reason)
            continue
        seen = scored.columns["has_contrast"]
        if not seen.any():
            report.text_only += 1
            continue
        delta = scored.columns["delta"][seen].astype(np.float64)
        share, mean = float((delta < rules.below).mean()), float(delta.mean())
        if rules.max_contradictory is not None and share > rules.max_contradictory:
            remove(place, scored.record, "contradictory", round(share, 4))
        elif rules.min_delta is not None and mean < rules.min_delta:
            remove(place, scored.record, "mean delta", round(mean, 4))
        if rules.top is not None:
            if rules.by == "gain":
                gains = scored.columns["logprob_with"].astype(np.float64) - scored.columns["logprob_without"]
                mean = float(gains.mean())
            means[place] = (scored.record, mean)
    if rules.top is not None and means:
        report.threshold = _threshold([mean for _, mean in means.values()], rules.top)
        for place, (record, mean) in means.items():
            if mean < report.threshold and place not in removed:
                remove(place, record, f"below the top {rules.top:g} by {rules.by}", round(mean, 4))
    return removed


def _threshold(means: list[float], top: float) -> float:
    """The value that ``top`` of the means are not below."""
    count = math.ceil(round(top * len(means), 9))
    return sorted(means, reverse=True)[count - 1] if count else math.inf
