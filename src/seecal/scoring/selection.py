"""``seecal filter``: which records and tokens stay, by their scores, and the data set without the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import read_manifest
from .read import RecordScores, read_scores
from .records import Data, scored_data
from .shards import Skipped
from .token_rules import Place, TokenRule, check_whole, counts, weights
from .write_back import write_back

BY = ("delta", "gain")


@dataclass
class FilterReport:
    """What a filter did.

    Attributes:
        kept, removed: how many rows of the data stay and go; those without scores go. With ``invert``, those that go are
            what is written.
        text_only: how many of those that stay have no image to be judged by.
        threshold: with ``top``, the least mean of a record that stays, in logits (by="delta") or nats (by="gain").
        reasons: why -> how many.
        tokens, tokens_removed: with ``tokens``, how many label tokens the records that stay have, and how many of them get
            weight 0.
        not_finite: how many label tokens have a score that is no finite number (a Δ or a gain that was read). They are left
            out of all shares and means, and with ``tokens`` get weight 0.
        log: the file that names each row that went or lost tokens, and why.
    """

    kept: int = 0
    removed: int = 0
    text_only: int = 0
    threshold: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    tokens_removed: int = 0
    not_finite: int = 0
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
        tokens: also go by token: those with Δ below ``below``; by="gain": those with a gain below the threshold of ``top``.
    """

    max_contradictory: float | None = None
    below: float = -1.0
    min_delta: float | None = None
    top: float | None = None
    by: str = "delta"
    tokens: bool = False

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by={self.by!r}: expected one of {', '.join(BY)}")
        for name in ("max_contradictory", "top"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a share from 0 to 1")
        if self.max_contradictory is self.min_delta is self.top is None and not self.tokens:
            raise ValueError("nothing to filter by. Set max_contradictory, min_delta or top, or tokens.")
        if self.tokens and self.by == "gain" and self.top is None:
            raise ValueError(
                "tokens by gain need a threshold, which top finds: the least mean gain of the records that stay. Set top."
            )

    def of_tokens(self, threshold: float | None) -> TokenRule | None:
        """The rule for single tokens. ``threshold``: what ``top`` has found; None where no record has an image."""
        if not self.tokens:
            return None
        return TokenRule(self.by, self.below if self.by == "delta" or threshold is None else threshold)


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
    tokens: bool = False,
    invert: bool = False,
) -> FilterReport:
    """Writes the data set without the records, or tokens, whose scores speak against them, in its own format.

    Rows stay as they are and in order. Records without any image are kept: nothing speaks for or against them. Rows that
    were not scored go. Which rows went, and why, stands in ``OUT.removed.jsonl``.

    With ``tokens`` each record that stays gets a column ``weights``, 1 for each label token that stays and 0 for the
    others, and ``weight_ids``, the ids that they belong to: training takes both, and refuses another tokenizer or template.
    A record whose tokens all go goes itself.

    Args:
        scores: what :func:`seecal.score` wrote.
        out: the file (for a saved data set or a folder of Parquet files: the folder) to write; it must not be there yet.
        data, image_root: the data that was scored; None: where the scores say it lay.
        max_contradictory, below, min_delta, top, by: as of :class:`Rules`. by="gain" needs scores with log-probabilities,
            and its threshold is what ``weighting="vig"`` takes.
        tokens: whether to go by token too. by="delta": those with Δ below ``below`` go; by="gain": those with a gain below
            the threshold of ``top``, so that the weights are those of ``weighting="vig"`` with it.
        invert: write what would go instead, as it is, to look at: records, and with ``tokens`` also those that would lose a
            token.

    Raises:
        ValueError: no rule, scores that are not whole, data that is not what was scored, or an ``out`` that is there; by
            token, records that bring weights, or a format that holds no lists (CSV, TSV).
        FileNotFoundError: no such data.
    """
    rules = Rules(max_contradictory, below, min_delta, top, by, tokens)
    if Path(out).exists():
        raise ValueError(f"{out}: is there already. Set --out to a new name.")
    manifest = read_manifest(scores)
    data, source = scored_data(scores, manifest.data, data, image_root)
    report = FilterReport()
    removed = removed_by(scores, rules, report)
    rule = rules.of_tokens(report.threshold)
    fewer: dict[Place, dict[str, Any]] = {}
    if rule is not None:
        check_whole(manifest, scores)
        _refuse_weights(data, source)
        fewer = fewer_tokens(scores, rule, removed, report)
    keep, lost, lines = np.ones(int(manifest.data["rows"]), dtype=bool), np.zeros(int(manifest.data["rows"]), bool), []
    for number, row in enumerate(source.rows(lambda number: False)):
        place = (row.source, row.row)
        if (why := removed.get(place) or fewer.get(place)) is not None:
            keep[number], lost[number] = place not in removed, True
            lines.append({"source": row.source, "row": row.row, **why})
    report.kept, report.removed = int(keep.sum()), int((~keep).sum())
    added = None if rule is None or invert else weights(scores, rule, lambda place: place not in removed)
    write_back(data, Path(out), lost if invert else keep, added)
    report.log = Path(f"{out}.removed.jsonl")
    report.log.write_text(json_lines(lines), "utf8")
    return report


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """One line a row, in strict JSON."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _refuse_weights(data: Any, source: Data) -> None:
    first = next((row.record for row in source.rows() if row.record is not None), {})  # every record has them, or none
    if "weights" in first or "weights" in getattr(data, "column_names", ()):
        raise ValueError(
            f"{source.name}: its records bring weights of their tokens already. Take the column out and score that, or "
            "filter by record, without tokens."
        )


def fewer_tokens(
    scores: str | Path, rule: TokenRule, removed: dict[Place, dict[str, Any]], report: FilterReport
) -> dict[Place, dict[str, Any]]:
    """(source, row) → how many tokens a record loses that stays. One that would lose all is put into ``removed``."""
    fewer: dict[Place, dict[str, Any]] = {}
    for place, record, stay, count in counts(scores, rule):
        if place in removed:
            continue
        if not stay:
            removed[place] = {"record": record, "why": "all its tokens", "value": count}
            report.reasons["all its tokens"] = report.reasons.get("all its tokens", 0) + 1
            continue
        report.tokens += count
        report.tokens_removed += count - stay
        if stay < count:
            fewer[place] = {"record": record, "why": "tokens", "value": count - stay, "of": count}
    return fewer


def removed_by(scores: str | Path, rules: Rules, report: FilterReport) -> dict[tuple[str, int], dict[str, Any]]:
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
        seen = scored.columns["has_contrast"].astype(bool)
        if not seen.any():
            report.text_only += 1
            continue
        delta, gains = _finite_values(scored, rules, report)
        if not len(delta) or not len(gains):
            remove(place, scored.record, "no finite score", len(seen))
            continue
        share, mean = float((delta < rules.below).mean()), float(delta.mean())
        if rules.max_contradictory is not None and share > rules.max_contradictory:
            remove(place, scored.record, "contradictory", round(share, 4))
        elif rules.min_delta is not None and mean < rules.min_delta:
            remove(place, scored.record, "mean delta", round(mean, 4))
        if rules.top is not None:
            means[place] = (scored.record, float(gains.mean()) if rules.by == "gain" else mean)
    if rules.top is not None and means:
        report.threshold = _threshold([mean for _, mean in means.values()], rules.top)
        for place, (record, mean) in means.items():
            if mean < report.threshold and place not in removed:
                remove(place, record, f"below the top {rules.top:g} by {rules.by}", round(mean, 4))
    return removed


def _finite_values(scored: RecordScores, rules: Rules, report: FilterReport) -> tuple[np.ndarray, np.ndarray]:
    """(Δ of a record's tokens with an image, the gains of all its label tokens), float64, those that are finite numbers.

    A gain that nobody asks for is Δ. The others are counted in the report.
    """
    seen, delta = scored.columns["has_contrast"].astype(bool), scored.columns["delta"].astype(np.float64)
    odd = seen & ~np.isfinite(delta)
    gains = delta
    if rules.by == "gain":
        with np.errstate(invalid="ignore"):  # -inf - -inf
            gains = scored.columns["logprob_with"].astype(np.float64) - scored.columns["logprob_without"]
        odd = odd | ~np.isfinite(gains)
    report.not_finite += int(odd.sum())
    return delta[seen & np.isfinite(delta)], gains[np.isfinite(gains)]


def _threshold(means: list[float], top: float) -> float:
    """The value that ``top`` of the means are not below."""
    count = math.ceil(round(top * len(means), 9))
    return sorted(means, reverse=True)[count - 1] if count else math.inf
