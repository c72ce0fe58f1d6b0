"""One conversation as token ids of which the assistant's are labelled; its images are not looked at yet.

messages with images in their places → the chat template's text, with the character spans of the assistant's turns → token
ids, each span's tokens.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..image_placement import images_in_order, parts_of
from ..message_keys import LEARN_KEYS, SPOKEN_KEYS, is_learnt, other_keys, unpacked
from ..options import check_train_on
from ..paths import RecordError
from ..sources.formats import FORMATS, check_keys, detect
from .assistant_spans import Rendered, render, render_prefix
from .image_tokens import TextIds, image_token_ids, placeholder_tokens
from .processors import has_prefix

logger = logging.getLogger(__name__)

NO_TOKEN = -1  # in place of a placeholder's id
# Columns that no format has, but a loaded or mixed set may: a trainer and a mixture put them there
_OURS = frozenset({"weights", "source", "length"})

_NO_END = (
    "the chat template ends the assistant's turns without a special token, so nothing teaches the model to stop; pass a "
    "chat_template that adds one, such as eos_token"
)


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
        answers: [start, stop) in ``text`` of what each learnt assistant turn says, without the token that ends it; several
            for a turn that the template writes in pieces.
        turns: for each of ``answers`` which of the record's assistant turns it is of, as of :class:`Rendered`.
    """

    name: str
    text: str
    prefix: int
    images: list[Any]
    ids: TextIds
    labelled: list[bool]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)


@dataclass
class ConversationEncoder:
    """Makes a record of ``messages`` and images into text, ids and labelled ids, for the processor of a model.

    Args:
        processor: of the model; its tokenizer must be a fast one (the spans need character offsets).
        chat_template: overrides the processor's.
        train_on: "all" the assistant's turns, or the "last" one only.

    Raises:
        ValueError: no fast tokenizer, or no chat template (PaliGemma needs none for one question and one answer).
    """

    processor: ProcessorMixin
    chat_template: str | None = None
    train_on: str = "all"
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_train_on(self.train_on)
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
            NoLabel: no assistant message with text that is learnt.
            ValueError: no messages, images and placeholders that differ in number, a key that is refused, or messages that
                cannot be followed through the template.
        """
        unused = Counter[str]()
        messages, images = in_parts(record, name, unused)
        if all(message.get("role") in ("system", "user") for message in messages):  # not every template takes those
            raise _no_answer(name)
        learnt = self._learnt(messages, name)
        messages = [{key: value for key, value in message.items() if key not in LEARN_KEYS} for message in messages]
        self.refuse_tokens(messages, name, self._uncounted_tokens)
        rendered = self._rendered(messages, name, learnt)
        _refuse_unwritten(messages, learnt, rendered.unused, name)
        unused.update(f"{key} of a message" for key in rendered.unused)
        for key in sorted(unused):
            self._say_once(f"{name}: its key {key} is not used: neither its format nor the chat template takes it")
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
        text_ids = TextIds(ids, places, movable)
        return Conversation(name, rendered.text, prefix, images, text_ids, labelled, offsets, answers, rendered.turns)

    def refuse_tokens(self, messages: Sequence[Mapping[str, Any]], name: str, tokens: Sequence[str]) -> None:
        """RecordError for a text that holds one of ``tokens``, which stand for images or videos."""
        for message in messages:
            for part in message["content"]:
                text = part.get("text")
                token = next((token for token in tokens if token in text), None) if text else None
                if token is not None:
                    raise RecordError(
                        f"{name}: a message's text must not contain {token!r} itself, which stands for an image or a video "
                        f"in what {type(self.processor).__name__} reads. Use image parts, or take it out of the text."
                    )

    @property
    def media_tokens(self) -> list[str]:
        """What no text may hold: what stands for an image, also for one of its features, or for a video."""
        return [*self._placeholders, *self._uncounted_tokens]

    @cached_property
    def _uncounted_tokens(self) -> list[str]:
        """Those of them that are no placeholders of the template's, which are counted."""
        try:
            features: Any = self.tokenizer.convert_ids_to_tokens(sorted(self.image_ids))
        except ValueError:  # the processor fails on every image: the batch tells it
            features = []
        others = (getattr(self.processor, f"{kind}_token", None) for kind in ("video", "audio"))
        tokens = dict.fromkeys([*features, *(str(token) for token in others if token)])
        return [token for token in tokens if token not in self._placeholders]

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

    def _learnt(self, messages: Sequence[Mapping[str, Any]], name: str) -> list[int]:
        """The places of the assistant's messages that are learnt. NoLabel without any."""
        try:
            flags = [is_learnt(message) for message in messages]
        except RecordError as error:
            raise RecordError(f"{name}: {error}") from None
        answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        learnt = [index for index in (answers[-1:] if self.train_on == "last" else answers) if flags[index]]
        if answers and not learnt:
            raise NoLabel(
                f"{name}: no label: its 'loss', 'weight' or 'train' keys leave no assistant turn to learn "
                f"(train_on={self.train_on!r}). Leave it out, or set on_bad to skip."
            )
        return learnt

    def _rendered(self, messages: list[dict[str, Any]], name: str, learnt: list[int]) -> Rendered:
        template, names = self._template(), self.tokenizer.special_tokens_map
        if template is not None:
            return render(messages, template, names, name, learnt)
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
        """(which ids are the assistant's, or end its turn; [start, stop) of each span's words, without what ends it)."""
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
                    self._say_once(_NO_END)
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

    def _say_once(self, what: str) -> None:
        key = what.partition(": ")[2] or what  # without the record's name
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s. This is said once", what)


