"""How well a model answers questions about images: loss on the words that are in the image, and exact answers.

Both come from one forward pass a batch: an answer counts as exact if at every place the true token, the end of the turn
included, is the likeliest one. That is the same as generating it greedily and comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..data.collators.vision import VisionCollator
from ..data.images.decode import open_image
from .emoji import Answer, record
from .state import Score


def measure(
    model: Any,
    processor: Any,
    asked: Sequence[tuple[Path, Answer]],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Score:
    """Score the model on (image, true answer) pairs. The model's mode is left as it was; no gradient.

    ``on_batch`` is called with the number of questions done after each batch.
    """
    training = model.training
    model.eval()
    collate = VisionCollator(processor)
    nll = words = right = 0.0
    try:
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            loss, correct, seen = _answers(model, processor, collate, part)
            nll += float(loss[seen].sum())
            words += int(seen.sum())
            right += int(correct.sum())
            on_batch(len(part))
    finally:
        model.train(training)
    return Score(nll / max(words, 1), right / max(len(asked), 1), len(asked), int(words))


@torch.inference_mode()
def _answers(
    model: Any, processor: Any, collate: VisionCollator, part: Sequence[tuple[Path, Answer]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Per label token the loss [N] and whether it is a word of the image [N]; per answer whether it is exact [B]."""
    records = [{**record(path, reply), "images": [open_image(path)]} for path, reply in part]
    batch = {name: tensor.to(model.device) for name, tensor in collate(records).items()}
    labels = batch.pop("labels")[:, 1:]
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    keep = labels != IGNORE_INDEX
    logits = model.lm_head(hidden[keep]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[keep], reduction="none")
    hit = torch.ones_like(keep)
    hit[keep] = logits.argmax(-1) == labels[keep]
    seen = torch.cat([word_tokens(reply, processor.tokenizer) for _, reply in part]).to(loss.device)
    assert len(seen) == len(loss), "an answer was tokenised otherwise inside its conversation"
    return loss, hit.all(1), seen


def word_tokens(reply: Answer, tokenizer: Any) -> Tensor:
    """[tokens of the answer + 1 for the end of the turn]: which of them are words that the image shows."""
    marks = [seen for text, seen in reply.pieces for _ in text]
    offsets = tokenizer(reply.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    # A token counts by its last character: a leading space belongs to the word after it.
    return torch.tensor([marks[stop - 1] for _, stop in offsets] + [False])
