"""Batches from conversations with images. Labels are the assistant's words and the token that ends its turn.

The way of a batch: each record as a conversation with labelled ids (``conversation.py``) → its images
decoded → the processor's tensors, in which every placeholder has become an image → labels → what is too long, cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...constants import CONTRAST_PREFIX, IGNORE_INDEX, LENGTH_COUNTS, NO_CONTRAST, RECORD_IDS, TOKEN_WEIGHTS
from ...core.contrasts import contrast_named
from ..images.decode import decode_image
from ..images.fast_jpeg import fewer_copies, jpeg_pixels, takes_pixels
from ..images.perturbations import Spares, contrast_images
from ..images.reduced_jpeg import box_for
from ..options import check_decoding
from .conversation import Conversation, ConversationEncoder, NoLabel, record_name
from .fast_tokenize import short_runs
from .image_tokens import expanded_positions
from .max_length import LengthLimit, no_label_left
from .precomputed_weights import precomputed_weights
from .processors import configure, processed
from .record_check import RecordCheck
from .record_counts import RecordCounts
from .shared import SharedInt


@dataclass
class VisionCollator:
    """Collates records of ``messages`` and images into what a vision-language model trains on.

    A record has ``messages``, a list of ``{"role", "content"}`` whose content is a text or a list of
    ``{"type": "text", ...}`` and ``{"type": "image"}`` parts, and its images under ``images`` (a list, may be empty) or
    ``image`` (one, may be None), each a Pillow image, an array of bytes, a path, encoded bytes or ``{"path", "bytes"}``. An
    image part may bring its own, under ``image`` or ``path``. In a content that is a text, ``<image>`` marks an image's
    place; without any mark, the images go before the text of the first user message, as in TRL. An ``id`` names the record
    in errors. Rows of the other formats of :data:`seecal.FORMATS` are understood too. An assistant message with ``loss``,
    ``weight`` or ``train`` false or 0 is not learnt.

    Returns (when called with a list of records): the processor's tensors, padded on the right, with ``labels`` [B, L]:
    :data:`seecal.constants.IGNORE_INDEX` everywhere but on the assistant's turns and the token that ends each. Special
    tokens at the start of the text are added just as ``processor.apply_chat_template(..., tokenize=True)`` adds them when
    the model is used.

    Args:
        processor: of the model; its tokenizer must be a fast one (the spans need character offsets).
        max_length, on_long: longest row in tokens, image tokens included (None: no limit), and what happens to a longer
            record: "error"; "drop", it is left out; "truncate", its text after the last image is cut (a ValueError where an
            image would have to be cut). With the latter two the batch also has ``long_records`` [2], how many were left
            out and cut, for a caller that takes it out again.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
        chat_template: overrides the processor's.
        contrast, strength: the name of a contrast on pixels in ``seecal.CONTRASTS``; the batch then also has
            ``contrast_pixel_values``, the images without their content, seeded by record and ``epoch``.
        epoch: set it when an epoch begins; CALTrainer does. Workers of a data loader that run already see it too.
        decoding: "exact", or "reduced": JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where that is still no
            smaller than what the processor resizes them to. Faster, with slightly other pixels.
        with_ids: adds ``record_ids``, how errors call the records of the batch; for a caller that takes it out again.
        on_bad: a record without a label, because it has no answer or because all of it was cut: "error", or "skip", it is
            left out and counted in ``long_records``.
        train_on: "all" of the assistant's turns are learnt, or only the "last" of each record.
        processor_kwargs: settings of the processor, such as ``{"max_pixels": 401408}``, set on it and saved with it.

    In place of a record that is left out stands a row of one word without a label, so that the batch keeps its size.

    A record may bring the weights of its label tokens, ``weights``, a list with one number ≥ 0 for each in order, and
    the ids that they belong to, ``weight_ids``, to be compared. The batch then has ``token_weights`` [B, L], and training
    takes those instead of measuring any (no pass without the image).

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
    epoch: int = SharedInt(0)  # type: ignore[assignment]  # a descriptor, which dataclasses read as the default
    with_ids: bool = False
    decoding: str = "exact"
    on_bad: str = "error"
    train_on: str = "all"
    processor_kwargs: Mapping[str, Any] | None = None
    _spare: Any = field(default=None, init=False, repr=False)  # an image of an earlier batch, to swap with
    _spares: Spares | None = field(default=None, init=False, repr=False)  # what one is drawn from in its place

    def __post_init__(self) -> None:
        self.limit = LengthLimit(self.max_length, self.on_long, self.pad_to_multiple_of)
        self.counts = RecordCounts(self.on_bad)
        check_decoding(self.decoding, self.contrast)
        configure(self.processor, self.processor_kwargs)
        images = getattr(self.processor, "image_processor", None)
        # Pixel contrasts change Pillow images
        self._jpeg = jpeg_pixels if self.contrast is None and takes_pixels(images) else None
        self._at_least = box_for(images) if self.decoding == "reduced" else None
        self._encoder = ConversationEncoder(self.processor, self.chat_template, self.train_on)
        self._check = RecordCheck(self._encoder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer  # type: ignore[attr-defined]

    def draw_spares_from(self, dataset: Any) -> None:
        """What a contrast that takes another record's image draws it from where the batch has none: a data set with
        ``len``, or None for a stream, where such a record has no contrast. Without it an earlier batch's image is taken,
        which depends on where this process began."""
        if self.contrast is not None and contrast_named(self.contrast).takes_others:
            self._spares = Spares(dataset, self._image_of)

    def _image_of(self, record: Mapping[str, Any]) -> Any:
        images = self._encoder.encode(dict(record), "").images
        return decode_image(images[0], "", at_least=self._at_least) if images else None

    def check(self, record: Mapping[str, Any]) -> None:
        """ValueError where a batch would stop at a loaded record, as far as its texts and turns tell."""
        self._check(record)

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        self._encoder.chat_template = self.chat_template  # it may have been changed
        names = [record_name(record, index) for index, record in enumerate(records)]
        rows = _Rows(self._encoder, names, [self._conversation(*pair) for pair in zip(records, names, strict=True)])
        batch = self._processed(rows)
        long = self.limit.too_long(names, batch["attention_mask"])
        if long and self.on_long == "drop":
            for row in long:
                self.counts.too_long(names[row], int(batch["attention_mask"][row].sum()), self.max_length)
            rows.leave_out(long)
            batch = self._processed(rows)
        self._add_labels(batch, rows, records)
        if long and self.on_long == "truncate":
            batch = self._cut(batch, rows, records, long)
        if self.on_long != "error" or self.on_bad != "error":
            batch[LENGTH_COUNTS] = self.counts.take()
        if self.with_ids:
            batch[RECORD_IDS] = names
        if self.contrast is not None:
            batch.update(self._without_content(rows))
        return batch

    def _conversation(self, record: dict[str, Any], name: str) -> Conversation | None:
        """The record with its images decoded; None if it has no label and such records are left out."""
        try:
            conversation = self._encoder.encode(record, name)
        except NoLabel as error:
            self.counts.without_label(error)
            return None
        # Image processors stack images, so they must agree in their number of channels
        conversation.images = [
            decode_image(image, name, at_least=self._at_least, jpeg=self._jpeg) for image in conversation.images
        ]
        return conversation

    def _processed(self, rows: _Rows, images: list[list[Any]] | None = None) -> Any:
        """The processor's tensors for the rows, with their own images or with others of the same sizes."""
        special, conversations = rows.adds_special_tokens, rows.conversations
        known = {
            (row.text, special): row.ids.ids
            for row in conversations
            if self._encoder.adds_special_tokens(row.text) == special
        }
        of_rows = images or [row.images for row in conversations]
        runs = short_runs(self.processor, self._encoder.placeholder_ids, known)
        try:
            with fewer_copies(getattr(self.processor, "image_processor", None)), runs:
                return self._tensors(conversations, of_rows, special)
        except Exception as error:  # whatever a family's own code says of its inputs
            failing = [row for row in range(len(conversations)) if self._fails_on(rows, of_rows, row)]
            some = failing if failing else range(len(conversations))
            names = ", ".join(rows.names[row] for row in some)
            sizes = ", ".join(dict.fromkeys(_size(image) for row in some for image in of_rows[row]))
            raise ValueError(
                f"{names}: {type(self.processor).__name__} failed on them: {error}"
                f"{f' (images of {sizes} pixels)' if sizes else ''}. If it fails on every batch, it is not complete or not "
                "the model's: load it from the model's folder. If only on these, leave them out."
            ) from error

    def _tensors(self, conversations: Sequence[Conversation], images: list[list[Any]], special: bool) -> Any:
        return processed(
            self.processor,
            [row.text for row in conversations],
            images,
            prefixes=[row.prefix for row in conversations],
            add_special_tokens=special,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def _fails_on(self, rows: _Rows, images: list[list[Any]], row: int) -> bool:
        try:
            self._tensors([rows.conversations[row]], [images[row]], rows.adds_special_tokens)
        except Exception:
            return True
        return False

    def _add_labels(self, batch: Any, rows: _Rows, records: Sequence[dict[str, Any]]) -> None:
        """Puts ``labels`` [B, L] into the batch and, where records bring weights, ``token_weights`` [B, L]."""
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, conversation in enumerate(rows.conversations):
            # Padding is told by position: its id may be a real token's, such as the end of a turn.
            columns = batch["attention_mask"][row].nonzero().flatten()
            ids = batch["input_ids"][row, columns]
            targets = columns[self._label_positions(conversation, ids.tolist())]
            labels[row, targets] = batch["input_ids"][row, targets]
        batch["labels"] = labels
        weights = precomputed_weights(records, rows.names, labels, rows.left_out)
        if weights is not None:
            batch[TOKEN_WEIGHTS] = weights

    def _label_positions(self, conversation: Conversation, ids: list[int]) -> list[int]:
        """Where the labels of a conversation stand among the ids that the processor made of it."""
        image_ids = self._encoder.image_ids if conversation.images else frozenset()
        positions = expanded_positions(conversation.ids, ids, image_ids)
        if positions is None:
            raise ValueError(
                f"{conversation.name}: its {len(conversation.ids.ids)} tokens cannot be followed into the {len(ids)} that "
                f"{type(self.processor).__name__} made of them: something other than images was inserted, or text was "
                "merged with it. Its labels would be wrong. If the template belongs to another family, use the "
                "processor's own."
            )
        pairs = zip(positions, conversation.labelled, strict=True)
        return [position for position, is_label in pairs if is_label and position is not None]

    def _cut(self, batch: Any, rows: _Rows, records: Sequence[dict[str, Any]], long: list[int]) -> Any:
        """The batch with the text of its ``long`` rows cut; a row that keeps no label is left out."""
        lengths = batch["attention_mask"].sum(1).tolist()
        self.limit.cut(batch, long, rows.names, self._encoder.image_ids)
        unlabelled = [row for row in long if not _has_label(batch["labels"][row])]
        if unlabelled:
            for row in unlabelled:
                self.counts.without_label(no_label_left(rows.names[row], self.max_length))
            rows.leave_out(unlabelled)
            batch = self._processed(rows)
            self._add_labels(batch, rows, records)
        rest = [row for row in long if row not in unlabelled]
        self.limit.cut(batch, rest, rows.names, self._encoder.image_ids)
        for row in rest:
            self.counts.cut(rows.names[row], lengths[row], self.max_length)
        self.limit.trim(batch)
        return batch

    def _without_content(self, rows: _Rows) -> dict[str, Any]:
        """The pixel inputs once more, of images without their content. Their sizes are the same, and so is all else."""
        assert self.contrast is not None
        images = [row.images for row in rows.conversations]
        if not any(images):
            return {}
        missing = torch.zeros(len(images), dtype=torch.bool)
        spare = self._spare if self._spares is None else self._drawn(images, rows.names, missing)
        changed = contrast_images(images, rows.names, self.contrast, self.strength, self.epoch, spare)
        self._spare = next(image for of_row in images for image in of_row)
        batch = self._processed(rows, changed)
        found = {f"{CONTRAST_PREFIX}{name}": value for name, value in batch.items() if name.startswith("pixel_values")}
        return found if self._spares is None else {**found, NO_CONTRAST: missing}

    def _drawn(self, images: list[list[Any]], names: list[str], missing: Tensor) -> Any:
        """The image for a record that alone in its batch has any. Its own where there is none: then it is ``missing``."""
        of_images = [row for row, of_row in enumerate(images) if of_row]
        if len(of_images) != 1 or self._spares is None:
            return None
        (row,) = of_images
        spare = self._spares.draw(images[row][0], names[row], self.epoch)
        missing[row] = spare is None
        return images[row][0] if spare is None else spare


class _Rows:
    """The conversations of one batch. Those left out have a row of one word in their place."""

    def __init__(
        self, encoder: ConversationEncoder, names: list[str], conversations: list[Conversation | None]
    ) -> None:
        self._encoder = encoder
        self.names = names
        # Of the records as they are: a row of one word does not begin with what a template writes
        first = next((row for row in conversations if row is not None), None)
        self.adds_special_tokens = first is not None and encoder.adds_special_tokens(first.text)
        self.left_out = {row for row, conversation in enumerate(conversations) if conversation is None}
        self.conversations = [
            conversation or encoder.empty(name, self.adds_special_tokens)
            for name, conversation in zip(names, conversations, strict=True)
        ]

    def leave_out(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.conversations[row] = self._encoder.empty(self.names[row], self.adds_special_tokens)
        self.left_out.update(rows)


def _has_label(labels_L: Tensor) -> bool:
    return bool((labels_L != IGNORE_INDEX).any())


def _size(image: Any) -> str:
    """Width and height of a Pillow image or of an array [..., height, width] as errors show them."""
    width, height = image.size if isinstance(image, Image.Image) else tuple(image.shape[-2:])[::-1]
    return f"{width} × {height}"
