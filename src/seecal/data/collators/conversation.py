"""One conversation as token ids of which the assistant's are labelled; its images are not looked at yet.

messages with images in their places → the chat template's text, with the character spans of the assistant's turns → token
ids, each span's tokens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..image_placement import images_in_order, parts_of, place_first
from ..paths import RecordError
from .assistant_spans import Rendered, render, render_prefix
from .image_tokens import TextIds, image_token_ids, placeholder_tokens
from .processors import has_prefix

logger = logging.getLogger(__name__)

NO_TOKEN = -1  # in place of a placeholder's id


class NoLabel(ValueError):
    """The record has nothing to learn from."""


@dataclass
class Conversation:
    """One record, encoded.

    Attributes:
        name: how errors call it.
        text: what the chat template makes of it, one placeholder for each image.
        prefix: how many characters of it stand before the first answer.
        images: as the record holds them, in the order of their placeholders.
        ids: of the text.
        labelled: for each id, whether it is a label.
        offsets: for each id its [start, stop) in ``text``, in characters, as the tokenizer gives it.
        answers: [start, stop) in ``text`` of what each assistant turn says, without the token that ends it.
    """

    name: str
    text: str
    prefix: int
    images: list[Any]
    ids: TextIds
    labelled: list[bool]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class ConversationEncoder:
    """Makes a record of ``messages`` and images into text, ids and labelled ids, for the processor of a model.

    Args:
        processor: of the model; its tokenizer must be a fast one (the spans need character offsets).
        chat_template: overrides the processor's.

    Raises:
        ValueError: no fast tokenizer, or no chat template (PaliGemma needs none for one question and one answer).
    """

    processor: ProcessorMixin
    chat_template: str | None = None
    _said_no_end: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer: it gives no character offsets, without which the "
                "assistant's tokens cannot be found. Load the processor with its fast tokenizer."
            )
        self._template()
        self._placeholders = placeholder_tokens(self.processor)
        self._placeholder_ids = [self._id_of(token) for token in self._placeholders]
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # What no word of the vocabulary stands for is text, unless the same token ends turns (GPT-2's)
        unknown = {self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        self._special = (added | set(self.tokenizer.all_special_ids)) - set(self._placeholder_ids) - unknown

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer  # type: ignore[attr-defined]

    @property
    def placeholder_ids(self) -> list[int]:
        """The ids of the tokens that a chat template may write for an image, those that are one token."""
        return [index for index in self._placeholder_ids if index != NO_TOKEN]

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """The ids that stand for an image's features in a row."""
        return image_token_ids(self.processor)[1]

    def encode(self, record: Mapping[str, Any], name: str) -> Conversation:
        """The record as a :class:`Conversation`; errors call it ``name``.

        Raises:
            NoLabel: no assistant message with text.
            ValueError: no messages, images and placeholders that differ in number, or messages that cannot be followed
                through the template.
        """
        if not record.get("messages"):
            raise ValueError(f"{name}: no messages; it has {', '.join(sorted(record))}")
        messages, images = in_parts(record, name)
        if all(message.get("role") in ("system", "user") for message in messages):  # not every template takes those
            raise _no_answer(name)
        rendered = self._rendered(messages, name)
        prefix = rendered.spans[0][0] if rendered.spans else len(rendered.text)
        ids, offsets = self._encoded(rendered.text, prefix)
        places = self._places_of_images(ids)
        if len(places) != len(images):
            raise ValueError(f"{name}: {self._misplaced(len(images), len(places))}")
        labelled, answers = self._labelled(rendered, ids, offsets)
        for position in places:
            labelled[position] = False
        if not any(labelled):
            raise _no_answer(name)
        pieces = [rendered.text[start:stop] for start, stop in offsets]
        movable = [
            bool(piece) and not piece.strip() and not is_label for piece, is_label in zip(pieces, labelled, strict=True)
        ]
        return Conversation(
            name, rendered.text, prefix, images, TextIds(ids, places, movable), labelled, offsets, answers
        )

    def empty(self, name: str, adds_special_tokens: bool) -> Conversation:
        """A row of one word without a label and without an image, so that a batch keeps its number of rows.

        Args:
            adds_special_tokens: of the batch. If not, the row begins as its template begins the others.
        """
        text = str(self.tokenizer.eos_token or self.tokenizer.pad_token)
        if not adds_special_tokens and not has_prefix(self.processor):
            text = f"{self.tokenizer.bos_token or ''}{text}"
        ids = list(self.tokenizer(text, add_special_tokens=adds_special_tokens)["input_ids"])
        nothing = [False] * len(ids)
        return Conversation(name, text, len(text), [], TextIds(ids, [], nothing), nothing)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer puts in its own at the start: not where the chat template has written them."""
        bos = self.tokenizer.bos_token
        return not has_prefix(self.processor) and (bos is None or not text.startswith(bos))

    def _rendered(self, messages: list[dict[str, Any]], name: str) -> Rendered:
        template, names = self._template(), self.tokenizer.special_tokens_map
        if template is not None:
            return render(messages, template, names, name)
        bos, eos = str(self.tokenizer.bos_token), str(self.tokenizer.eos_token)
        return render_prefix(messages, self._placeholders[0], bos, eos, name)

    def _encoded(self, text: str, prefix: int) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [start, stop) of each in ``text``), with one id for each placeholder."""
        cuts = [(prefix, prefix)] if has_prefix(self.processor) else []
        if self._placeholder_ids[0] == NO_TOKEN:
            cuts += [found.span() for found in re.finditer(re.escape(self._placeholders[0]), text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for start, stop in [*sorted(cuts), (len(text), len(text))]:
            encoded = self.tokenizer(
                text[begin:start],
                add_special_tokens=begin == 0 and self.adds_special_tokens(text),
                return_offsets_mapping=True,
            )
            ids += encoded["input_ids"]
            offsets += [(begin + first, begin + last) for first, last in encoded["offset_mapping"]]
            if stop > start:
                ids.append(NO_TOKEN)
                offsets.append((start, stop))
            begin = stop
        return ids, offsets

    def _labelled(
        self, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[bool], list[tuple[int, int]]]:
        """(which ids are the assistant's, or end its turn; [start, stop) of each turn's words, without what ends it)."""
        labelled, answers = [False] * len(ids), []
        for start, stop in rendered.spans:
            turn = [position for position, (first, last) in enumerate(offsets) if first < stop and last > start]
            # A turn that the template's own markers enclose may hold the token that ends it already, blanks behind it; one
            # further inside is the record's own text.
            worded = [position for position in turn if rendered.text[slice(*offsets[position])].strip()]
            if worded and ids[worded[-1]] in self._special:
                answers.append((start, max(start, offsets[worded[-1]][0])))
            else:
                answers.append((start, stop))
                end = self._end_of_turn(rendered.text, stop, turn[-1] + 1, ids, offsets)
                if not end:
                    self._say_no_end()
                turn += end
            for position in turn:
                labelled[position] = True
        return labelled, answers

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

    def _id_of(self, token: str) -> int:
        """:data:`NO_TOKEN` where a placeholder is several tokens (Ovis 2): its processor looks for it in the text."""
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        return ids[0] if len(ids) == 1 else NO_TOKEN

    def _places_of_images(self, ids: list[int]) -> list[int]:
        """At the image token or, if the template writes none (Gemma 3), at what begins an image."""
        for token in self._placeholder_ids:
            if token in ids:
                return [position for position, index in enumerate(ids) if index == token]
        return []

    def _misplaced(self, images: int, placeholders: int) -> str:
        token, processor = self._placeholders[0], type(self.processor).__name__
        if not placeholders:
            return (
                f"the chat template wrote no placeholder ({token!r}) for its {images} images: it is a template for text, "
                f"or one of another family than {processor}. Use the one that comes with the model's own processor."
            )
        return (
            f"{images} images, but {placeholders} image placeholders in its text. A message's text must not contain "
            f"{token!r} itself; use image parts. If it does not, the chat template is not made for {processor}."
        )

    def _say_no_end(self) -> None:
        if not self._said_no_end:
            self._said_no_end = True
            logger.warning(
                "the chat template ends the assistant's turns without a special token, so nothing teaches the model to "
                "stop. Pass a chat_template that adds one, such as eos_token."
            )


def record_name(record: Mapping[str, Any], index: int) -> str:
    """How errors call a record: by its ``id``, else by its place in the batch and its first words."""
    if record.get("id") is not None:
        return f"record {record['id']!r}"
    words = _first_words(record.get("messages") or record.get("prompt"))
    begins = f"; it begins {words!r}" if words else ""
    return f"record {index} of the batch (it has no id{begins})"


def _first_words(messages: Any, most: int = 40) -> str:
    """The beginning of the first text in ``messages``, by which a record can be found again."""
    turns = [messages] if isinstance(messages, str) else messages if isinstance(messages, (list, tuple)) else []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else turn
        parts = content if isinstance(content, (list, tuple)) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str) and text.strip():
                words = " ".join(text.split())
                return words if len(words) <= most else f"{words[:most].rstrip()}…"
    return ""


def in_parts(record: Mapping[str, Any], name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """(the record's messages, whose contents are lists of text and image parts, its images in the order of their parts).

    Raises:
        ValueError: what ``image_placement.py`` refuses, naming the record by ``name``.
    """
    images = _images_of(record)
    try:
        messages = []
        for message in place_first(record["messages"], images):
            # Arrow gives every message the keys of all, the missing ones as None: templates must not see them
            rest = {key: value for key, value in message.items() if value is not None and key != "content"}
            messages.append({**rest, "content": parts_of(message)})
        return messages, images_in_order(messages, images)
    except RecordError as error:
        raise type(error)(f"{name}: {error}") from None


def _images_of(record: Mapping[str, Any]) -> list[Any]:
    images = record.get("images")
    if images is None:
        images = [record["image"]] if record.get("image") is not None else []
    return [images] if not isinstance(images, (list, tuple)) else list(images)


def _no_answer(name: str) -> NoLabel:
    return NoLabel(f"{name}: no label: it has no assistant message with text. Leave it out, or set on_bad to skip.")
