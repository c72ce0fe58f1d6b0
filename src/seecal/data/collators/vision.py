"""Batches from conversations with images. Labels are the assistant's words and the token that ends its turn.

The way of a record: messages with images in their places → the chat template's text, with the character spans of the
assistant's turns → token ids, each span's tokens → the processor's ids, in which every placeholder has become an image.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...constants import CONTRAST_PREFIX, IGNORE_INDEX, LENGTH_COUNTS, RECORD_IDS, TOKEN_WEIGHTS
from ..images.decode import decode_image
from ..images.fast_jpeg import fewer_copies, jpeg_pixels, takes_pixels
from ..images.perturbations import contrast_images
from ..images.reduced_jpeg import box_for, check_decoding
from .assistant_spans import Rendered, render, render_prefix
from .fast_tokenize import short_runs
from .image_tokens import TextIds, expanded_positions, image_token_ids, written_tokens
from .max_length import LengthLimit
from .processors import has_prefix, processed

logger = logging.getLogger(__name__)

NO_TOKEN = -1  # in place of a placeholder's id


@dataclass
class _Prepared:
    """One record before its images are decoded into pixels."""

    name: str
    text: str
    prefix: int  # characters before the first answer
    images: list[Any]
    ids: TextIds
    labelled: list[bool]  # per id


@dataclass
class VisionCollator:
    """Collates records of ``messages`` and images into what a vision-language model trains on.

    A record has ``messages``, a list of ``{"role", "content"}`` whose content is a text or a list of
    ``{"type": "text", ...}`` and ``{"type": "image"}`` parts, and its images under ``images`` (a list, may be empty) or
    ``image`` (one, may be None), each a Pillow image, an array, a path, encoded bytes or ``{"path", "bytes"}``.
    If the contents are plain texts, the images go before the first user message, as in TRL. An ``id`` names the record
    in errors.

    Returns (when called with a list of records): the processor's tensors, padded on the right, with ``labels`` [B, L]: -100
    everywhere but on the assistant's turns and the token that ends each. Special tokens at the start of the text are added
    just as ``processor.apply_chat_template(..., tokenize=True)`` adds them when the model is used.

    Args:
        processor: of the model; its tokenizer must be a fast one (the spans need character offsets).
        max_length, on_long: longest row in tokens, image tokens included (None: no limit), and what happens to a longer
            record: :class:`seecal.data.collators.max_length.LengthLimit`.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
        chat_template: overrides the processor's.
        contrast, strength: one of :data:`seecal.core.options.PIXEL_CONTRASTS`; the batch then also has
            ``contrast_pixel_values``, the images without their content, seeded by record and ``epoch``.
        epoch: set it when an epoch begins; CALTrainer does.
        decoding: "exact", or "reduced": JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where that is still no
            smaller than what the processor resizes them to. Faster, with slightly other pixels.
        with_ids: adds ``record_ids``, how errors call the records of the batch; for a caller that takes it out again.

    A record may bring the weights of its label tokens, ``weights``, a list with one number ≥ 0 for each in order. The batch
    then has ``token_weights`` [B, L], and training takes those instead of measuring any (no pass without the image).

    Raises:
        ValueError: no fast tokenizer, or no chat template (PaliGemma needs none for one question and one answer); or a
            record (named) whose images and placeholders differ in number, that is too long, that has no label, or whose
            text cannot be followed through template and processor.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    on_long: str = "error"
    chat_template: str | None = None
    contrast: str | None = None
    strength: float = 0.0
    epoch: int = 0
    with_ids: bool = False
    decoding: str = "exact"
    _spare: Any = field(default=None, init=False, repr=False)
    _said_no_end: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.limit = LengthLimit(self.max_length, self.on_long)
        check_decoding(self.decoding, self.contrast)
        images = getattr(self.processor, "image_processor", None)
        # Pixel contrasts change Pillow images
        self._jpeg = jpeg_pixels if self.contrast is None and takes_pixels(images) else None
        self._at_least = box_for(images) if self.decoding == "reduced" else None
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer: it gives no character offsets, without which the "
                "assistant's tokens cannot be found. Load the processor with its fast tokenizer."
            )
        self._template()
        self._written = written_tokens(self.processor)
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._written_ids = [self._id_of(one) for one in self._written]
        self._special = (added | set(self.tokenizer.all_special_ids)) - set(self._written_ids)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer  # type: ignore[attr-defined]

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        prepared = [self._prepare(record, index) for index, record in enumerate(records)]
        names = [one.name for one in prepared]
        before = self.limit.dropped, self.limit.truncated
        batch = self._processed(prepared, [one.images for one in prepared])
        long = self.limit.too_long(names, batch["attention_mask"])
        if long and self.on_long == "drop":
            for row in long:
                tokens = int(batch["attention_mask"][row].sum())
                self.limit.count_dropped(names[row], f"{tokens} tokens are more than max_length={self.max_length}")
                prepared[row] = self._stand_in(names[row])
            batch = self._processed(prepared, [one.images for one in prepared])
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, one in enumerate(prepared):
            # Padding is told by position: its id may be a real token's, such as the end of a turn.
            columns = batch["attention_mask"][row].nonzero().flatten()
            ids = batch["input_ids"][row, columns].tolist()
            positions = expanded_positions(one.ids, ids, self._image_ids if one.images else frozenset())
            if positions is None:
                raise ValueError(
                    f"{one.name}: its {len(one.ids.ids)} tokens cannot be followed into the {len(ids)} that "
                    f"{type(self.processor).__name__} made of them: something other than images was inserted, or text was "
                    "merged with it. Its labels would be wrong. If the template belongs to another family, use the "
                    "processor's own."
                )
            targets = [at for at, labelled in zip(positions, one.labelled, strict=True) if labelled and at is not None]
            labels[row, columns[targets]] = batch["input_ids"][row, columns[targets]]
        batch["labels"] = labels
        if any(record.get("weights") is not None for record in records):
            batch[TOKEN_WEIGHTS] = precomputed_weights(records, prepared, labels)
        if long and self.on_long == "truncate":
            self.limit.truncate(batch, long, names, set(self._image_ids))
        if self.on_long != "error":
            after = self.limit.dropped, self.limit.truncated
            batch[LENGTH_COUNTS] = torch.tensor([now - then for now, then in zip(after, before, strict=True)])
        if self.with_ids:
            batch[RECORD_IDS] = names
        if self.contrast is not None:
            batch.update(self._without_content(prepared))
        return batch

    def _processed(self, prepared: list[_Prepared], images: list[list[Any]]) -> Any:
        special = self._adds_special(prepared[0].text)
        known = {(one.text, special): one.ids.ids for one in prepared if self._adds_special(one.text) == special}
        runs = short_runs(self.processor, [one for one in self._written_ids if one != NO_TOKEN], known)
        try:
            with fewer_copies(getattr(self.processor, "image_processor", None)), runs:
                return processed(
                    self.processor,
                    [one.text for one in prepared],
                    images,
                    prefixes=[one.prefix for one in prepared],
                    add_special_tokens=special,
                    pad_to_multiple_of=self.pad_to_multiple_of,
                )
        except Exception as error:  # whatever a family's own code says of its inputs
            raise ValueError(
                f"{', '.join(one.name for one in prepared)}: {type(self.processor).__name__} failed on them: {error}. If "
                "it fails on every batch, it is not complete or not the model's: load it from the model's folder."
            ) from error

    def _stand_in(self, name: str) -> _Prepared:
        """A row of one word without a label and without an image, so that a batch keeps its number of rows."""
        text = str(self.tokenizer.eos_token or self.tokenizer.pad_token)
        ids = list(self.tokenizer(text, add_special_tokens=self._adds_special(text))["input_ids"])
        nothing = [False] * len(ids)
        return _Prepared(name, text, len(text), [], TextIds(ids, [], nothing), nothing)

    def _without_content(self, prepared: list[_Prepared]) -> dict[str, Any]:
        """The pixel inputs once more, of images without their content. Their sizes are the same, and so is all else."""
        assert self.contrast is not None
        images = [one.images for one in prepared]
        if not any(images):
            return {}
        names = [one.name for one in prepared]
        changed = contrast_images(images, names, self.contrast, self.strength, self.epoch, self._spare)
        self._spare = next(image for mine in images for image in mine)
        batch = self._processed(prepared, changed)
        return {f"{CONTRAST_PREFIX}{name}": value for name, value in batch.items() if name.startswith("pixel_values")}

    def _prepare(self, record: dict[str, Any], index: int) -> _Prepared:
        name = record_name(record, index)
        if not record.get("messages"):
            raise ValueError(f"{name}: no messages; it has {', '.join(sorted(record))}")
        messages, images = place_images(record["messages"], _images_of(record), name)
        # Image processors stack images, so they must agree in their number of channels
        images = [decode_image(one, name, at_least=self._at_least, jpeg=self._jpeg) for one in images]
        rendered = self._rendered(messages, name)
        prefix = rendered.spans[0][0] if rendered.spans else len(rendered.text)
        ids, offsets = self._encoded(rendered.text, prefix)
        placeholders = self._placeholders(ids)
        if len(placeholders) != len(images):
            raise ValueError(f"{name}: {self._misplaced(len(images), len(placeholders))}")
        labelled = self._labelled(rendered, ids, offsets)
        for position in placeholders:
            labelled[position] = False
        if not any(labelled):
            raise ValueError(f"{name}: no label: it has no assistant message with text. Leave it out.")
        pieces = [rendered.text[start:stop] for start, stop in offsets]
        movable = [bool(one) and not one.strip() and not mine for one, mine in zip(pieces, labelled, strict=True)]
        return _Prepared(name, rendered.text, prefix, images, TextIds(ids, placeholders, movable), labelled)

    def _rendered(self, messages: list[dict[str, Any]], name: str) -> Rendered:
        template, names = self._template(), self.tokenizer.special_tokens_map
        if template is not None:
            return render(messages, template, names, name)
        bos, eos = str(self.tokenizer.bos_token), str(self.tokenizer.eos_token)
        return render_prefix(messages, self._written[0], bos, eos, name)

    def _encoded(self, text: str, prefix: int) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [start, stop) of each in ``text``), with one id for each placeholder."""
        cuts = [(prefix, prefix)] if has_prefix(self.processor) else []
        if self._written_ids[0] == NO_TOKEN:
            cuts += [one.span() for one in re.finditer(re.escape(self._written[0]), text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for start, stop in [*sorted(cuts), (len(text), len(text))]:
            encoded = self.tokenizer(
                text[begin:start],
                add_special_tokens=begin == 0 and self._adds_special(text),
                return_offsets_mapping=True,
            )
            ids += encoded["input_ids"]
            offsets += [(begin + first, begin + last) for first, last in encoded["offset_mapping"]]
            if stop > start:
                ids.append(NO_TOKEN)
                offsets.append((start, stop))
            begin = stop
        return ids, offsets

    def _labelled(self, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> list[bool]:
        """Which ids are the assistant's, or end its turn."""
        labelled = [False] * len(ids)
        for start, stop in rendered.spans:
            turn = [position for position, (first, last) in enumerate(offsets) if first < stop and last > start]
            # A turn that the template's own markers enclose may hold the token that ends it already, blanks behind it; one
            # further inside is the record's own text.
            worded = [one for one in turn if rendered.text[slice(*offsets[one])].strip()]
            if not worded or ids[worded[-1]] not in self._special:
                end = self._end_of_turn(rendered.text, stop, turn[-1] + 1, ids, offsets)
                if not end:
                    self._say_no_end()
                turn += end
            for position in turn:
                labelled[position] = True
        return labelled

    def _end_of_turn(
        self, text: str, stop: int, position: int, ids: list[int], offsets: list[tuple[int, int]]
    ) -> list[int]:
        """The positions of the special token right after a turn and of blanks before it."""
        first = position
        while position < len(ids) and ids[position] not in self._special:
            if text[stop : offsets[position][1]].strip(" "):
                return []
            position += 1
        return list(range(first, position + 1)) if position < len(ids) else []

    def _template(self) -> str | None:
        """The chat template; None for PaliGemma's own form."""
        template = self.chat_template or getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template and not has_prefix(self.processor):
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template, so messages cannot be turned into text. Set "
                "processor.chat_template, or pass chat_template=...: the one of the instruction-tuned model of its family."
            )
        return template or None

    def _adds_special(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return not has_prefix(self.processor) and (bos is None or not text.startswith(bos))

    @cached_property
    def _image_ids(self) -> frozenset[int]:
        """The ids that stand for an image's features in a row."""
        return image_token_ids(self.processor)[1]

    def _id_of(self, token: str) -> int:
        """:data:`NO_TOKEN` where a placeholder is several tokens (Ovis 2): its processor looks for it in the text."""
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        return ids[0] if len(ids) == 1 else NO_TOKEN

    def _placeholders(self, ids: list[int]) -> list[int]:
        """Where the images go: at the image token or, if the template writes none (Gemma 3), at what begins an image."""
        for token in self._written_ids:
            if token in ids:
                return [position for position, one in enumerate(ids) if one == token]
        return []

    def _misplaced(self, images: int, placeholders: int) -> str:
        token, mine = self._written[0], type(self.processor).__name__
        if not placeholders:
            return (
                f"the chat template wrote no placeholder ({token!r}) for its {images} images: it is a template for text, "
                f"or one of another family than {mine}. Use the one that comes with the model's own processor."
            )
        return (
            f"{images} images, but {placeholders} image placeholders in its text. A message's text must not contain "
            f"{token!r} itself; use image parts. If it does not, the chat template is not made for {mine}."
        )

    def _say_no_end(self) -> None:
        if not self._said_no_end:
            self._said_no_end = True
            logger.warning(
                "the chat template ends the assistant's turns without a special token, so nothing teaches the model to "
                "stop. Pass a chat_template that adds one, such as eos_token."
            )


def precomputed_weights(
    records: Sequence[dict[str, Any]], prepared: Sequence[_Prepared], labels_BL: torch.Tensor
) -> torch.Tensor:
    """[B, L] float32: the records' own ``weights`` at their label tokens, 0 elsewhere. ValueError where they do not fit."""
    found = torch.zeros(labels_BL.shape)
    for row, (record, one) in enumerate(zip(records, prepared, strict=True)):
        if not any(one.labelled):  # left out for its length
            continue
        places, weights = labels_BL[row] != IGNORE_INDEX, record.get("weights")
        count = int(places.sum())
        if weights is None or len(weights) != count:
            given = "no weights" if weights is None else f"{len(weights)} weights"
            raise ValueError(
                f"{one.name}: {given} for {count} label tokens. Give one for each token of its assistant turns and of what "
                "ends them, in order, in every record or in none."
            )
        values = torch.tensor(weights, dtype=torch.float32)
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"{one.name}: its weights must be finite and not negative")
        found[row, places] = values
    return found


