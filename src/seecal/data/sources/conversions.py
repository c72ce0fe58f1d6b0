"""From a row of each format to (messages, images), as ``make_record`` in ``records.py`` takes them.

What is written in another way than the format's own, but can only mean one thing, is understood: a list as JSON text (a
column of a CSV file), ``role`` and ``content`` under ``conversations``, ``from`` and ``value`` under ``messages``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..image_placement import PLACEHOLDER, place_first, refuse_other_marks
from ..paths import RecordError, show

Messages = list[dict[str, Any]]
Converted = tuple[Messages, list[Any]]

# A list of paths or of {"path", "bytes"}, or one such object; no file is called so
_IMAGES_AS_TEXT = re.compile(r"""\s*(?:\[\s*(?:["'{\]]|null)|\{\s*["'](?:path|bytes)["'])""")
# Who speaks in `from`, as LLaVA, ShareGPT and their relatives write it.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}


def from_conversations(row: dict[str, Any]) -> Converted:
    """LLaVA and ShareGPT: ``conversations`` of ``{"from", "value"}``, ``<image>`` where an image stands."""
    messages: Messages = []
    for turn in list_of(row, "conversations"):
        if not isinstance(turn, Mapping):
            raise RecordError(f"key 'conversations': turn {show(turn)} is not an object with 'from' and 'value'.")
        speaker, text = turn.get("from"), turn.get("value")
        if len(turn) == 2 and isinstance(text, str) and isinstance(speaker, str) and speaker in SPEAKERS:  # most turns
            messages.append({"role": SPEAKERS[speaker], "content": text})
        else:
            messages.append(_said(turn) if "role" in turn and "from" not in turn else _spoken(turn))
    messages = _with_system(row, messages)
    return messages, _filled(messages, images_of(row))


def from_messages(row: dict[str, Any]) -> Converted:
    """``messages`` of ``{"role", "content"}``, content a text or parts."""
    messages = _with_system(row, _messages(row, "messages"))
    images = _filled(messages, images_of(row))
    return place_first(messages, images), images


def from_prompt_completion(row: dict[str, Any]) -> Converted:
    """``prompt`` and ``completion``, both texts or both lists of messages."""
    prompt, completion = (
        [{"role": role, "content": row[key]}] if isinstance(row.get(key), str) else _messages(row, key)
        for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if any(message.get("role") == "assistant" for message in prompt):
        raise RecordError(
            "key 'prompt': it has an assistant turn, which would be trained on like any other. Give the whole conversation "
            "under 'messages' if that is wanted; else leave the turn out."
        )
    images = _filled([*prompt, *completion], images_of(row))
    return place_first(prompt + completion, images), images


def from_caption(row: dict[str, Any]) -> Converted:
    """An image, its ``text`` or ``caption`` and, if there is one, the ``prompt`` that asks for it."""
    for first, second in (("text", "caption"), ("file_name", "image"), ("file_name", "images")):
        if first in row and second in row:
            raise RecordError(f"keys {first!r} and {second!r} are both there. Keep one.")
    if "text" not in row and "caption" not in row:
        raise RecordError(f"neither 'text' nor 'caption' is there, or its cell is empty; it has {_keys(row)}.")
    images: list[Any] = [want(row, "file_name", str)] if "file_name" in row else images_of(row)
    if not images:
        raise RecordError(f"no image under 'file_name', 'image' or 'images'; it has {_keys(row)}.")
    key = "text" if "text" in row else "caption"
    question = want(row, "prompt", str) if row.get("prompt") else ""
    refuse_other_marks(question)
    asked: Any = question
    if PLACEHOLDER not in question:
        asked = [{"type": "image"}] * len(images) + ([{"type": "text", "text": question}] if question else [])
    # The caption as a part: it is the file's text, in which <image> would be no placeholder
    answer = {"role": "assistant", "content": [{"type": "text", "text": want(row, key, str)}]}
    return [{"role": "user", "content": asked}, answer], images


def want(row: Mapping[str, Any], key: str, kind: type) -> Any:
    """``row[key]``, which must be there and a ``kind``; RecordError otherwise."""
    if key not in row:
        raise RecordError(f"key {key!r} is missing; it has {_keys(row)}.")
    if not isinstance(row[key], kind):
        raise RecordError(f"key {key!r}: {show(row[key])} is not {'a text' if kind is str else 'a list'}.")
    return row[key]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """What stands under ``images`` or ``image``, one or many, also as JSON text, as a list."""
    if "image" in row and "images" in row:
        raise RecordError("keys 'image' and 'images' are both there. Keep one.")
    key = "images" if "images" in row else "image"
    value = row.get(key)
    if value is None:
        return []
    if isinstance(value, str) and _IMAGES_AS_TEXT.match(value):
        value = _from_text(key, value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _filled(messages: Messages, images: list[Any]) -> list[Any]:
    """The images without empty texts, as tables have them in rows without an image; not where a mark waits for one."""
    if not any(isinstance(image, str) and not image.strip() for image in images):
        return images
    filled = [image for image in images if not (isinstance(image, str) and not image.strip())]
    contents = [message.get("content") for message in messages]
    marks = sum(content.count(PLACEHOLDER) for content in contents if isinstance(content, str))
    parts = [part for content in contents if isinstance(content, list) for part in content]
    marks += sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
    return filled if marks in (0, len(filled)) else images


def _with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """The messages behind the text under ``system``; empty, as tables have it in rows without one, it is none."""
    text = "" if row.get("system") is None else want(row, "system", str)
    if not text.strip():
        return messages
    if messages and messages[0].get("role") == "system":
        if messages[0].get("content") == text:
            return messages
        raise RecordError(
            f"key 'system': {show(text)}, and the first turn is another system message. Keep one, or leave the key out: "
            "columns={'system': None}."
        )
    return [{"role": "system", "content": text}, *messages]


def _messages(row: Mapping[str, Any], key: str) -> Messages:
    messages = list_of(row, key)
    for message in messages:
        if not isinstance(message, Mapping):
            raise RecordError(f"key {key!r}: message {show(message)} is not an object with 'role' and 'content'.")
    return [_spoken(one) if "from" in one and "role" not in one else _said(one) for one in messages]


def _spoken(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message out of ``{"from", "value"}``; its other keys stay."""
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise RecordError(f"key 'from': {show(speaker)} is not one of {', '.join(SPEAKERS)}. Rename it.")
    text = want(turn, "value", str) if turn.get("value") is not None else None
    if len(turn) <= 2:
        return {"role": SPEAKERS[speaker], "content": text}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**rest, "role": SPEAKERS[speaker], "content": text}


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of ``{"role", "content"}``; a role is also known by what ``from`` would call it."""
    role = message.get("role")
    return {**message, "role": SPEAKERS[role]} if isinstance(role, str) and role in SPEAKERS else dict(message)


def list_of(row: Mapping[str, Any], key: str) -> list[Any]:
    """The list under ``key``, also as JSON text, or as the columns that some versions of `datasets` make of it."""
    value = row.get(key)
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        return _from_text(key, value)
    columns = value if isinstance(value, Mapping) else {}
    if all(isinstance(column, list) for column in columns.values()) and len(set(map(len, columns.values()))) == 1:
        return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    return want(row, key, list) if not isinstance(value, tuple) else list(value)


def _from_text(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        kind = "a list" if text.lstrip()[:1] == "[" else "a dict"
        how = f"as Python writes {kind}, not as JSON" if "'" in text.lstrip()[:3] else "no valid JSON"
        raise RecordError(f"key {key!r}: {show(text)} is {how}. Write it with json.dumps.") from None


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(show(key, 40) for key in sorted(map(str, row))[:12]) or "no keys"
