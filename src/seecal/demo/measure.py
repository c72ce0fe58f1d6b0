"""How well a model answers questions about images: loss on the words that are in the image, and exact answers.

Both come from one forward pass a batch: an answer counts as exact if at every place the true token, the end of the turn
included, is the likeliest one. That is the same as generating it greedily and comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..data.collators.vision import VisionCollator
from ..data.images.decode import open_image
from .emoji import Answer, record
from .state import Score


@dataclass(frozen=True)
class Measured:
    """Of n questions, in their order.

    Attributes:
        exact: [n] 0 or 1.
        word_nll: [n] nats, the sum over an answer's tokens in words that the image shows.
        words: [n] how many tokens those are.
        filler_nll, filler: [n] the same of its other tokens, the end of the turn among them.
    """

    exact: np.ndarray
    word_nll: np.ndarray
    words: np.ndarray
    filler_nll: np.ndarray
    filler: np.ndarray

    def told(self) -> list[list[float]]:
        """As JSON has it: a row a question."""
        columns = (self.exact, self.word_nll, self.words, self.filler_nll, self.filler)
        return [[round(value, 6) for value in row] for row in np.stack(columns, 1).tolist()]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Measured:
        """What :meth:`told` has told."""
        return cls(*np.array(rows, dtype=float).reshape(-1, 5).T)

    def score(self) -> Score:
        """All questions in four figures."""
        questions, words = len(self.exact), int(self.words.sum())
        return Score(
            float(self.word_nll.sum()) / max(words, 1),
            float(self.exact.sum()) / max(questions, 1),
            questions,
            words,
        )


def measure(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[Path, Answer]],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Score:
    """:func:`measure_each`, in four figures."""
    return measure_each(model, processor, asked, batch_size=batch_size, on_batch=on_batch).score()


def measure_each(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[Path, Answer]],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Score the model on (image, true answer) pairs. The model's mode is left as it was; no gradient.

    ``on_batch`` is called with the number of questions done after each batch.
    """
    training = model.training
    model.eval()
    collate = VisionCollator(processor)
    found: list[list[float]] = []
    try:
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            found += _answers(model, processor, collate, part)
            on_batch(len(part))
    finally:
        model.train(training)
    return Measured.of(found)


@torch.inference_mode()
def _answers(
    model: Any, processor: Any, collate: VisionCollator, part: Sequence[tuple[Path, Answer]]
) -> list[list[float]]:
    """Of each answer what a row of :class:`Measured` has."""
    records = [{**record(path, reply), "images": [open_image(path)]} for path, reply in part]
    batch = {name: tensor.to(model.device) for name, tensor in collate(records).items()}
    labels = batch.pop("labels")[:, 1:]
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    keep = labels != IGNORE_INDEX
    logits = model.lm_head(hidden[keep]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="none")
    hit = logits.argmax(-1) == labels[keep]
    marks = [word_tokens(reply, processor.tokenizer) for _, reply in part]
    counts = [len(mark) for mark in marks]
    assert counts == keep.sum(1).tolist(), "an answer was tokenised otherwise inside its conversation"
    rows = zip(loss.cpu().double().split(counts), hit.cpu().split(counts), marks, strict=True)
    return [
        [float(right.all()), float(nats[seen].sum()), int(seen.sum()), float(nats[~seen].sum()), int((~seen).sum())]
        for nats, right, seen in rows
    ]


def word_tokens(reply: Answer, tokenizer: Any) -> Tensor:
    """[tokens of the answer + 1 for the end of the turn]: which of them are words that the image shows."""
    marks = [seen for text, seen in reply.pieces for _ in text]
    offsets = tokenizer(reply.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    # A token counts by its last character: a leading space belongs to the word after it.
    return torch.tensor([marks[stop - 1] for _, stop in offsets] + [False])
