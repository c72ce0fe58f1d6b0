"""Texts and images through a family's own processor: its settings, and the two that do not take every batch alone."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, MllamaProcessor, PaliGemmaProcessor, ProcessorMixin
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name


def has_prefix(processor: ProcessorMixin) -> bool:
    """Whether the model reads all that stands before the first answer in both directions, so that its processor has to
    tell the two apart (PaliGemma)."""
    return isinstance(processor, PaliGemmaProcessor)


def configure(processor: Any, processor_kwargs: Mapping[str, Any] | None) -> Any:
    """Sets ``processor_kwargs`` on a processor, such as ``{"max_pixels": 401408}``, and returns it.

    They are settings of its image processor (``size``, ``max_pixels``, ``min_pixels``, ``do_image_splitting``, ...) or of
    the processor itself. ``save_pretrained`` writes them with it. ``backend`` ("pil" or "torchvision", as in
    ``AutoProcessor.from_pretrained``) says what resizes the images; transformers does not save that.

    Raises:
        ValueError: a name that neither has, or a value that the image processor does not take.
    """
    if not processor_kwargs:
        return processor
    if (backend := processor_kwargs.get("backend")) is not None:
        processor.image_processor = _with_backend(processor.image_processor, backend)
        processor_kwargs = {name: value for name, value in processor_kwargs.items() if name != "backend"}
    images = getattr(processor, "image_processor", None)
    known = set(getattr(getattr(images, "valid_kwargs", None), "__annotations__", ())) - _NOT_SETTINGS
    own = set(_own_settings(processor))
    for name in processor_kwargs:
        if name not in known | own:
            near = difflib.get_close_matches(str(name), sorted(known | own), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(known | own))}."
            raise ValueError(f"processor_kwargs: {type(processor).__name__} has no setting {name!r}. {hint}")
    for name in [name for name in processor_kwargs if name not in known]:
        setattr(processor, name, processor_kwargs[name])
    of_images = {name: value for name, value in processor_kwargs.items() if name in known}
    if of_images:
        processor.image_processor = _with_settings(processor, images, of_images)
    return processor


# What a call is given, not a setting that is kept
_NOT_SETTINGS = {"return_tensors", "device", "input_data_format", "data_format", "disable_grouping"}


def _own_settings(processor: Any) -> list[str]:
    """Numbers, flags and texts that the processor itself holds, such as num_image_tokens."""
    return [
        name
        for name, value in vars(processor).items()
        if not name.startswith("_") and name != "chat_template" and isinstance(value, (bool, int, float, str))
        and not name.endswith(("_token", "_token_id"))
    ]  # fmt: skip


def _with_settings(processor: Any, images: Any, settings: dict[str, Any]) -> Any:
    """A new image processor, made as the old one with other settings, so that a family reads them in its own way."""
    try:
        old = {name: value for name, value in images.to_dict().items() if value is not None}
        made = type(images).from_dict({**old, **_beside(old, settings)})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ValueError(f"processor_kwargs: {type(images).__name__} does not take {shown}: {error}") from None
    return made


# What transformers calls the image processors of a family that resize in one way or the other
_BACKENDS = {"torchvision": "", "pil": "Pil"}


def _with_backend(images: Any, backend: object) -> Any:
    """The family's image processor, with the same settings, that resizes with Pillow or with torchvision."""
    name = type(images).__name__
    if backend not in _BACKENDS:
        raise ValueError(f"processor_kwargs: backend={backend!r}: expected one of {', '.join(_BACKENDS)}")
    wanted = name.removesuffix("Pil") + _BACKENDS[str(backend)]
    made = type(images) if wanted == name else get_image_processor_class_from_name(wanted)
    if made is None:
        raise ValueError(f"processor_kwargs: backend={backend!r}: {name} has no such variant. Take backend out")
    return images if made is type(images) else made.from_dict(images.to_dict())


def _beside(old: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Families that keep a range of pixels as ``size`` take either of its ends by a name of its own."""
    size = old.get("size")
    ends = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    given = {ends[name]: value for name, value in settings.items() if name in ends and value is not None}
    if not given or not isinstance(size, dict) or not set(size) >= set(ends.values()) or "size" in settings:
        return settings
    rest = {name: value for name, value in settings.items() if name not in ends}
    return {**rest, "size": {**{edge: size[edge] for edge in ends.values()}, **given}}


def processed(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[list[Any]],
    *,
    prefixes: Sequence[int],
    add_special_tokens: bool,
    pad_to_multiple_of: int | None = None,
    padding_side: str = "right",
) -> BatchFeature:
    """The processor's tensors for B texts [B, L] and the images of each.

    Args:
        texts: with one placeholder for each image.
        images: those of each text, in the order of its placeholders; any of the lists may be empty.
        prefixes: how many characters of each text stand before its first answer, for :func:`has_prefix`.
        add_special_tokens: whether the tokenizer puts in its own, as at the start.
        pad_to_multiple_of: in tokens.
        padding_side: "right" as training wants it, or "left" so that answers can follow.
    """
    settings = {"padding": True, "padding_side": padding_side, "pad_to_multiple_of": pad_to_multiple_of}
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
        of_tokens = name in text_only or name == "cross_attention_mask"
        columns = length if of_tokens else value.shape[1]
        fill = processor.tokenizer.pad_token_id if name == "input_ids" else 0
        whole[name] = value.new_full((len(texts), columns, *value.shape[2:]), fill)
        parts = [(with_images, value), *([(without, text_only[name])] if name in text_only else [])]
        for rows, part in parts:
            begin = columns - part.shape[1] if of_tokens and settings["padding_side"] == "left" else 0
            whole[name][rows, begin : begin + part.shape[1]] = part
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
