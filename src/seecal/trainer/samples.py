"""What the samples of a data set are, told by its first one, and any collection of samples in a form that TRL takes.

Columns do not tell: a transform makes samples of other ones, and a list or a torch data set has none.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream

_CONVERSATIONS = ("messages", "conversations", "caption")
_IMAGES = ("image", "images")


class Kind(enum.Enum):
    """What the samples of a data set are.

    CONVERSATIONS: ``messages``, ``conversations`` or a ``caption``, wherever their images are: for
        :class:`seecal.VisionCollator`.
    PROMPTS: anything else with images, such as prompts and completions: for TRL's collator of vision data.
    TEXT: prompts and completions, or texts, without images: TRL tokenises them.
    TOKENS: tokenised already.
    """

    CONVERSATIONS = enum.auto()
    PROMPTS = enum.auto()
    TEXT = enum.auto()
    TOKENS = enum.auto()

    @property
    def tokenised_up_front(self) -> bool:
        """Whether TRL makes token ids of the whole data set before training."""
        return self in (Kind.TEXT, Kind.TOKENS)


def kind_of(sample: Mapping[str, Any]) -> Kind:
    """The kind of a data set by its first sample."""
    has_images = any(name in sample for name in _IMAGES)
    if "input_ids" in sample and not has_images:
        return Kind.TOKENS
    if any(name in sample for name in _CONVERSATIONS):
        return Kind.CONVERSATIONS
    return Kind.PROMPTS if has_images else Kind.TEXT


def first_sample(dataset: Any, name: str) -> Mapping[str, Any]:
    """The first sample; errors call the data set ``name`` (the argument that it was passed as).

    Raises:
        ValueError: several data sets instead of one, something that has no samples, none at all, or a sample that is not
            a dict.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{name} is a {type(dataset).__name__} of {', '.join(map(str, dataset))}: pass one data set of it, such as "
            f"{name}=data[{next(iter(dataset), 'train')!r}]."
        )
    if isinstance(dataset, (str, bytes)) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}: expected a datasets.Dataset or IterableDataset, a list of records or a "
            "torch data set. seecal.load_records makes one of a file."
        )
    try:
        sample = _readable(dataset) if is_indexed(dataset) else next(iter(dataset))
    except (IndexError, StopIteration):
        raise ValueError(f"{name} is empty: it has no record to learn from") from None
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"{name} gives a {type(sample).__name__}: each sample must be a dict, such as one with 'messages' and 'images'."
        )
    _check_weights(sample, name)
    _refuse_images_in_prompt(sample, name)
    return sample


def _readable(dataset: Any, tries: int = 16) -> Any:
    """The first sample that can be read, such as one whose image is not damaged; what is wrong with the others is told when
    they are met."""
    for index in range(min(len(dataset), tries)):
        try:
            return dataset[index]
        except Exception:
            if index == 0 and len(dataset) == 1:
                raise
    return dataset[0]


def is_indexed(dataset: Any) -> bool:
    """Whether samples are asked for by number, and not taken as they come."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def is_made_by_a_transform(dataset: Any) -> bool:
    """Whether samples are made of other columns by ``set_transform`` or ``with_transform``."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def for_trl(dataset: Any, sample: Mapping[str, Any], kind: Kind) -> Dataset | IterableDataset:
    """``dataset`` as ``datasets`` hold it, which is all that SFTTrainer takes.

    Text is read into one, since it is tokenised up front anyway. Of samples with images only an outline is made, one row
    without their content: nothing is decoded, and the trainer puts the data set itself in its place.
    """
    if isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if not kind.tokenised_up_front:
        outline = Dataset.from_dict({name: [_outline(value)] for name, value in sample.items()})
        return outline if is_indexed(dataset) else outline.to_iterable_dataset()
    if is_indexed(dataset):
        return Dataset.from_list([dict(dataset[index]) for index in range(len(dataset))])
    return IterableDataset.from_generator(_rows, gen_kwargs={"dataset": dataset})


def for_loader(dataset: Any) -> Any:
    """``dataset`` as a data loader takes it: what can only be iterated over becomes a torch stream."""
    known = (Dataset, IterableDataset, TorchStream)
    return dataset if isinstance(dataset, known) or is_indexed(dataset) else _Stream(dataset)


class _Stream(TorchStream):
    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self._samples)


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    yield from map(dict, dataset)


def _outline(value: Any) -> Any:
    """What SFTTrainer looks at: whether a value is a list of messages."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        return [{"role": str(value[0].get("role", "user")), "content": ""}] if "role" in value[0] else []
    return ""


def _check_weights(sample: Mapping[str, Any], name: str) -> None:
    weights = sample.get("weights")
    if weights is None:
        return
    numbers = weights.tolist() if hasattr(weights, "tolist") else weights
    listed = isinstance(numbers, (list, tuple)) and all(isinstance(weight, (int, float)) for weight in numbers)
    if not listed:
        raise ValueError(
            f"{name} has a column 'weights' whose first value is {weights!r:.60}: expected a list with a number for each "
            "label token, weights that were measured before. If the column is something else, rename or remove it."
        )


def _refuse_images_in_prompt(sample: Mapping[str, Any], name: str) -> None:
    if any(key in sample for key in _IMAGES):
        return
    for key in ("prompt", "completion"):
        messages = sample.get(key) if isinstance(sample.get(key), list) else []
        contents = [message.get("content") for message in messages or [] if isinstance(message, Mapping)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts):
            raise ValueError(
                f"the first sample of {name} has an image inside its {key!r} and no column 'images', so its image would "
                "not reach the model. Pass the data through seecal.load_records, or put the images under 'images'."
            )


def check_token_ids(model: torch.nn.Module, tokenizer: Any, image_ids: set[int]) -> None:
    """ValueError if the tokenizer knows ids beyond the model's embedding table, which would fail where one occurs first.

    The model's own image ids aside, which some classes never look up.
    """
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = getattr(table, "num_embeddings", None)
    beyond = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if rows is not None and index >= rows and index not in image_ids
    }
    if beyond:
        last = max(beyond)
        raise ValueError(
            f"the tokenizer has {len(beyond)} ids that the model's embedding table of {rows} rows does not, the last of "
            f"them {last} ({beyond[last]!r}). Call model.resize_token_embeddings({last + 1}), or load the tokenizer that "
            "was saved with the model."
        )
