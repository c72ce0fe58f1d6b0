"""Texts and images through a family's own processor, and the two processors that do not take every batch by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    if isinstance(processor, MllamaProcessor) and not all(images):
        return _with_text_only_rows(processor, texts, images, settings)
    return processor(text=texts, images=images, **settings)


def _with_text_only_rows(
    processor: Any, texts: list[str], images: list[list[Any]], settings: dict[str, Any]
) -> BatchFeature:
    """Mllama's tensors where some texts have no image, which its processor refuses, or mixes up: the texts with images and
    the others apart, then together. All of them are [B, ...], and nothing of a text without an image is set in those of
    the images, nor may it look at any."""
    with_images = [row for row, of_row in enumerate(images) if of_row]
    without = [row for row, of_row in enumerate(images) if not of_row]
    pictured = processor(
        text=[texts[row] for row in with_images], images=[images[row] for row in with_images], **settings
    )
    text_only = processor(text=[texts[row] for row in without], images=None, **settings)
    length = max(pictured["input_ids"].shape[1], text_only["input_ids"].shape[1])
    whole = {}
    for name, value in pictured.items():
        columns = length if name in text_only or name == "cross_attention_mask" else value.shape[1]
        fill = processor.tokenizer.pad_token_id if name == "input_ids" else 0
        whole[name] = value.new_full((len(texts), columns, *value.shape[2:]), fill)
        whole[name][with_images, : value.shape[1]] = value
        if name in text_only:
            whole[name][without, : text_only[name].shape[1]] = text_only[name]
    return BatchFeature(whole)


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
    flat = [image for of_row in images for image in of_row]
    pixels = processor.image_processor(flat, return_tensors="pt") if flat else {}
    return BatchFeature({**made, **pixels})
