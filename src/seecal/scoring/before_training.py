"""What a scoring pass found once, before training, as the columns that training takes: the weights of each record's label
tokens and the ids that they belong to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, concatenate_datasets

from ..data.sources.arrow_copy import once_per_machine, write_arrow
from .join import SCHEMA, key_of, prior_weights_of
from .manifest import NAME
from .read import RecordScores, read_scores
from .selection import FilterReport, Rules, fewer_tokens, json_lines, removed_by
from .shards import Skipped

LOST = "removed.jsonl"


def are_scores(path: str | Path) -> bool:
    """Whether :func:`seecal.score` or :func:`score_reference` wrote this folder."""
    return (Path(path) / NAME).is_file()


def vig_records(data: Dataset, scores: str | Path, percentile: float) -> tuple[Dataset, FilterReport]:
    """The records and tokens that VIG keeps, by the scores of all of ``data``.

    The gain of a token is its log-probability with minus without the image, that of a record the mean over its label
    tokens. The threshold is what ``percentile`` % of the records with an image reach; those stay, and in them the tokens
    that reach the same threshold have weight 1, the others 0. Records without an image stay as they are; records without
    scores go.

    Args:
        data: what was scored, in its order.
        scores: with log-probabilities.
        percentile: above 0, at most 100; the paper's is 70.

    Returns:
        (the records that stay, with ``weights`` and ``weight_ids``; what was removed).

    Raises:
        ValueError: scores that are not whole or lack log-probabilities, or no record that stays.

    Source: arXiv 2602.17186, sections 3.2 to 3.4.
    """
    report = FilterReport()
    rules = Rules(top=percentile / 100, by="gain", tokens=True)
    removed = removed_by(scores, rules, report)
    rule = rules.of_tokens(report.threshold)
    assert rule is not None, "it goes by token"
    fewer = fewer_tokens(scores, rule, removed, report)

    def weights(record: RecordScores) -> np.ndarray | None:
        return None if (record.source, record.row) in removed else rule.stays(record.columns).astype(np.float32)

    kept = _with_weights(data, scores, rule.columns, weights, f"vig {percentile}")
    report.kept, report.removed, report.log = len(kept), len(data) - len(kept), Path(scores) / LOST
    lost = ({"source": source, "row": row, **why} for (source, row), why in sorted({**fewer, **removed}.items()))
    _write_once(report.log, json_lines(lost))
    _write_once(Path(scores) / "vig.json", json.dumps(_told(report, percentile), indent=1, allow_nan=False) + "\n")
    if not len(kept):
        raise ValueError(
            f"{scores}: no record stays of {len(data)} with vig_percentile={percentile:g}; see {report.log}"
        )
    return kept, report


def prior_records(data: Dataset, scores: str | Path, exponent: float) -> Dataset:
    """``data`` with PRIOR's weights by the log-probabilities without an image in the scores; records without scores go."""

    def weights(record: RecordScores) -> np.ndarray:
        return prior_weights_of(record, exponent)

    return _with_weights(data, scores, ["logprob_without"], weights, f"prior {exponent}")


def _with_weights(
    data: Dataset,
    scores: str | Path,
    columns: Sequence[str],
    weights: Callable[[RecordScores], np.ndarray | None],
    called: str,
) -> Dataset:
    """The rows of ``data`` for which ``weights`` gives any, with them and their ids beside. The rows are not copied."""

    def rows() -> Iterator[dict[str, Any]]:
        place = 0
        for record in read_scores(scores, [*columns, "token_id"]):
            if isinstance(record, Skipped):
                continue
            found = weights(record)
            if found is None:
                continue
            yield from ({"weights": None, "weight_ids": None} for _ in range(place, record.row))
            yield {"weights": found, "weight_ids": record.columns["token_id"]}
            place = record.row + 1
        yield from ({"weights": None, "weight_ids": None} for _ in range(place, len(data)))

    path, _ = once_per_machine(
        lambda: [called, *key_of(data, Path(scores))], lambda: (write_arrow("weights", SCHEMA, rows(), ""), None)
    )
    beside = Dataset.from_file(str(path))
    valid = pyarrow.chunked_array(beside.data.column("weights").chunks).is_valid().to_numpy()
    return concatenate_datasets([data, beside], axis=1).select(np.flatnonzero(valid))


def _told(report: FilterReport, percentile: float) -> dict[str, Any]:
    told = {name: value for name, value in dataclasses.asdict(report).items() if name != "log"}
    return {"percentile": percentile, "unit": "nats", **told}


def _write_once(path: Path, text: str) -> None:
    """Aside and renamed: every rank writes the same."""
    aside = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.part")
    aside.write_text(text, "utf8")
    aside.replace(path)
