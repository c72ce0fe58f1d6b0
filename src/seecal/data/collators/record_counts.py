"""How many records a collator left out or cut. Counted in every batch; said once, with the first record's name."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import check_on_bad
from .shared import SharedInt

logger = logging.getLogger(__name__)


@dataclass
class RecordCounts:
    """The counts of the batch that is being made, and what becomes of a record without a label.

    Args:
        on_bad: "error" or "skip": ``on_bad`` of :class:`seecal.VisionCollator`.
    """

    on_bad: str = "error"
    # Whether it was said already, in any worker
    said_long: int = SharedInt(0)  # type: ignore[assignment]  # a descriptor, which dataclasses read as the default
    said_bad: int = SharedInt(0)  # type: ignore[assignment]
    said_cut: int = SharedInt(0)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_on_bad(self.on_bad)
        self._dropped = self._truncated = 0

    def too_long(self, name: str, tokens: int, max_length: int | None) -> None:
        """One more record was left out because of its length."""
        self._dropped += 1
        if not self.said_long:
            self.said_long = 1
            _say(
                f"{name} is left out: {tokens} tokens are more than max_length={max_length} (on_long='drop')", "dropped"
            )

    def cut(self, name: str, tokens: int, max_length: int | None) -> None:
        """One more record was cut to ``max_length``."""
        self._truncated += 1
        if not self.said_cut:
            self.said_cut = 1
            _say(f"{name} is cut from {tokens} tokens to max_length={max_length} (on_long='truncate')", "truncated")

    def without_label(self, error: ValueError) -> None:
        """One more record has no label, as ``error`` says: raised with on_bad="error", else the record is left out."""
        if self.on_bad == "error":
            raise error
        self._dropped += 1
        if not self.said_bad:
            self.said_bad = 1
            _say(f"left out, {error} (on_bad='skip')", "dropped")

    def take(self) -> Tensor:
        """[2]: how many were left out and how many cut since it was asked last."""
        counts = torch.tensor([self._dropped, self._truncated])
        self._dropped = self._truncated = 0
        return counts


def _say(what: str, key: str) -> None:
    logger.warning("%s. This is said once; the log's records_%s counts them all", what, key)
