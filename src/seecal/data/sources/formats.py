"""What data sets call things: a table of formats, each turning one row into messages and images.

A format of your own is one row in :data:`FORMATS`: which keys tell it, and a function from a row (a dict without nulls) to
``(messages, images)`` as ``make_record`` in ``records.py`` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..image_placement import place_first
from ..paths import RecordError, show

Messages = list[dict[str, Any]]
Converted = tuple[Messages, list[Any]]

# Who speaks in `from`, as LLaVA, ShareGPT and their relatives write it.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Format:
    """One way to write a record.

    Attributes:
        keys: what a row has, for people.
        matches: whether a row with these keys is in this format. The first of the table that says yes is taken.
        convert: the row's messages and images; RecordError where a key is missing or of a wrong type.
        uses: all keys that ``convert`` reads; any other is said to be left out. None: nothing is said.
    """

    keys: str
    matches: Callable[[set[str]], bool]
    convert: Callable[[dict[str, Any]], Converted]
    uses: frozenset[str] | None = None


def from_conversations(row: dict[str, Any]) -> Converted:
    """LLaVA and ShareGPT: ``conversations`` of ``{"from", "value"}``, ``<image>`` where an image stands."""
    messages: Messages = []
    if "system" in row:
        messages.append({"role": "system", "content": want(row, "system", str)})
    for turn in want(row, "conversations", list):
        if not isinstance(turn, Mapping):
            raise RecordError(f"key 'conversations': turn {show(turn)} is not an object with 'from' and 'value'.")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RecordError(f"key 'from': {show(speaker)} is not one of {', '.join(SPEAKERS)}. Rename it.")
        text = want(turn, "value", str) if turn.get("value") is not None else None
        messages.append({"role": SPEAKERS[speaker], "content": text})
    return messages, images_of(row)


def from_messages(row: dict[str, Any]) -> Converted:
    """``messages`` of ``{"role", "content"}``, content a text or parts."""
    images = images_of(row)
    return place_first(_messages(row, "messages"), images), images


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
    images = images_of(row)
    return place_first(prompt + completion, images), images


def from_caption(row: dict[str, Any]) -> Converted:
    """An image, its ``text`` or ``caption`` and, if there is one, the ``prompt`` that asks for it."""
    if "file_name" in row:
        images: list[Any] = [want(row, "file_name", str)]
    else:
        images = images_of(row)
    key = "text" if "text" in row else "caption"
    question = [{"type": "text", "text": want(row, "prompt", str)}] if row.get("prompt") else []
    user = {"role": "user", "content": [{"type": "image"}] * len(images) + question}
    # The caption as a part: it is the file's text, in which <image> would be no placeholder
    answer = {"role": "assistant", "content": [{"type": "text", "text": want(row, key, str)}]}
    return [user, answer], images


def _any_of(*names: str) -> Callable[[set[str]], bool]:
    return lambda keys: not keys.isdisjoint(names)


_CONVERSATIONS = frozenset({"conversations", "system", "image", "images"})

FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        "conversations (from, value), images or system",
        lambda keys: "conversations" in keys and not keys.isdisjoint({"images", "system"}),
        from_conversations,
        _CONVERSATIONS,
    ),
    "llava": Format("conversations (from, value), image", _any_of("conversations"), from_conversations, _CONVERSATIONS),
    "messages": Format(
        "messages (role, content), images or image",
        _any_of("messages"),
        from_messages,
        frozenset({"messages", "image", "images"}),
    ),
    "prompt_completion": Format(
        "prompt, completion, images or image",
        lambda keys: {"prompt", "completion"} <= keys,
        from_prompt_completion,
        frozenset({"prompt", "completion", "image", "images"}),
    ),
    "captions": Format(
        "file_name, image or images, with text or caption, perhaps prompt",
        lambda keys: not (keys.isdisjoint({"file_name", "image", "images"}) or keys.isdisjoint({"text", "caption"})),
        from_caption,
        frozenset({"file_name", "image", "images", "text", "caption", "prompt"}),
    ),
}


def known_formats() -> str:
    return "; ".join(f"{name}: {row_format.keys}" for name, row_format in FORMATS.items())


def detect(row: Mapping[str, Any]) -> str | None:
    """The name of the first format that the row's keys match."""
    return next((name for name, row_format in FORMATS.items() if row_format.matches(set(row))), None)


def want(row: Mapping[str, Any], key: str, kind: type) -> Any:
    """``row[key]``, which must be there and a ``kind``; RecordError otherwise."""
    if key not in row:
        raise RecordError(f"key {key!r} is missing; it has {_keys(row)}.")
    if not isinstance(row[key], kind):
        raise RecordError(f"key {key!r}: {show(row[key])} is not {'a text' if kind is str else 'a list'}.")
    return row[key]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """What stands under ``images`` or ``image``, one or many, as a list."""
    if "image" in row and "images" in row:
        raise RecordError("keys 'image' and 'images' are both there. Keep one.")
    value = row.get("images", row.get("image"))
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _messages(row: Mapping[str, Any], key: str) -> Messages:
    messages = want(row, key, list)
    for message in messages:
        if not isinstance(message, Mapping):
            raise RecordError(f"key {key!r}: message {show(message)} is not an object with 'role' and 'content'.")
    return [dict(message) for message in messages]


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(show(key, 40) for key in sorted(map(str, row))[:12]) or "no keys"
