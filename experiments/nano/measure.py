"""What a model says of records it has not seen: exact match, NLL by class of token, Δ, and α and β that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from torch.nn import functional

import seecal
from seecal.constants import IGNORE_INDEX

from .records import Record, plain

_BATCH = 64


def measure(model: Any, processor: Any, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """How a model answers, given the words before (the stock phrases of an answer are drawn by chance, so that no model can
    say them as they stand).

    Args:
        model: with CAL enabled or not; it is left as it was.
        records: n of them, each with words of the image in its answer.

    Returns:
        Arrays per record: ``exact`` [n] int64, whether each word of the image is the likeliest there; ``nll_visual`` and
        ``nll_filler`` [n] float64, nats, means over a record's tokens (NaN without any). For :func:`fitted`, over all M
        tokens of the image: ``logits`` [M, V] float32, ``labels`` [M] and ``item`` [M], the record's place.
    """
    found: dict[str, list[Any]] = {
        name: [] for name in ("exact", "nll_visual", "nll_filler", "logits", "labels", "item")
    }
    place = 0
    with _evaluating(model):
        for some, batch in _batches(model, processor, records):
            logits, labels, row, visual = _answers(model, processor, some, batch)
            nll = functional.cross_entropy(logits, labels, reduction="none").double()
            wrong = logits.argmax(-1) != labels
            for number in range(len(some)):
                mine = row == number
                found["exact"].append(int(not (wrong & mine & visual).any()))
                found["nll_visual"].append(float(nll[mine & visual].mean()))
                found["nll_filler"].append(float(nll[mine & ~visual].mean()))
            found["logits"].append(logits[visual].cpu().numpy())
            found["labels"].append(labels[visual].cpu().numpy())
            found["item"].append(place + row[visual].cpu().numpy())
            place += len(some)
    joined = {name: np.concatenate(found.pop(name)) for name in ("logits", "labels", "item")}
    return {**{name: np.array(values) for name, values in found.items()}, **joined}


def fitted(validation: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, Any]:
    """The NLL of the words of the image after one temperature, chosen where it is lowest on the validation set.

    Args:
        validation, test: of :func:`measure`.

    Returns:
        ``temperature``, and ``nll_visual`` [n] float64 of the test set, nats, means over a record's tokens.
    """
    low, high = np.log(0.05), np.log(20.0)
    # The NLL is convex in the inverse of the temperature, so it has one valley
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _nll(validation, left).mean() <= _nll(validation, right).mean():
            high = right
        else:
            low = left
    found = (low + high) / 2
    count = len(test["exact"])
    sums = np.bincount(test["item"], _nll(test, found), minlength=count)
    return {"temperature": float(np.exp(found)), "nll_visual": sums / np.bincount(test["item"], minlength=count)}


def _nll(measured: dict[str, np.ndarray], log_temperature: float) -> np.ndarray:
    scaled = torch.from_numpy(measured["logits"]).double() / float(np.exp(log_temperature))
    labels = torch.from_numpy(measured["labels"])
    return functional.cross_entropy(scaled, labels, reduction="none").numpy()


def deltas(model: Any, processor: Any, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Δ in logits, a number a label token: ``visual``, those of words of the image, and ``filler``, the others."""
    found, flags = [], []
    with _evaluating(model):
        for some, batch in _batches(model, processor, records):
            found.append(seecal.visual_delta(model, batch).delta.cpu())
            flags.append(_visual_flags(processor, some))
    delta, visual = torch.cat(found).double().numpy(), torch.cat(flags).numpy()
    return {"visual": delta[visual], "filler": delta[~visual]}


def means(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each class of tokens, 0 without any."""
    return {name: round(float(values.mean()), 4) if values.size else 0.0 for name, values in found.items()}


def quartiles(found: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """``NAME_quartiles`` of each class of tokens: [lower quartile, median, upper quartile], empty without any."""
    points = {name: np.percentile(values, (25, 50, 75)) if values.size else () for name, values in found.items()}
    return {f"{name}_quartiles": [round(float(one), 4) for one in three] for name, three in points.items()}


def calibrated(aligned: Any, *, records: int = 256) -> tuple[float, float]:
    """(α, β) for an aligned model by :func:`seecal.calibrate`: as many tokens have Δ > α as there are words of the image,
    and two fifths of these have Δ ≥ β. (Its own shares, half and a tenth, are for answers that are half about the image.
    Here a twentieth is, and they would put α at 0 and β where filler lies.)

    Args:
        aligned: of :func:`aligned`.
        records: of the validation set, which no training sees.
    """
    looked_at = aligned.validation[:records]
    visual = float(_visual_flags(aligned.processor, looked_at).float().mean())
    found = seecal.calibrate(
        aligned.model,
        data_set(looked_at),
        processor=aligned.processor,
        at_alpha=1 - visual,
        at_beta=0.4 * visual,
        batch_size=_BATCH,
        resamples=1,
    )
    return found.alpha, found.beta


def data_set(records: Sequence[Record]) -> Any:
    """Records as what :func:`seecal.score` reads."""
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"id": Value("string"), "messages": [message], "images": datasets.Sequence(Image())})
    return Dataset.from_list([{name: one[name] for name in features} for one in records], features=features)


class _evaluating:
    """The model in eval mode, without gradients, its forward its own; afterwards as it was."""

    def __init__(self, model: Any) -> None:
        self.model, self.grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.was = self.model.training, self.model.__dict__.pop("forward", None)
        self.model.eval()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        training, forward = self.was
        self.model.train(training)
        if forward is not None:
            self.model.forward = forward


def _batches(
    model: Any, processor: Any, records: Sequence[Record]
) -> Iterator[tuple[Sequence[Record], dict[str, Any]]]:
    collator = seecal.VisionCollator(processor)
    for start in range(0, len(records), _BATCH):
        some = records[start : start + _BATCH]
        batch = {name: value.to(model.device) for name, value in collator(plain(some)).items()}
        yield some, batch


def _answers(model: Any, processor: Any, some: Sequence[Record], batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(logits [N, V] float32, labels [N], row of the batch [N], whether of the image [N]) of the N label tokens."""
    labels = batch["labels"][:, 1:]
    row, column = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    # With its labels: without them PaliGemma reads a whole text in both directions, the answer too
    logits = model(**batch).logits[row, column].float()
    return logits, labels[row, column], row, _visual_flags(processor, some).to(row.device)


def _visual_flags(processor: Any, records: Sequence[Record]) -> torch.Tensor:
    """[N] bool: whether a label token lies in a span of the image; the one that ends the answer does not."""
    texts = [one["messages"][1]["content"] for one in records]
    encoded = processor.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    flags: list[bool] = []
    for one, offsets in zip(records, encoded["offset_mapping"], strict=True):
        spans = one["visual"]
        flags += [any(start < high and low < stop for low, high in spans) for start, stop in offsets]
        flags.append(False)
    return torch.tensor(flags)
