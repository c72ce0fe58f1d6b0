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

from ..image_placement import images_in_order, parts_of
from ..images.decode import upright
from ..paths import RecordError, resolve_inside, show

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
    ordered = images_in_order(parted, images)
    return {"id": name, "messages": parted, "images": [stored_image(image, root) for image in ordered]}


def role_of(message: Mapping[str, Any]) -> str:
    """The message's role; RecordError unless it is one of :data:`ROLES`."""
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(
            f"key 'role': {show(role)} is not one of {', '.join(ROLES)}. Rename it or leave the turn out."
        )
    return str(role)


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
