"""Batches of records of similar length: how long records are, without decoding an image, and the order they come in."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from .samples import is_indexed, is_made_by_a_transform

BY_MODALITY = "group_by_modality_length"
GROUPED = ("group_by_length", BY_MODALITY, "batch_rebalance")  # values of train_sampling_strategy that read lengths
STRATEGIES = ("random", "sequential", *GROUPED)
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


class ModalityByEpoch(Sampler[int]):
    """Optimizer steps of one modality each: records with images, or records without, of all ranks and micro-batches.

    In the order of the paper's code (``group_by_modality_length``, LLaVA's llava/train/llava_trainer.py): the records of
    either modality at random, cut into steps; a step's records, the longest first, each to the micro-batch that has the
    fewest tokens and still room; the steps of both modalities at random; what does not fill a step, of both, at the very
    end. There the last step of either modality stands at the end even where it is full; here only what is left over does.

    The order depends on the seed and the epoch alone: the same on all ranks, and after a resume.

    Args:
        lengths: of each record, in tokens or any unit that orders them; 0 or more.
        with_image: whether it has one.
        batch_size: records of a micro-batch on one rank.
        batches: micro-batches of an optimizer step: ranks × accumulation.
        seed: of the order.
    """

    def __init__(
        self, lengths: Sequence[int], with_image: Sequence[bool], *, batch_size: int, batches: int, seed: int
    ) -> None:
        self._lengths, self._batch_size, self._batches, self._seed = lengths, batch_size, batches, seed
        self._modalities = [[i for i, one in enumerate(with_image) if bool(one) is kind] for kind in (True, False)]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        of_a_step = self._batch_size * self._batches
        steps: list[list[int]] = []
        rest: list[int] = []
        for records in self._modalities:
            order = [records[i] for i in torch.randperm(len(records), generator=generator).tolist()]
            whole = len(order) // of_a_step * of_a_step
            steps += [self._dealt(order[i : i + of_a_step]) for i in range(0, whole, of_a_step)]
            rest += order[whole:]
        for number in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[number]
        yield from sorted(rest)

    def _dealt(self, step: list[int]) -> list[int]:
        """A step's records in the order of its micro-batches, which hold about as many tokens each."""
        batches: list[list[int]] = [[] for _ in range(self._batches)]
        open_ones = [(0, number) for number in range(self._batches)]  # (tokens so far, which): a heap
        for record in sorted(step, key=lambda i: self._lengths[i], reverse=True):
            tokens, number = heapq.heappop(open_ones)
            batches[number].append(record)
            if len(batches[number]) < self._batch_size:
                heapq.heappush(open_ones, (tokens + self._lengths[record], number))
        return [record for batch in batches for record in batch]


def lengths_by_modality(dataset: Any, column: str) -> tuple[list[int], list[bool]]:
    """(the length of each sample, as :func:`only_lengths` has it; whether it has an image).

    Raises:
        ValueError: samples that would have to be made to see it.
    """
    lengths = [int(one) for one in only_lengths(dataset, column)[column]]
    if is_made_by_a_transform(dataset) or not isinstance(dataset, (Dataset, list, tuple)):
        raise ValueError(
            f"train_sampling_strategy={BY_MODALITY!r}: nothing tells which samples of a {type(dataset).__name__} have an "
            "image before they are made. Set train_sampling_strategy='random', or 'group_by_length' and a column of lengths"
        )
    return lengths, [image_count(sample) > 0 for sample in _texts_of(dataset)]


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
    return _IMAGE * image_count(sample) + sum(map(len, texts)) // _CHARACTERS


def image_count(sample: Mapping[str, Any]) -> int:
    """How many images a record has, in its messages or beside them."""
    turns = [turn for name in _TURNS if isinstance(sample.get(name), list) for turn in sample[name]]
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return max(sum(part.get("type") == "image" for part in parts), _images(sample))


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