def _refuse_unwritten(
    messages: Sequence[Mapping[str, Any]], learnt: Sequence[int], unused: frozenset[str], name: str
) -> None:
    """NoLabel for an assistant turn that is nothing but tool calls, or reasoning, which the template does not write."""
    for index in learnt:
        message = messages[index]
        spoken = [key for key in SPOKEN_KEYS if key in message]
        if (
            spoken
            and unused.issuperset(spoken)
            and not any(part.get("text", "").strip() for part in message["content"])
        ):
            raise NoLabel(
                f"{name}: no label: its message {index} is only {', '.join(spoken)}, which the chat template does not "
                "write. Use a template that does, leave the record out, or set on_bad to skip."
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


def in_parts(
    record: Mapping[str, Any], name: str, unused: Counter[str] | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """(the record's messages, whose contents are lists of text and image parts, its images in the order of their parts).

    Args:
        record: in any format of ``seecal.FORMATS``.
        unused: counts its keys that nothing takes.

    Raises:
        ValueError: what ``image_placement.py`` or its format refuses, naming the record by ``name``.
    """
    row = {str(key): value for key, value in record.items() if value is not None}
    format_name = detect(row)
    if format_name is None or row.get("messages") == []:
        raise ValueError(f"{name}: no messages; it has {', '.join(sorted(map(str, record)))}")
    counted = Counter[str]() if unused is None else unused
    try:
        uses = FORMATS[format_name].uses
        check_keys(row, None if uses is None else uses | _OURS, counted)
        given, images = FORMATS[format_name].convert(row)
        messages = []
        for message in map(unpacked, given):
            # Arrow gives every message the keys of all, the missing ones as None: templates must not see them
            rest = other_keys(message)
            role = {"role": message["role"]} if message.get("role") is not None else {}
            parts = Counter[str]()
            messages.append({**role, **rest, "content": parts_of(message, parts)})
            counted.update(f"{key} of a part" for key in parts)
        return messages, images_in_order(messages, images)
    except RecordError as error:
        raise type(error)(f"{name}: {error}") from None


def _no_answer(name: str) -> NoLabel:
    return NoLabel(f"{name}: no label: it has no assistant message with text. Leave it out, or set on_bad to skip.")
