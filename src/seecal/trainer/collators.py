"""Which collator makes the batches of a data set, told by what its samples are and by what the caller passed.

``data_collator`` given                → that one, as it is
``messages`` (wherever the images are) → :class:`seecal.VisionCollator`: assistant turns are labels
other vision data, such as prompts     → TRL's, held to our rules by CheckedCollator
text without ``messages``, token ids   → TRL's, which may not hold what stands for an image
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from ..core.contrasts import contrast_named
from ..core.weighting import passes_read
from ..data.collators.checked import CheckedCollator
from ..data.collators.conversation import record_name
from ..data.collators.vision import VisionCollator
from .cal_config import CALConfig
from .samples import Kind

logger = logging.getLogger(__name__)


@dataclass
class TextCollator(DataCollatorForLanguageModeling):
    """TRL's batches of token ids. ValueError for one that holds what stands for an image, since none goes with it."""

    image_ids: frozenset[int] = frozenset()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        images = torch.isin(batch["input_ids"], torch.tensor(sorted(self.image_ids)))
        images &= batch["attention_mask"].bool()  # padding may have the same id
        if bool(images.any()):
            row, column = images.nonzero()[0].tolist()
            index = int(batch["input_ids"][row, column])
            raise ValueError(
                f"the token at position {column} of row {row} of a batch, id {index}, stands for an image, and no image "
                "goes with text that is tokenised up front. Give the records 'messages' and 'images', or take the image "
                "token out of the text."
            )
        return batch


@dataclass
class PromptCollator(DataCollatorForVisionLanguageModeling):
    """TRL's batches of prompts and completions with images; leaves the records as they are, and names one that fails."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return super().torch_call([dict(example) for example in examples])
        except Exception as error:  # whatever a family's own code says of its inputs
            names = [record_name(record, index) for index, record in enumerate(examples)]
            failing = [name for name, record in zip(names, examples, strict=True) if self._fails_on(record)]
            processor = type(self.processor).__name__
            raise ValueError(f"{', '.join(failing or names)}: {processor} failed on it: {error}") from error

    def _fails_on(self, record: Mapping[str, Any]) -> bool:
        try:
            super().torch_call([dict(record)])
        except Exception:
            return True
        return False


def collator_for(args: CALConfig, processor: Any, trl_collator: Any, image_ids: set[int], kind: Kind) -> Any:
    """The collator that makes the batches of samples of a kind, where the caller passed none.

    Args:
        args: ``max_length``, ``on_long``, ``on_bad``, ``pad_to_multiple_of``, ``image_decoding``, and the contrast.
        processor: of the model.
        trl_collator: the one that SFTTrainer makes for that kind.
        image_ids: the ids whose embeddings the model replaces by image features.
    """
    if kind is Kind.CONVERSATIONS:
        return vision_collator(args, processor)
    if isinstance(trl_collator, DataCollatorForVisionLanguageModeling):
        prompts = _made_of(PromptCollator, trl_collator)
        prompts.max_length = None  # it would cut, perhaps inside an image
        return CheckedCollator(
            prompts,
            args.max_length,
            frozenset(image_ids),
            args.on_long,
            with_ids=True,
            on_bad=args.on_bad,
            pad_to_multiple_of=_multiple(args),
        )
    return _made_of(TextCollator, trl_collator, image_ids=frozenset(image_ids))


def trl_collator_for(args: CALConfig, processor: Any, sample: Mapping[str, Any], kind: Kind) -> Any:
    """The collator that SFTTrainer would make for such samples, for a data set that it did not see."""
    if kind is Kind.CONVERSATIONS:
        return None
    if kind is Kind.PROMPTS:
        return DataCollatorForVisionLanguageModeling(
            processor,
            completion_only_loss=completions_only(args, sample),
            pad_to_multiple_of=_multiple(args),
            dataset_text_field=args.dataset_text_field,
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=_multiple(args))


# Settings of a config → the fields of VisionCollator that they become.
_OF_COLLATOR = {
    "max_length": "max_length",
    "on_long": "on_long",
    "pad_to_multiple_of": "pad_to_multiple_of",
    "image_decoding": "decoding",
    "train_on": "train_on",
    "processor_kwargs": "processor_kwargs",
}
# What a data set's own kind leaves without a reader.
_NOT_READ = {
    Kind.PROMPTS: ("image_decoding", "train_on"),
    Kind.TEXT: ("image_decoding", "train_on", "on_long"),
    Kind.TOKENS: ("image_decoding", "train_on", "on_long"),
}


def check_settings_are_read(args: CALConfig, data_collator: Any, kind: Kind) -> None:
    """Whether something reads what was set on how batches are made. ``data_collator``: the caller's own; None: ours.

    Raises:
        ValueError: a :class:`seecal.VisionCollator` that has another value; any collator, for ``processor_kwargs``. Of
            other collators, and of data that a setting is not for, it is said.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(CALConfig)}
    asked = {name: getattr(args, name) for name in _OF_COLLATOR}
    asked = {name: value for name, value in asked.items() if value is not None and value != defaults[name]}
    if data_collator is None:
        unread = {name: value for name, value in asked.items() if name in _NOT_READ.get(kind, ())}
        if unread:
            logger.warning("%s: not read for data without messages, whose batches TRL makes", _written(unread))
        return
    if kind.tokenised_up_front:
        asked.pop("max_length", None)  # TRL cuts the texts before any collator sees them
    if isinstance(data_collator, VisionCollator):
        has = {name: getattr(data_collator, _OF_COLLATOR[name]) for name in asked}
        asked = {name: value for name, value in asked.items() if has[name] != value}
    refused = asked if isinstance(data_collator, VisionCollator) else asked.keys() & {"processor_kwargs"}
    if refused:
        there = {_OF_COLLATOR[name]: asked[name] for name in _OF_COLLATOR if name in refused}
        raise ValueError(
            f"{_written({name: asked[name] for name in refused})} with data_collator, which makes the batches and does not "
            "read it: set it on the collator, as in seecal.VisionCollator(processor, "
            f"{_written(there)}), or leave data_collator out."
        )
    if asked:
        kind_of_it = type(data_collator).__name__
        logger.warning("%s: not read, since data_collator makes the batches (%s)", _written(asked), kind_of_it)


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def completions_only(args: CALConfig, sample: Mapping[str, Any]) -> bool:
    """Whether only the completion of a sample is a label: as asked, and by default where there is one."""
    if args.completion_only_loss is None:
        return "prompt" in sample and "completion" in sample
    return args.completion_only_loss


