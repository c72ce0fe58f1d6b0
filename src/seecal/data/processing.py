"""Texts and images through a family's own processor, and the two processors that do not take every batch by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature, MllamaProcessor, PaliGemmaProcessor, ProcessorMixin


def has_prefix(processor: ProcessorMixin) -> bool:
    """Whether the model reads all that stands before the first answer in both directions, so that its processor has to
    tell the two apart (PaliGemma)."""
    return isinstance(processor, PaliGemmaProcessor)


def processed(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[list[Any]],
    *,
    prefixes: Sequence[int],
    add_special_tokens: bool,
    pad_to_multiple_of: int | None = None,
) -> BatchFeature:
    """The processor's tensors for B texts [B, L] and the images of each, padded on the right.

    Args:
        texts: with one placeholder for each image.
        images: those of each text, in the order of its placeholders; any of the lists may be empty.
        prefixes: how many characters of each text stand before its first answer, for :func:`has_prefix`.
        add_special_tokens: whether the tokenizer puts in its own, as at the start.
        pad_to_multiple_of: in tokens.
    """
    settings = {"padding": True, "padding_side": "right", "pad_to_multiple_of": pad_to_multiple_of}
    settings |= {"add_special_tokens": add_special_tokens, "return_tensors": "pt"}
    if has_prefix(processor):
        return _prefixed(processor, texts, images, prefixes, settings)
    texts, images = list(texts), list(images)
    if not any(images):
        return processor(text=texts, images=None, **settings)
    if isinstance(processor, MllamaProcessor) and not (images[0] and images[-1]):
        # It cannot begin with a text without images, and loses those at the end: a row with an image goes on either side.
        grey = ([str(processor.image_token)], [[Image.new("RGB", (8, 8))]])
        batch = processor(text=grey[0] + texts + grey[0], images=grey[1] + images + grey[1], **settings)
        return BatchFeature({name: value[1:-1] for name, value in batch.items()})
    return processor(text=texts, images=images, **settings)


def _prefixed(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[list[Any]],
    prefixes: Sequence[int],
    settings: dict[str, Any],
) -> BatchFeature:
    """What PaliGemma's processor makes of a prefix and a suffix: its own call refuses texts without an image.

    The two are tokenised apart; token_type_ids are 0 in the prefix, 1 after it.
    """
    token = processor.image_token
    expanded = [text.replace(token, token * processor.image_seq_length) for text in texts]
    cuts = [
        at + text[:at].count(token) * len(token) * (processor.image_seq_length - 1)
        for text, at in zip(texts, prefixes, strict=True)
    ]
    before = [text[:cut] for text, cut in zip(expanded, cuts, strict=True)]
    after = [text[cut:] for text, cut in zip(expanded, cuts, strict=True)]
    made = processor.tokenizer(before, after, return_token_type_ids=True, **settings)
    flat = [image for mine in images for image in mine]
    pixels = processor.image_processor(flat, return_tensors="pt") if flat else {}
    return BatchFeature({**made, **pixels})
