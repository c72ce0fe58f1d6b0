"""Batches of records of similar length: how long records are, without decoding an image, and the order they come in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .samples import is_indexed, is_made_by_a_transform

GROUPED = ("group_by_length", "batch_rebalance")  # values of train_sampling_strategy that read lengths
_CHARACTERS, _IMAGE = 4, 576  # a token's characters, an image's tokens: to sort by and not to cut by
_TURNS = ("messages", "conversations", "prompt", "completion")


class GroupedByEpoch(LengthGroupedSampler):
    """Batches that depend on the seed and the epoch alone: the same on all ranks, and after a resume."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


def only_lengths(dataset: Any, column: str) -> Any:
    """As many rows, with their lengths in tokens under ``column`` alone: the column of that name or an estimate.

    Of the estimate batches are also grouped into those with images and those without, as the paper's are.

    Raises:
        ValueError: samples that would have to be made, images and all, to see how long they are.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    if column in columns:
        return Dataset.from_dict({column: list(dataset.with_format(None)[column])})
    if "input_ids" in columns:  # tokenised up front
        return Dataset.from_dict({column: [len(ids) for ids in dataset.with_format(None)["input_ids"]]})
    unseen = not isinstance(dataset, (Dataset, list, tuple)) or is_made_by_a_transform(dataset)
    if is_indexed(dataset) and not unseen:
        return Dataset.from_dict({column: [estimated_tokens(sample) for sample in _texts_of(dataset)]})
    raise ValueError(
        f"train_sampling_strategy groups by length, and nothing tells how long the samples of a {type(dataset).__name__} "
        f"are before they are made. Give it a column {column!r} with their lengths in tokens (length_column_name), or set "
        "train_sampling_strategy='random'."
    )


def estimated_tokens(sample: Mapping[str, Any]) -> int:
    """About how many tokens a record has."""
    turns = [turn for name in _TURNS if isinstance(sample.get(name), list) for turn in sample[name]]
    texts = [sample[name] for name in (*_TURNS, "text") if isinstance(sample.get(name), str)]
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    texts += [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts += [part.get("text") or "" for part in parts]
    images = sum(part.get("type") == "image" for part in parts)
    return _IMAGE * max(images, _images(sample)) + sum(map(len, texts)) // _CHARACTERS


def _images(sample: Mapping[str, Any]) -> int:
    """Images that stand beside the messages."""
    images = sample.get("images")
    if images is None:
        return int(sample.get("image") is not None)
    return len(images) if isinstance(images, (list, tuple)) else 1


def _texts_of(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """The samples as they are stored, of images beside the messages only how many there are."""
    if not isinstance(dataset, Dataset):
        return dataset
    kept = [name for name in (*_TURNS, "text", "image", "images") if name in dataset.column_names]
    return _stored(dataset.select_columns(kept).with_format("arrow"))


def _stored(dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    for table in dataset.iter(batch_size=1000):
        numbers = [0] * len(table)
        if "images" in table.column_names and pyarrow.types.is_list(table.schema.field("images").type):
            numbers = pyarrow.compute.list_value_length(table["images"]).to_pylist()
        elif "image" in table.column_names:
            numbers = table["image"].is_valid().to_pylist()
        texts = table.select([name for name in table.column_names if name not in ("image", "images")])
        for sample, number in zip(texts.to_pylist(), numbers, strict=True):
            yield {**sample, "images": [None] * int(number or 0)}
