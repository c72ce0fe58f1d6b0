"""``seecal filter --tokens``: which label tokens stay, as weights of 1 and 0 that come with the written records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import Manifest
from .read import read_scores
from .shards import Skipped

Place = tuple[str, int]  # (source, row)
GAIN = ("logprob_with", "logprob_without")


@dataclass(frozen=True)
class TokenRule:
    """When a label token stays.

    Attributes:
        by: "delta": Δ ≥ ``least``, or no image before it. "gain": the difference of its log-probabilities with and without
            the image ≥ ``least``, as VIG has it. Records without any image keep all their tokens. A token whose Δ or
            gain is no finite number goes.
        least: in logits, or in nats.
    """

    by: str
    least: float

    @property
    def columns(self) -> list[str]:
        """Of the scores, those that it reads."""
        return ["has_contrast", *(GAIN if self.by == "gain" else ["delta"])]

    def stays(self, columns: dict[str, Any]) -> np.ndarray:
        """[N] bool of a record's label tokens."""
        seen: np.ndarray = columns["has_contrast"].astype(bool)
        if self.by == "delta":
            return ~seen | (np.isfinite(columns["delta"]) & (columns["delta"] >= self.least))
        with np.errstate(invalid="ignore"):  # -inf - -inf
            gains = columns["logprob_with"] - columns["logprob_without"]  # float32, as the weighting has it
        return (np.isfinite(gains) & (gains >= np.float32(self.least))) | (not seen.any())


def check_whole(manifest: Manifest, scores: str | Path) -> None:
    """ValueError for scores that end before their records do: their weights would not fit."""
    if manifest.options.get("on_long") == "truncate" and manifest.options.get("max_length") is not None:
        raise ValueError(
            f"{scores}: records over {manifest.options['max_length']} tokens were cut when they were scored, so the rest "
            "of their tokens has no scores. Score without on_long='truncate' to filter by token."
        )


def counts(scores: str | Path, rule: TokenRule) -> Iterator[tuple[Place, str, int, int]]:
    """(place, id, how many of its label tokens stay, how many it has) of each record that was scored."""
    for scored in read_scores(scores, rule.columns):
        if not isinstance(scored, Skipped):
            stays = rule.stays(scored.columns)
            yield (scored.source, scored.row), scored.record, int(stays.sum()), len(stays)


def weights(scores: str | Path, rule: TokenRule, kept: Callable[[Place], bool]) -> Iterator[dict[str, list[Any]]]:
    """``weights`` (1 for a token that stays, else 0) and the ``weight_ids`` that they belong to, of the records that are
    kept, in the order of the data. One shard of the scores is in memory."""
    for scored in read_scores(scores, [*rule.columns, "token_id"]):
        if not isinstance(scored, Skipped) and kept((scored.source, scored.row)):
            yield {
                "weights": rule.stays(scored.columns).astype(float).tolist(),
                "weight_ids": scored.columns["token_id"].tolist(),
            }
