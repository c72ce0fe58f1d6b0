"""The rows of one shard: records → batches → Δ, weights and spans of every label token.

B rows of a batch, L columns, N label tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..constants import IGNORE_INDEX, LENGTH_COUNTS
from ..core.contrasts import contrast_named
from ..core.enable import visual_delta
from ..core.options import CALOptions
from ..core.outputs import VisualDelta
from ..core.weighting import weights_of
from ..data.collators.conversation import ConversationEncoder
from ..data.collators.vision import VisionCollator
from ..data.sources.load import Located
from .shards import ShardNote, Skipped, columns
from .spans import LabelToken, label_tokens


@dataclass
class Scorer:
    """Scores rows of a data set with one model.

    Args:
        model: in eval mode.
        processor: of the model.
        options: how Δ is measured and weighted.
        logprobs: whether to measure both log-probabilities too.
        max_length, on_long: as of :class:`seecal.VisionCollator`; "error" or "truncate".
        batch_size: records in a batch.
        on_bad: "error", or "skip": a record that cannot be used has no rows, and is noted.
        train_on: which turns have label tokens, as of :class:`seecal.VisionCollator`.
    """

    model: Any
    processor: Any
    options: CALOptions
    logprobs: bool = False
    max_length: int | None = None
    on_long: str = "error"
    batch_size: int = 8
    on_bad: str = "error"
    train_on: str = "all"

    def __post_init__(self) -> None:
        on_pixels = contrast_named(self.options.contrast).on_pixels
        self._collator = VisionCollator(
            self.processor,
            self.max_length,
            on_long=self.on_long,
            contrast=self.options.contrast if on_pixels else None,
            strength=self.options.strength,
            train_on=self.train_on,
        )
        self._encoder = ConversationEncoder(self.processor, train_on=self.train_on)
        # Log-probabilities are measured for a Δ made of them; Δ itself is put back afterwards
        as_logits = self.logprobs and self.options.delta == "logit"
        self._measured = dataclasses.replace(self.options, delta="logprob") if as_logits else self.options

    def shard(
        self, located: Sequence[Located], done: Callable[[int], Any] = lambda rows: None, spare: Any = None
    ) -> tuple[dict[str, list[Any]], ShardNote]:
        """(column → values, what to note) of consecutive rows of the data.

        The numbers depend on these rows alone: batches are cut among them.

        Args:
            done: gets how many rows, batch by batch.
            spare: an image to swap with, should only one of the rows have any.

        Raises:
            ValueError, OSError: with on_bad="error", the first record that cannot be used, by name.
        """
        skipped = [Skipped(row.source, row.row, None, row.error) for row in located if row.error is not None]
        if skipped and self.on_bad == "error":
            raise ValueError(skipped[0].reason)
        usable = [row for row in located if row.record is not None]
        # contrast="swap" keeps an image of an earlier batch: of this shard's, not of what a restart happened to score
        self._collator._spare = spare
        found: dict[str, list[Any]] = {name: [] for name in columns(self.logprobs)}
        scored = 0
        done(len(skipped))
        for begin in range(0, len(usable), self.batch_size):
            together = usable[begin : begin + self.batch_size]
            rows, batch = self._batch(together, skipped)
            if rows:
                self._add(found, rows, batch)
            scored += len(rows)
            done(len(together))
        order = {(row.source, row.row): number for number, row in enumerate(located)}
        skipped.sort(key=lambda bad: order[bad.source, bad.row])
        return found, ShardNote(scored, len(found["row"]), sum(found["has_contrast"]), skipped)

    def one(self, row: Located) -> tuple[VisualDelta, list[LabelToken]]:
        """(Δ of one record, its label tokens)."""
        batch, tokens = self.collated(row)
        return self.measure(batch), tokens

    def collated(self, row: Located) -> tuple[dict[str, Any], list[LabelToken]]:
        """(the batch of one record, its label tokens)."""
        batch = _collated(self._collator, [row])
        return batch, self._tokens(row, batch["labels"][0].tolist())

    def measure(self, batch: dict[str, Any]) -> VisualDelta:
        """Δ of a collated batch, on the host, with log-probabilities where they were asked for."""
        delta = delta_of(self.model, batch, self._measured)
        if self._measured is not self.options:
            assert delta.logit_with is not None
            assert delta.logit_without is not None
            delta = dataclasses.replace(delta, delta=delta.logit_with - delta.logit_without)
        return delta

    def _batch(self, rows: list[Located], skipped: list[Skipped]) -> tuple[list[Located], dict[str, Any]]:
        """(the rows that can be used, their batch). Images are opened once, unless a record of the batch is bad."""
        try:
            return rows, _collated(self._collator, rows)
        except (ValueError, OSError):
            if self.on_bad == "error":
                raise
        alone = dataclasses.replace(self._collator, contrast=None)  # whose swapped image needs another record
        good = []
        for row in rows:
            try:
                _collated(alone, [row])
            except (ValueError, OSError) as error:
                reason = " ".join(f"{row.source}: row {row.row}: {error}".split())
                skipped.append(Skipped(row.source, row.row, _id_of(row), reason))
            else:
                good.append(row)
        return (good, _collated(self._collator, good)) if good else ([], {})

    def _add(self, found: dict[str, list[Any]], rows: list[Located], batch: dict[str, Any]) -> None:
        """One row a label token, in the order of VisualDelta's: row by row of the batch."""
        delta = self.measure(batch)
        measured = {"delta": delta.delta, "weight": weights_of(delta, self.options)}
        measured |= {"has_contrast": delta.has_contrast, "position": delta.position}
        measured |= {name: getattr(delta, name) for name in ("logit_with", "logit_without")}
        if self.logprobs:
            measured |= {name: getattr(delta, name) for name in ("logprob_with", "logprob_without")}
        for name, values in measured.items():
            found[name] += values.tolist()
        tokenizer = self.processor.tokenizer
        for row, labels_L in zip(rows, batch["labels"], strict=True):
            for token in self._tokens(row, labels_L.tolist()):
                found["source"].append(row.source)
                found["row"].append(row.row)
                found["record"].append(_id_of(row))
                found["turn"].append(token.turn)
                found["token_id"].append(token.token_id)
                found["token"].append(token.text or tokenizer.convert_ids_to_tokens(token.token_id))
                found["start"].append(token.start)
                found["stop"].append(token.stop)
        assert len({len(values) for values in found.values()}) == 1, "every label token has one value in each column"

    def _tokens(self, row: Located, labels: list[int]) -> list[LabelToken]:
        """The record's label tokens that are in the batch: all, or those before ``max_length``; never one in column 0."""
        assert row.record is not None
        tokens = label_tokens(self._encoder.encode(row.record, str(_id_of(row))))
        labelled = [index for index in labels if index != IGNORE_INDEX]
        tokens = tokens[: len(labelled)]
        assert [token.token_id for token in tokens] == labelled, f"{_id_of(row)}: spans of other tokens than its labels"
        return tokens[labels[0] != IGNORE_INDEX :]


def delta_of(model: Any, batch: dict[str, Any], options: CALOptions) -> VisualDelta:
    """Δ of a collated batch that is still on the host."""
    first = next(model.parameters())
    inputs = {
        name: value.to(first.device, first.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    return visual_delta(model, inputs, contrast=options.contrast, options=options)


def _id_of(row: Located) -> str:
    assert row.record is not None
    return str(row.record["id"])


def _collated(collator: VisionCollator, rows: Sequence[Located]) -> dict[str, Any]:
    batch = dict(collator([row.record for row in rows if row.record is not None]))
    batch.pop(LENGTH_COUNTS, None)
    return batch
