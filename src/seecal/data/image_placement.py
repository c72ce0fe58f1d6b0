"""Where the images of a conversation stand in its messages: the one rule for records that are loaded and for those that a
collator gets directly.

    [{"role": "user", "content": "<image>\\nWhat is it?"}, ...]
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ...]

In a content that is a text, ``<image>`` marks a place. Where nothing marks one, all images go before the text of the first
user message, as in TRL. A content that is a list of parts stays as it is, ``<image>`` in a part's text included.

Marks that stand for other media, or that other trainers write for an image, are refused in such texts: they would be
trained as words. What only speaks of them is written as a part, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .paths import RecordError, embedded_image, refuse_url, show

PLACEHOLDER = "<image>"
# Where an image part may hold an image of its own, instead of taking the record's next one
_OWN_IMAGE = ("image", "path", "url", "image_url")
_PART_KEYS = frozenset({"type", "text", "index", *_OWN_IMAGE})
# What stands for other media in the texts of other trainers, and where HTML or its source is meant
_MEDIA = re.compile(
    r"<(?:img|video|audio)>[^<>\s]+\.\w{2,4}</(?:img|video|audio)>|<img>[^<>\n]*</img>"
    r"|<\|?(?:video|audio|speech|sound)(?:_\d+|_pad|_url)?\|?>|<\|?image[ _]?\d+\|?>|<\|image(?:_pad)?\|>"
    r"|<image_placeholder>|<ImageHere>|<(?-i:(?!image>))image>",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def place_first(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages that mark no place for the images get all of them before the text of the first user message.

    If that message is a list of parts, the parts say where images go: it stays as it is, and :func:`images_in_order` tells
    that there are too few.
    """
    user = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
    if not images or user is None or any(_marks_a_place(message.get("content")) for message in messages):
        return [*messages]
    text = messages[user].get("content")
    if not isinstance(text, str):
        return [*messages]
    refuse_other_marks(text)  # as a part it would stay as it is
    content = [{"type": "image"}] * len(images) + ([{"type": "text", "text": text}] if text else [])
    return [*messages[:user], {**messages[user], "content": content}, *messages[user + 1 :]]


def _marks_a_place(content: Any) -> bool:
    """Whether one of the record's images goes into this content."""
    if isinstance(content, str):
        return PLACEHOLDER in content
    return isinstance(content, (list, tuple)) and any(
        isinstance(part, Mapping) and part.get("type") in ("image", "image_url") and _own_image(part) is None
        for part in content
    )


def parts_of(message: Mapping[str, Any], unused: Counter[str] | None = None) -> list[dict[str, Any]]:
    """Text and image parts of a message's content, without keys that are None: Arrow gives every part the keys of all.

    An image part that brings its own image has it under ``own``, for :func:`images_in_order`. Keys of parts that nothing
    takes are counted in ``unused``. RecordError for a content or a part that is something else.
    """
    content = message.get("content")
    if isinstance(content, str):
        if message.get("role") != "assistant":
            refuse_other_marks(content)
        return split_text(content)
    if content is None:
        if message.get("role") != "assistant":
            raise RecordError(
                f"key 'content': the {message.get('role')} turn has none. Write its text, or leave it out."
            )
        return []  # told as an empty answer
    if not isinstance(content, (list, tuple)):
        raise RecordError(f"key 'content': {show(content)} is neither a text nor a list of parts.")
    return [_part(part, unused) for part in content]


def refuse_other_marks(text: str) -> None:
    """RecordError for a mark such as ``<video>`` or ``<img>a.jpg</img>``, which would be trained as words.

    Code in backticks and HTML elements that are closed again (``<video> ... </video>``) are words.
    """
    if text.count("<") == text.count(PLACEHOLDER) or _MEDIA.search(text) is None:
        return
    for found in _MEDIA.finditer(_SOURCE.sub("", text)):
        mark = found[0]
        name = mark[1:-1]
        if name.isalpha() and f"</{name}>" in text:
            continue
        remedy = "Write <image> where an image stands, and its file under 'images'"
        if not re.match(r"<\|?im", mark, re.IGNORECASE):
            remedy = "Only images are trained on: leave the record out"
        raise RecordError(
            f"a text has the mark {show(mark, 60)}, which would be trained as words. {remedy}; a text that only speaks of "
            "it stays as it is in a part, {'type': 'text', 'text': ...}."
        )


