"""What a message says beside its role and its content: whether it is learnt, and what only chat templates know.

    {"role": "assistant", "content": "bad", "loss": False}
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}

A loaded record keeps such keys as one more part of the content, so that all records fit one Arrow table, whatever the keys.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from .paths import RecordError, embedded_image, show

# Whether an assistant turn is learnt, as ms-swift, OpenAI and axolotl write it
LEARN_KEYS = ("loss", "weight", "train")
# What an assistant may have written that is no content
SPOKEN_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking", "function_call")
MEDIA_KEYS = ("video", "videos", "audio", "audios")
KEYS_PART = "message_keys"
_IMAGE_FILE = re.compile(r"[^\n]{1,1000}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic)\s*", re.IGNORECASE)
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_REMOTE = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether an assistant message is to be learnt: unless its ``loss``, ``weight`` or ``train`` is false or 0.

    RecordError for a value that is neither, for two that differ, and for another role's that is true.
    """
    found = {key: message[key] for key in LEARN_KEYS if message.get(key) is not None}
    if not found:
        return True
    for key, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RecordError(
                f"key {key!r}: {show(value)} is neither true (1) nor false (0): a turn is learnt or not; its tokens are "
                "weighted by what they owe to the image. Correct it."
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise RecordError(f"keys {', '.join(map(repr, found))} of one message contradict each other. Keep one.")
    learnt = all(map(bool, found.values()))
    if learnt and message.get("role") != "assistant":
        raise RecordError(
            f"key {next(iter(found))!r}: it asks for learning the {message.get('role')} turn, but only the assistant's are "
            "learnt. Leave the key out there."
        )
    return learnt


def other_keys(message: Mapping[str, Any]) -> dict[str, Any]:
    """All but role and content, without nulls. RecordError for media, which have their places elsewhere."""
    rest = {key: value for key, value in message.items() if value is not None and key not in ("role", "content")}
    for key, value in rest.items():
        if (key in MEDIA_KEYS and value) or holds_image(value):
            raise RecordError(
                f"key {key!r} of a message: images stand under 'images' of the record, or in a part of the content, and "
                "other media are not trained on. Move or remove it."
            )
    return rest


def packed(parts: list[dict[str, Any]], rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A content's ``parts`` and, if there are any, the message's other keys as a last part, in JSON."""
    if not rest:
        return parts
    try:
        text = json.dumps(rest, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:  # bytes, a lone surrogate, a dict within itself
        raise RecordError(f"keys {', '.join(map(show, rest))} of a message cannot be kept ({error}).") from None
    return [*parts, {"type": KEYS_PART, "text": text}]


def unpacked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as it was before :func:`packed`."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)) or not content:
        return message
    last = content[-1]
    if not isinstance(last, Mapping) or last.get("type") != KEYS_PART:
        return message
    try:
        rest = json.loads(last["text"])
    except (KeyError, TypeError, ValueError):
        rest = None
    if not isinstance(rest, dict):
        raise RecordError(f"a part of type {KEYS_PART!r} holds no object in JSON. Leave it out.")
    return {**rest, **message, "content": list(content[:-1])}


def holds_image(value: Any) -> bool:
    """Whether a value is an image or names an image file, one or a list of them. URLs are not: nothing fetches them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and holds_image(value[0])
    if isinstance(value, str):
        if _REMOTE.match(value):
            return False
        return _IMAGE_FILE.fullmatch(value) is not None or _is_base64_image(value)
    if isinstance(value, Mapping):
        return bool(value) and value.keys() <= {"bytes", "path"} and any(value.values())
    if isinstance(value, os.PathLike):
        return holds_image(os.fspath(value))
    return isinstance(value, Image.Image) or (isinstance(value, bytes) and value.startswith(_SIGNATURES))


def _is_base64_image(text: str) -> bool:
    try:
        return embedded_image(text) is not None
    except RecordError:
        return True
