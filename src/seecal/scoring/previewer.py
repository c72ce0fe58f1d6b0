"""What training learns of a record: its tokens as rendered, which of them are labels, and on request Δ and weight of each.

Everything is read off the batch that the trainer's own collator makes of the record alone, so that it cannot be anything
else than what is learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..constants import IGNORE_INDEX, LENGTH_COUNTS, TOKEN_WEIGHTS
from ..core.contrasts import contrast_named
from ..core.options import CALOptions
from ..core.weighting import weights_of
from ..data.collators.conversation import Conversation, ConversationEncoder, NoLabel
from ..data.collators.image_tokens import expanded_positions
from ..data.collators.vision import VisionCollator
from ..data.images.decode import decode_image
from ..data.paths import MissingImage, NoAnswer, RecordError, UnusableImage
from ..data.sources.load import Located
from .measure import delta_of
from .previewed import CUT, LEFT_OUT, PUT_ASIDE, STOPS, Bad, Picture, Piece, PreviewedRecord

SIDE = 320  # pixels of the longer side of a picture that is kept


class Previewer:
    """Looks at one row of the data after another.

    Args:
        collator: the trainer's, for the stage that is looked at.
        on_bad: of the stage.
    """

    def __init__(self, collator: VisionCollator, on_bad: str) -> None:
        self.collator = collator
        # While the data is loaded, and when a batch is made
        self._loading, self._in_a_batch = (LEFT_OUT, PUT_ASIDE) if on_bad == "skip" else (STOPS, STOPS)
        # Nothing cut and nothing left out, so that lengths are known and errors are told
        whole = {"max_length": None, "on_long": "error", "on_bad": "error", "contrast": None, "with_ids": False}
        self._whole = dataclasses.replace(collator, **whole)  # type: ignore[arg-type]
        self._training = dataclasses.replace(collator, on_bad="skip", contrast=None, with_ids=False)
        self._encoder = ConversationEncoder(collator.processor, collator.chat_template, collator.train_on)
        tokenizer = collator.tokenizer
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)

    def look(self, row: Located, wanted: bool) -> tuple[PreviewedRecord | None, Bad | None]:
        """(the record if it is ``wanted`` and training can use it, what is wrong with it)."""
        if row.record is None:
            return None, Bad(_kind_of_row(row.kind), str(row.error), self._loading)
        record = row.record
        try:
            self.collator.check(record)  # while the data is loaded
        except ValueError as error:
            return None, Bad(self._kind(record), _named(row, error), self._loading)
        try:
            whole = dict(self._whole([record]))
        except (ValueError, OSError) as error:
            return None, Bad(self._kind(record), _named(row, error), self._in_a_batch)
        batch, bad = self._limited(row, whole)
        if batch is None or not wanted:
            return None, bad
        conversation = self._encoder.encode(record, record["id"])
        pieces = self._pieces(conversation, whole["input_ids"][0, whole["attention_mask"][0].bool()].tolist(), batch)
        pictures = [_picture(image, record["id"]) for image in conversation.images]
        return PreviewedRecord(row.source, row.row, str(record["id"]), pieces, pictures, batch), bad

    def measure(
        self, model: Any, rows: Sequence[Located], records: Sequence[PreviewedRecord], options: CALOptions
    ) -> list[PreviewedRecord]:
        """The records with Δ and weights.

        Args:
            model: in eval mode.
            rows: those of the records, in their order.
            options: how Δ is measured and weighted.

        Raises:
            ValueError: the model cannot read the batches; nothing to swap an image with.
        """
        on_pixels = contrast_named(options.contrast).on_pixels
        contrast = {"contrast": options.contrast if on_pixels else None, "strength": options.strength}
        collator = dataclasses.replace(self._training, **contrast)  # type: ignore[arg-type]
        found = []
        for number, (row, record) in enumerate(zip(rows, records, strict=True)):
            batch = record.batch
            if on_pixels and record.pictures:
                others = (other for at, other in enumerate(rows) if at != number)
                collator._spare = next((image for other in others for image in self._images(other)), None)
                batch = _without_counts(collator([row.record]))  # type: ignore[list-item]
            found.append(_with_delta(record, model, batch, options))
        return found

    def _limited(self, row: Located, whole: dict[str, Any]) -> tuple[dict[str, Any] | None, Bad | None]:
        """(the batch that training gets of the record, None if it is left out or stops; what is wrong with it)."""
        limit, length = self.collator.max_length, int(whole["attention_mask"].sum())
        if limit is None or length <= limit:
            return whole, None
        name = _named(row, f"{row.record['id']!r}: {length} tokens, max_length={limit}")  # type: ignore[index]
        if self.collator.on_long == "error":
            return None, Bad("long", name, STOPS)
        try:
            batch = self._training([row.record])  # type: ignore[list-item]
        except ValueError as error:  # only an image can stand in the way of a cut
            return None, Bad("image beyond", _named(row, error), self._in_a_batch)
        left_out, _ = batch[LENGTH_COUNTS].tolist()
        if not left_out:
            return _without_counts(batch), Bad("long", name, CUT)
        if self.collator.on_long == "drop":
            return None, Bad("long", name, LEFT_OUT)
        return None, Bad("answer beyond", name, self._in_a_batch)

    def _pieces(self, conversation: Conversation, ids: list[int], batch: dict[str, Any]) -> list[Piece]:
        """The tokens of a row: ``ids`` without padding and with nothing cut, ``batch`` as it is trained on."""
        labels = batch["labels"][0].tolist()
        kept = int(batch["attention_mask"][0].sum())
        weights = batch[TOKEN_WEIGHTS][0].tolist() if TOKEN_WEIGHTS in batch else None
        texts = _texts(conversation)
        columns = self._columns(conversation, ids)
        pieces: list[Piece] = []
        before, column = -1, 0
        while column < len(ids):
            at = columns.get(column)
            if at is None:  # an image: all up to the next token of the text
                stop = next((other for other in range(column, len(ids)) if other in columns), len(ids))
                after = columns.get(stop, len(texts))
                numbers = [
                    number for number, place in enumerate(conversation.ids.placeholders, 1) if before < place < after
                ]
                pieces.append(Piece("", stop - column, None, images=tuple(numbers), cut=column >= kept))
                column = stop
                continue
            label = column < len(labels) and labels[column] != IGNORE_INDEX
            special = ids[column] in self._special
            text = texts[at] or (str(self.collator.tokenizer.convert_ids_to_tokens(ids[column])) if special else "")
            weight = weights[column] if weights is not None and label else None
            pieces.append(Piece(text, 1, ids[column], label, special, cut=column >= kept, weight=weight))
            before, column = at, column + 1
        return pieces

    def _columns(self, conversation: Conversation, ids: list[int]) -> dict[int, int]:
        """Place in the row → which token of the text stands there."""
        image_ids = self._encoder.image_ids if conversation.images else frozenset()
        positions = expanded_positions(conversation.ids, ids, image_ids)
        assert positions is not None, "the collator has followed them already"
        return {position: at for at, position in enumerate(positions) if position is not None}

    def _kind(self, record: Mapping[str, Any]) -> str:
        """Which of :data:`KINDS` stopped a record that was loaded: each step on its own."""
        try:
            self._encoder.refuse_tokens(record["messages"], "", self._encoder.media_tokens)
        except RecordError:
            return "token"
        try:
            conversation = self._encoder.encode(record, "")
        except NoLabel:
            return "answer"
        except ValueError:
            return "template"
        try:
            for image in conversation.images:
                decode_image(image, "")
        except (ValueError, OSError):
            return "image"
        try:
            self._whole([{name: value for name, value in record.items() if name not in ("weights", "weight_ids")}])
        except (ValueError, OSError):
            return "processor"
        return "weights"

    def _images(self, row: Located) -> list[Image.Image]:
        assert row.record is not None
        return [decode_image(image, row.record["id"]) for image in row.record["images"]]


def _with_delta(record: PreviewedRecord, model: Any, batch: dict[str, Any], options: CALOptions) -> PreviewedRecord:
    delta = delta_of(model, batch, options)
    weights = weights_of(delta, options).tolist()
    measured = {
        column: (value if seen else None, weight)
        for column, value, seen, weight in zip(
            delta.position.tolist(), delta.delta.tolist(), delta.has_contrast.tolist(), weights, strict=True
        )
    }
    pieces, column = [], 0
    for piece in record.pieces:
        if piece.label and column in measured:
            value, weight = measured[column]
            # Weights that a record brings are those that training takes
            piece = dataclasses.replace(piece, delta=value, weight=weight if piece.weight is None else piece.weight)
        pieces.append(piece)
        column += piece.tokens
    return dataclasses.replace(record, pieces=pieces, measured=True)


def _texts(conversation: Conversation) -> list[str]:
    """What of the text each of its tokens is. Together they are all of it, up to the last token's end: blanks that the
    tokenizer leaves out of its offsets go to the next one, and a character of several tokens to the first."""
    texts, cursor = [], 0
    for _, last in conversation.offsets:
        begin, cursor = cursor, max(cursor, last)
        texts.append(conversation.text[begin:cursor])
    return texts


def _kind_of_row(kind: type[RecordError] | None) -> str:
    known = {MissingImage: "missing", UnusableImage: "image", NoAnswer: "answer"}
    return known.get(kind, "format")  # type: ignore[arg-type]


def _named(row: Located, what: object) -> str:
    return " ".join(f"{row.source}: row {row.row}: {what}".split())


def _picture(image: Any, name: str) -> Picture:
    opened = decode_image(image, name)
    small = opened.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Picture(small, opened.width, opened.height)


def _without_counts(batch: Any) -> dict[str, Any]:
    kept = dict(batch)
    kept.pop(LENGTH_COUNTS, None)
    return kept