def check_given_collator(data_collator: Any, kind: Kind, assistant_only: bool) -> Kind:
    """The kind of the samples as ``data_collator`` is to see them.

    Raises:
        ValueError: conversations for TRL's collator of token ids, which would make every token a label.
    """
    if kind is not Kind.CONVERSATIONS or not isinstance(data_collator, DataCollatorForLanguageModeling):
        return kind
    if assistant_only:
        return Kind.TEXT
    raise ValueError(
        f"data_collator is a {type(data_collator).__name__} and the data set has messages: every token of them would be a "
        "label, the user's too. Leave data_collator out: seecal.VisionCollator then labels the assistant's turns."
    )


def _made_of(kind: type, collator: Any, **more: Any) -> Any:
    """A ``kind``, a subclass of the collator's class, with all its settings."""
    settings = {field.name: getattr(collator, field.name) for field in dataclasses.fields(collator) if field.init}
    return kind(**{**settings, **more})


def vision_collator(args: CALConfig, processor: ProcessorMixin) -> VisionCollator:
    """The collator of conversations for these settings."""
    measured = not args.brings_weights and "without" in passes_read(args.weighting)
    contrasts = contrast_named(args.contrast).on_pixels and measured
    return VisionCollator(
        processor,
        args.max_length,
        _multiple(args),
        args.on_long,
        contrast=args.contrast if contrasts else None,
        strength=args.cal_options().strength,
        with_ids=True,
        decoding=args.image_decoding,
        on_bad=args.on_bad,
        train_on=args.train_on,
        processor_kwargs=cast("dict[str, Any] | None", args.processor_kwargs),
    )


def without_contrast(collator: Any) -> Any:
    """The same collator for evaluation, which has no second pass and so no need for images without their content."""
    if not isinstance(collator, VisionCollator) or collator.contrast is None:
        return collator
    plain = dataclasses.replace(collator, contrast=None)
    plain.counts = collator.counts  # what was said in training is not said again
    return plain


def _multiple(args: CALConfig) -> int | None:
    return cast("int | None", args.pad_to_multiple_of)