def split_text(text: str) -> list[dict[str, Any]]:
    """The parts of a text in which ``<image>`` marks the images' places.

    Blanks between the images at either end of a message and its text only separate the two, and chat templates write
    their own; they are dropped. All other characters stay.
    """
    _check_text(text)
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}] if text else []
    if (
        text.startswith(PLACEHOLDER) and text.find(PLACEHOLDER, 1) < 0
    ):  # as most data sets have it: what is below, sooner
        text = text[len(PLACEHOLDER) :].lstrip()
        return [{"type": "image"}, {"type": "text", "text": text}] if text else [{"type": "image"}]
    pieces = text.split(PLACEHOLDER)
    worded = [index for index, piece in enumerate(pieces) if piece.strip()]
    first, last = (worded[0], worded[-1]) if worded else (len(pieces), -1)
    pieces = [piece if first <= index <= last else "" for index, piece in enumerate(pieces)]
    if worded and first > 0:
        pieces[first] = pieces[first].lstrip()
    if worded and last < len(pieces) - 1:
        pieces[last] = pieces[last].rstrip()
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (index > 0)
        parts += [{"type": "text", "text": piece}] if piece else []
    return [dict(part) for part in parts]


def images_in_order(messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> list[Any]:
    """The images in the order of the image parts of ``messages``, whose contents :func:`parts_of` made.

    A part's own image is taken out of it; the other parts take ``images`` in order, or by their ``index`` where those are
    the numbers of all. RecordError where the number of the two differs.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) == len(images) and sum(map(len, parts)) == len(parts):  # none has an image or an index of its own
        return [*images]
    own = [part.pop("own", None) for part in parts]
    indices = [part.pop("index", None) for part, image in zip(parts, own, strict=True) if image is None]
    places = sum(image is None for image in own)
    if places != len(images):
        raise RecordError(
            f"{_count(len(images), 'image')}, but {_count(places, 'placeholder')} ({PLACEHOLDER}) in its messages. Give "
            "one image for each. A text that only speaks of it stays as it is in a part, {'type': 'text', 'text': ...}."
        )
    if indices.count(None) < len(indices) and sorted(indices, key=str) == sorted(range(len(images)), key=str):
        images = [images[index] for index in indices]
    waiting = iter(images)
    return [next(waiting) if image is None else image for image in own]


def _part(part: Any, unused: Counter[str] | None) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RecordError(f"key 'content': part {show(part)} is not an object with a 'type'.")
    if unused is not None and not part.keys() <= _PART_KEYS:
        unused.update(str(key) for key in part.keys() - _PART_KEYS if part[key] is not None)
    kind = part.get("type")
    if kind == "text":
        text = "" if part.get("text") is None else part["text"]
        if not isinstance(text, str):
            raise RecordError(f"key 'text': {show(text)} is not a text.")
        _check_text(text)
        return {"type": "text", "text": text}
    if kind in ("image", "image_url"):
        own = _own_image(part)
        if isinstance(own, str) and embedded_image(own) is None:
            refuse_url(own)
        if own is not None:
            return {"type": "image", "own": own}
        index = part.get("index")
        return {"type": "image"} if not isinstance(index, int) else {"type": "image", "index": index}
    raise RecordError(f"key 'type': a part of type {show(kind)}; parts are text or image. Leave it out.")


def _own_image(part: Mapping[str, Any]) -> Any:
    own = next((part[key] for key in _OWN_IMAGE if part.get(key) is not None), None)
    # OpenAI's form: {"type": "image_url", "image_url": {"url": ...}}
    return own["url"] if isinstance(own, Mapping) and isinstance(own.get("url"), str) else own


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"a text has half a surrogate pair at character {error.start}: it is no valid Unicode. Correct it."
            ) from None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
