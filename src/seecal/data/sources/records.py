"""The one record that every source becomes, and what makes a record usable.

    {"id": "a7",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
     "images": [{"path": "/data/cat.jpg", "bytes": None}]}

Images stay paths or encoded bytes; the collator decodes them when it makes a batch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from PIL import Image

from ..images.decode import upright
from ..paths import RecordError, refuse_url, resolve_inside, show

PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")
# One schema for all sources: rows of different shapes would otherwise not fit one Arrow table.
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List({"path": Value("string"), "bytes": Value("binary")}),
    }
)


def make_record(
    name: str, messages: Sequence[Mapping[str, Any]], images: Sequence[Any], root: str | None
) -> dict[str, Any]:
    """The record of ``messages`` whose contents are texts or parts, with ``images`` for the image parts in their order.

    Args:
        name: the record's id.
        images: paths, encoded bytes, ``{"path", "bytes"}`` or Pillow images.
        root: the folder that paths start from and stay in.

    Raises:
        RecordError: an unknown role, no assistant turn or an empty one, a part that is neither text nor image, another
            number of images than of placeholders, an image that must not or cannot be used.
    """
    parted: list[dict[str, Any]] = [{"role": role_of(message), "content": parts_of(message)} for message in messages]
    _check_answers(parted)
    own = [part.pop("own", None) for message in parted for part in message["content"] if part["type"] == "image"]
    empty = sum(one is None for one in own)
    if empty != len(images):
        raise RecordError(
            f"{_count(len(images), 'image')}, but {_count(empty, 'placeholder')} ({PLACEHOLDER}) in its messages. Give one "
            "image for each."
        )
    waiting = iter(images)
    ordered = [next(waiting) if one is None else one for one in own]
    return {"id": name, "messages": parted, "images": [stored_image(one, root) for one in ordered]}


def role_of(message: Mapping[str, Any]) -> str:
    """The message's role; RecordError unless it is one of :data:`ROLES`."""
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(
            f"key 'role': {show(role)} is not one of {', '.join(ROLES)}. Rename it or leave the turn out."
        )
    return str(role)


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Text and image parts of a message's content. An image part that brings its own image has it under ``own``."""
    content = message.get("content")
    if isinstance(content, str):
        return split_text(content)
    if content is None:
        if message.get("role") != "assistant":
            raise RecordError(
                f"key 'content': the {message.get('role')} turn has none. Write its text, or leave it out."
            )
        return []  # told as an empty answer
    if not isinstance(content, (list, tuple)):
        raise RecordError(f"key 'content': {show(content)} is neither a text nor a list of parts.")
    return [_part(one) for one in content]


def split_text(text: str) -> list[dict[str, Any]]:
    """The parts of a text in which ``<image>`` marks the images' places.

    Blanks between the images at either end of a message and its text only separate the two, and chat templates write
    their own; they are dropped. All other characters stay.
    """
    _check_text(text)
    if PLACEHOLDER not in text:
        return [{"type": "text", "text": text}] if text else []
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


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RecordError(f"key 'content': part {show(part)} is not an object with a 'type'.")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text", "")
        if not isinstance(text, str):
            raise RecordError(f"key 'text': {show(text)} is not a text.")
        _check_text(text)
        return {"type": "text", "text": text}
    if kind == "image":
        own = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        if part.get("url") is not None:
            refuse_url(str(part["url"]))
        return {"type": "image", "own": own[0]} if own else {"type": "image"}
    raise RecordError(f"key 'type': a part of type {show(kind)}; parts are text or image. Leave it out.")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"a text has half a surrogate pair at character {error.start}: it is no valid Unicode. Correct it."
            ) from None


def _check_answers(messages: list[dict[str, Any]]) -> None:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RecordError("no assistant turn, so nothing to learn from it. Add one, or leave the record out.")
    for number, answer in enumerate(answers, start=1):
        if not any(part.get("text", "").strip() for part in answer):
            which = f" {number} of {len(answers)}" if len(answers) > 1 else ""
            raise RecordError(f"assistant turn{which} is empty. Write its text, or leave the record out.")


def stored_image(value: Any, root: str | None) -> dict[str, Any]:
    """``{"path", "bytes"}`` of an image, one of the two None; nothing is decoded.

    A Pillow image is written as PNG (once, upright and in RGB). Paths are resolved inside ``root``. RecordError otherwise.
    """
    if isinstance(value, Mapping):
        if not {"path", "bytes"} & set(value):
            raise RecordError(f"image {show(value)} has neither 'bytes' nor 'path'.")
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, os.PathLike)):
        return {"path": resolve_inside(os.fspath(value), root), "bytes": None}
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise RecordError("an image of 0 bytes. Put the image in, or leave the record out.")
        return {"path": None, "bytes": bytes(value)}
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        try:
            upright(value, f"its {value.format or value.mode} image").save(buffer, "PNG")
        except ValueError as error:
            raise RecordError(str(error)) from None
        return {"path": None, "bytes": buffer.getvalue()}
    raise RecordError(f"image {show(value)} is neither a path, nor bytes, nor an image.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
