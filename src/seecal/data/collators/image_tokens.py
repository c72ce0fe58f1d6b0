"""What stands for an image in a text and in the processor's ids, and how ids are followed from the one to the other."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .processors import processed

logger = logging.getLogger(__name__)


def placeholder_tokens(processor: ProcessorMixin) -> list[str]:
    """What chat templates write for an image: the image token or, in some families, what begins an image."""
    names = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
    found = list(dict.fromkeys(str(token) for token in names if token))
    if not found:
        raise ValueError(
            f"{type(processor).__name__} names no image token: images cannot be placed in the text. Pass the processor of "
            "a vision-language model."
        )
    return found


def image_token_ids(processor: ProcessorMixin) -> tuple[frozenset[int], frozenset[int]]:
    """(ids that may stand for the features of an image in what the processor makes of it, those of them that do).

    What the template writes need not be what the model reads: Ovis 2's ``<image>`` is no token at all and becomes
    ``<IMG_ATOM>``, Gemma 3's ``<start_of_image>`` is followed by the soft tokens. So the processor is asked. Features are
    the tokens that the template writes and the added token that is repeated most; maybe, if it is none, the id that is.

    Raises:
        ValueError: the processor fails on an image and its placeholder.
    """
    tokenizer: Any = processor.tokenizer
    placeholders = placeholder_tokens(processor)
    try:
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        batch = processed(
            processor, placeholders[:1], [[grey]], prefixes=[len(placeholders[0])], add_special_tokens=False
        )
    except Exception as error:
        raise ValueError(
            f"{type(processor).__name__} cannot make an input of one image and its placeholder {placeholders[0]!r}: {error}"
        ) from error
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = [index for index in batch["input_ids"][0].tolist() if index not in ends]
    added = [index for index in ids if index in tokenizer.added_tokens_decoder]
    features = {
        index for token, index in tokenizer.get_added_vocab().items() if token in placeholders and index in added
    }
    features |= {index for index, _ in Counter(added).most_common(1)}
    return frozenset(features | {index for index, _ in Counter(ids).most_common(1)}), frozenset(features)


def check_processor(collator: Any, model: Any, image_ids: set[int]) -> str:
    """Whether a collator's processor writes what the model reads.

    Args:
        collator: one with a ``processor``, or one around such a ``collator``; nothing is known about any other.
        model: a transformers model.
        image_ids: the ids whose embeddings it replaces by image features.

    Returns:
        "", or what is odd about the pair: for :func:`explain_processor_mismatch`, should the model fail on its batches.

    Raises:
        ValueError: what the processor repeats for an image is none of the model's ids.
    """
    processor = getattr(getattr(collator, "collator", collator), "processor", None)
    if not isinstance(processor, ProcessorMixin):
        return ""
    candidates, features = image_token_ids(processor)
    passed, expected = type(processor).__name__, PROCESSOR_MAPPING_NAMES.get(model.config.model_type) or None
    wants = (
        f"; transformers' processor for {model.config.model_type!r} is {expected}"
        if expected and expected != passed
        else ""
    )
    if image_ids.isdisjoint(candidates):
        tokens: Any = processor.tokenizer.convert_ids_to_tokens(sorted(features))
        found = ", ".join(f"{token!r} (id {index})" for token, index in zip(tokens, sorted(features), strict=True))
        raise ValueError(
            f"{passed} makes {found or 'no token of its own'} of an image, but {type(model).__name__} puts image features "
            f"at id {' or '.join(str(index) for index in sorted(image_ids))} (image_token_id of its config){wants}. Pass "
            "the processor saved with this model as processing_class, such as AutoProcessor.from_pretrained(its folder). "
            "If you added an image token to the tokenizer, set the config's image_token_id to its id."
        )
    if wants:
        logger.warning(
            "the processor is %s%s: unless you know that they agree, load it from the model's folder", passed, wants
        )
    return f"The processor is {passed}{wants}: load the processor from the model's folder" if wants else ""


@contextlib.contextmanager
def explain_processor_mismatch(oddity: str) -> Iterator[None]:
    """Errors of the model, with what :func:`check_processor` found odd about its processor."""
    try:
        yield
    except Exception as error:
        if not oddity or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the model failed on the processor's batch ({error}). {oddity}.") from error


@dataclass
class TextIds:
    """The ids of a text in which each image is one placeholder.

    Attributes:
        ids: [n].
        placeholders: positions of the images in ``ids``.
        movable: [n] for each id, whether it is a blank without a label. Next to an image it may be merged with blanks that
            the processor writes around it: Gemma 3's puts two newlines on either side.
    """

    ids: list[int]
    placeholders: list[int]
    movable: list[bool]


def expanded_positions(text: TextIds, expanded: list[int], image_ids: frozenset[int]) -> list[int | None] | None:
    """For each id of the text its position among the processor's ``expanded`` ones, or None; None as a whole if the text
    cannot be found in them.

    Images are the only insertions, so the ids between two placeholders appear unchanged and in order, and before each of
    them but the first there is an image.
    """
    found = _followed(text, expanded, image_ids, trim=False)
    return found if found is not None else _followed(text, expanded, image_ids, trim=True)


def _followed(text: TextIds, expanded: list[int], image_ids: frozenset[int], trim: bool) -> list[int | None] | None:
    positions: list[int | None] = [None] * len(text.ids)
    cursor = 0
    for before, after in itertools.pairwise([-1, *text.placeholders, len(text.ids)]):
        first, last = before + 1, after  # [first, last): the ids between two images
        while trim and before >= 0 and first < last and text.movable[first]:
            first += 1
        while trim and after < len(text.ids) and first < last and text.movable[last - 1]:
            last -= 1
        segment = text.ids[first:last]
        if before < 0:
            start = 0
        elif after == len(text.ids):
            start = len(expanded) - len(segment)
        else:
            start = _next_occurrence(segment, expanded, cursor, image_ids)
        has_image = not image_ids.isdisjoint(expanded[cursor : max(start, cursor)])
        if start < cursor or has_image != (before >= 0) or expanded[start : start + len(segment)] != segment:
            return None
        for offset in range(len(segment)):
            positions[first + offset] = start + offset
        cursor = start + len(segment)
    return positions if cursor == len(expanded) else None


def _next_occurrence(segment: list[int], ids: list[int], cursor: int, image_ids: frozenset[int]) -> int:
    """The first position after an image from which ``ids`` go on with ``segment``; -1 without."""
    start = cursor
    while start < len(ids) and ids[start] not in image_ids:
        start += 1
    for position in range(start + 1, len(ids) - len(segment) + 1):
        if ids[position : position + len(segment)] == segment:
            return position
    return -1
