"""Scores by a model that sees no image: how likely each label token is by the text alone, as PRIOR weights them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..core.options import CALOptions
from ..core.outputs import VisualDelta
from ..data.sources.load import Located
from ..models.reference import load_reference
from .measure import Scorer
from .records import Data
from .run import ScoreReport, ScoreSettings, score_with, told_of
from .shards import Skipped

# Logits held at once: 2**27 float32 are 512 MiB.
_LOGITS = 1 << 27


def score_reference(
    reference: str,
    data: Any,
    out: str | Path,
    *,
    processor: Any,
    options: CALOptions | None = None,
    train_on: str = "all",
    batch_size: int = 8,
    records_per_shard: int = 256,
    on_bad: str = "error",
    format: str | None = None,
    image_root: str | Path | None = None,
    dtype: Any = "auto",
    device: Any = None,
    console: Any = None,
) -> ScoreReport:
    """Writes log p(t | text) of every label token by a reference model, as :func:`seecal.score` writes its scores.

    The reference reads what the model that trains reads, without the image: its chat template's text, prompt and answers,
    each label token after all that stands before it. Where nothing does (a caption alone, from a tokenizer that begins
    with no token of its own) it reads the token that ends a text first. No image is opened.

    ``logprob_with`` and ``logprob_without`` are both that log-probability, in nats; Δ is 0 and ``has_contrast`` False.
    ``weight`` is PRIOR's.

    Args:
        reference: a folder or hub id of a language model or vision-language model with the tokenizer of ``processor``.
        data, out, on_bad, format, image_root, batch_size, records_per_shard, dtype, console: as of :func:`seecal.score`.
        processor: of the model that trains.
        options: ``prior_exponent`` of them; None: 1.
        train_on: which turns are labels, as of :class:`seecal.VisionCollator`.
        device: of the reference; None: a GPU where there is one.

    Raises:
        ValueError: a reference that cannot be loaded or that has other tokens, or what :func:`seecal.score` raises.
    """
    chosen = dataclasses.replace(options or CALOptions(), weighting="prior", contrast="drop", contrast_strength=None)
    settings = _ReferenceSettings(
        chosen, True, None, "error", batch_size, records_per_shard, on_bad, train_on, reference=True
    )

    def load() -> tuple[Any, Any, dict[str, Any]]:
        network = load_reference(reference, processor.tokenizer, dtype=dtype)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return network.to(place), processor, told_of(network, processor, reference, None)

    return score_with(Data(data, format, image_root), load, Path(out), settings, console)


@dataclass(frozen=True)
class _ReferenceSettings(ScoreSettings):
    reference: bool = False

    def scorer(self, model: Any, processor: Any) -> Scorer:
        return ReferenceScorer(
            model, processor, self.options, True, None, "error", self.batch_size, self.on_bad, self.train_on
        )


class ReferenceScorer(Scorer):
    """A :class:`Scorer` whose model reads the text alone."""

    def measure(self, batch: dict[str, Any]) -> VisualDelta:
        """p of the batch's label tokens by its text, as if nothing could be taken away."""
        labels_BL = batch["labels"]
        sample, column = (labels_BL[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        logprob = torch.cat([torch.zeros(0), *self._logprobs(batch)])
        nothing = torch.zeros_like(logprob)
        return VisualDelta(
            delta=nothing,
            labels=labels_BL[sample, column + 1],
            sample=sample,
            position=column + 1,
            has_contrast=nothing.bool(),
            logit_with=nothing,
            logit_without=nothing,
            logprob_with=logprob,
            logprob_without=logprob,
        )

    @torch.no_grad()
    def _logprobs(self, batch: dict[str, Any]) -> list[Tensor]:
        """[n] for every few rows, on the host."""
        device = next(self.model.parameters()).device
        ids_BL, mask_BL, labels_BL = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        at_once = max(1, _LOGITS // (ids_BL.shape[1] * self._vocabulary))
        found = []
        for begin in range(0, len(ids_BL), at_once):
            rows = slice(begin, begin + at_once)
            logits_BLV = self.model(input_ids=ids_BL[rows], attention_mask=mask_BL[rows], use_cache=False).logits
            targets = labels_BL[rows, 1:]
            counts = targets != IGNORE_INDEX
            logits_NV = logits_BLV[:, :-1][counts].float()
            found.append(-torch.nn.functional.cross_entropy(logits_NV, targets[counts], reduction="none").cpu())
        return found

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _batch(self, rows: list[Located], skipped: list[Skipped]) -> tuple[list[Located], dict[str, Any]]:
        good, texts = [], []
        for row in rows:
            try:
                texts.append(self._text(row))
                good.append(row)
            except (ValueError, OSError) as error:
                if self.on_bad == "error":
                    raise
                assert row.record is not None
                reason = " ".join(f"{row.source}: row {row.row}: {error}".split())
                skipped.append(Skipped(row.source, row.row, str(row.record["id"]), reason))
        if not good:
            return [], {}
        length = max(len(ids) for ids, _ in texts)
        shape = (len(good), length)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        batch["labels"] = torch.full(shape, IGNORE_INDEX)
        for number, (ids, labels) in enumerate(texts):
            batch["input_ids"][number, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][number, : len(ids)] = 1
            batch["labels"][number, : len(ids)] = torch.tensor(labels)
        return good, batch

    def _text(self, row: Located) -> tuple[list[int], list[int]]:
        """(ids, labels) of a record without what stands for its images."""
        assert row.record is not None
        name = str(row.record["id"])
        conversation, size = self._encoder.encode(row.record, name), self._vocabulary
        ids, labels = [], []
        images = {*conversation.ids.placeholders}
        for place, (index, is_label) in enumerate(zip(conversation.ids.ids, conversation.labelled, strict=True)):
            if index >= size and is_label:
                raise ValueError(
                    f"{name}: the reference has no token of id {index}, which is a label here. Take a reference with the "
                    "model's own vocabulary."
                )
            if place not in images and index not in self._encoder.image_ids and 0 <= index < size:
                ids.append(index)
                labels.append(index if is_label else IGNORE_INDEX)
        if labels[0] != IGNORE_INDEX:  # it needs something to be predicted from
            tokenizer = self._encoder.tokenizer
            begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            ids, labels = [int(begin or 0), *ids], [IGNORE_INDEX, *labels]
        return ids, labels
