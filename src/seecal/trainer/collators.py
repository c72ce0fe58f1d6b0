"""Which collator makes the batches of a training, told by the first sample and by what the caller passed.

``data_collator`` given                → that one, as it is
``messages`` (wherever the images are) → :class:`seecal.VisionCollator`: assistant turns are labels
other vision data, such as prompts     → TRL's, held to our rules by CheckedCollator
text without ``messages``              → TRL's
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..core.contrasts import contrast_named
from ..core.weighting import passes_read
from ..data.collators.checked import CheckedCollator
from ..data.collators.vision import VisionCollator
from .cal_config import CALConfig

logger = logging.getLogger(__name__)

_IMAGES = {"image", "images"}


def has_conversations(
    train_dataset: Any, data_collator: Any = None, processing_class: Any = None, formatting_func: Any = None
) -> bool:
    """Whether the data is conversations for :class:`seecal.VisionCollator`. Decodes no image but, where only a sample can
    tell (a transform, parts of prompts), that of the first.

    Raises:
        ValueError: ``train_dataset`` is no ``datasets`` set; conversations with a tokenizer instead of a processor; images
            inside the parts of a prompt, where TRL's collator would not see them.
    """
    if train_dataset is None:
        return False  # TRL says that it is required
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"train_dataset is a {type(train_dataset).__name__}: expected a datasets.Dataset or IterableDataset. "
            "seecal.load_records makes one of a list of records, or of a file."
        )
    if data_collator is not None:
        return False
    names = _keys_of_samples(train_dataset)
    has_images = not names.isdisjoint(_IMAGES)
    if "messages" not in names or ("input_ids" in names and not has_images):  # tokenised already
        if {"prompt", "completion"} <= names and not has_images:
            _refuse_images_in_prompt(next(iter(train_dataset)))
        return False
    if isinstance(processing_class, PreTrainedTokenizerBase) and not has_images:  # with images TRL says it
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}: conversations for a vision-language model go "
            "through its processor. Pass AutoProcessor.from_pretrained(its folder)."
        )
    if formatting_func is not None:
        logger.warning("formatting_func is not used: the chat template puts the column 'messages' into text")
    return True


def _keys_of_samples(dataset: Dataset | IterableDataset) -> set[str]:
    """What a sample is made of: columns, but where a transform makes samples of them, the keys of the first."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return set(next(iter(dataset)))
    return set(get_dataset_column_names(dataset))


def _refuse_images_in_prompt(sample: Mapping[str, Any]) -> None:
    for key in ("prompt", "completion"):
        messages = sample[key] if isinstance(sample[key], list) else []
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts):
            raise ValueError(
                f"the first sample has an image inside its {key!r} and no column 'images', so its image would not reach "
                "the model. Pass the data through seecal.load_records, or put the images under 'images'."
            )


def collator_for(args: CALConfig, processor: Any, trl_collator: Any, image_ids: set[int], conversations: bool) -> Any:
    """The collator that makes the batches, where the caller passed none.

    Args:
        args: ``max_length``, ``on_long``, ``on_bad``, ``pad_to_multiple_of``, ``image_decoding``, and the contrast.
        processor: of the model.
        trl_collator: the one that SFTTrainer chose.
        image_ids: the ids whose embeddings the model replaces by image features.
        conversations: what :func:`has_conversations` says.
    """
    if conversations:
        return _vision_collator(args, processor)
    if not isinstance(trl_collator, DataCollatorForVisionLanguageModeling):
        return trl_collator
    trl_collator.max_length = None  # it would cut, perhaps inside an image
    return CheckedCollator(
        trl_collator,
        args.max_length,
        frozenset(image_ids),
        args.on_long,
        with_ids=True,
        on_bad=args.on_bad,
        pad_to_multiple_of=_multiple(args),
    )


def _vision_collator(args: CALConfig, processor: ProcessorMixin) -> VisionCollator:
    contrasts = contrast_named(args.contrast).on_pixels and "without" in passes_read(args.weighting)
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