def record_name(record: dict[str, Any], index: int) -> str:
    """How errors call a record: by its ``id``, else by its place in the batch."""
    return f"record {record['id']!r}" if record.get("id") is not None else f"record {index} of the batch (it has no id)"


def place_images(
    messages: Sequence[dict[str, Any]], images: list[Any], name: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """(messages whose content is a list of text and image parts, the images in the order of their parts).

    Plain-text contents become parts; the images then go before the text of the first user message, if that is plain text.
    An image part may hold its own ``image``; the others take the record's images in order. ValueError where the number
    of the two differs.
    """
    parted: list[dict[str, Any]] = []
    own: list[Any] = []
    unplaced = True
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
            if message["role"] == "user" and unplaced:
                content = [{"type": "image"}] * len(images) + content
        unplaced = unplaced and message["role"] != "user"
        parts = []
        for part in content or []:
            kind = part.get("type")
            if kind not in ("text", "image") or part.get("url") or part.get("path"):
                raise ValueError(
                    f"{name}: a part of type {kind!r} with {', '.join(sorted(part))}: parts are "
                    "{'type': 'text', 'text': ...} or {'type': 'image'} with the image under 'images'."
                )
            if kind == "image":
                own.append(part.get("image"))
            # Arrow gives every part all keys, the missing ones as None: templates must not see them
            parts.append({"type": "image"} if kind == "image" else {"type": "text", "text": part.get("text") or ""})
        rest = {key: value for key, value in message.items() if value is not None and key != "content"}
        parted.append({**rest, "content": parts})
    if sum(one is None for one in own) != len(images):
        raise ValueError(
            f"{name}: {len(images)} images, but {sum(one is None for one in own)} image placeholders in its messages. Give "
            "one image for each."
        )
    waiting = iter(images)
    return parted, [next(waiting) if one is None else one for one in own]


def _images_of(record: dict[str, Any]) -> list[Any]:
    images = record.get("images")
    if images is None:
        images = [record["image"]] if record.get("image") is not None else []
    return [images] if not isinstance(images, (list, tuple)) else list(images)
