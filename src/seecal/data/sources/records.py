"""The one record that every source becomes, and what makes a record usable.

    {"id": "a7",
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
     "images": [{"path": "/data/cat.jpg", "bytes": None}]}

Images stay paths or encoded bytes; the collator decodes them when it makes a batch. Only their headers are read here.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Features, List, Value
from PIL import Image

from ..image_placement import images_in_order, parts_of
from ..images.decode import check_header, check_start, upright
from ..message_keys import LEARN_KEYS, SPOKEN_KEYS, is_learnt, other_keys, packed, unpacked
from ..paths import ImageFolders, MissingImage, NoAnswer, RecordError, UnusableImage, embedded_image, show

ROLES = ("system", "user", "assistant")
OF_A_MESSAGE = " of a message"
_NOTHING: Mapping[str, Any] = {}
TOOL = "tool"  # answers the tool calls of the assistant, and stands nowhere else
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
# What a set may bring beside: weights of its label tokens, and the ids that they were made for
WEIGHTS = Features({"weights": List(Value("float32")), "weight_ids": List(Value("int32"))})
_LARGEST = {"weights": (2 - 2**-23) * 2.0**127, "weight_ids": 2**31 - 1}


def make_record(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any],
    root: str | ImageFolders | None,
    unused: Counter[str] | None = None,
) -> dict[str, Any]:
    """The record of ``messages`` whose contents are texts or parts, with ``images`` for the image parts in their order.

    Args:
        name: the record's id.
        images: paths, encoded bytes, base64, ``{"path", "bytes"}`` or Pillow images.
        root: the folder or folders that paths start from and stay in.
        unused: counts keys of messages and parts that only a chat template may have a use for.

    Raises:
        RecordError: an unknown role, no assistant turn to learn or an empty one, a part that is neither text nor image,
            another number of images than of placeholders, an image that must not or cannot be used.
    """
    of_parts: Counter[str] | None = None
    others: list[Mapping[str, Any]] = []
    if all(len(message) == 2 and isinstance(message.get("content"), str) for message in messages):  # most records
        parted: list[dict[str, Any]] = [{"role": role_of(one), "content": parts_of(one)} for one in messages]
    else:
        of_parts = None if unused is None else Counter()
        parted = []
        for message in messages:
            message, rest = _with_other_keys(message)
            parted.append({"role": role_of(message, others), "content": parts_of(message, of_parts)})
            others.append(rest)
    _check_answers(parted, others)
    ordered = images_in_order(parted, images)
    if any(others):
        for message, rest in zip(parted, others, strict=True):
            message["content"] = packed(message["content"], rest)
        if unused is not None:
            unused.update({f"{key}{OF_A_MESSAGE}" for rest in others for key in rest if key not in LEARN_KEYS})
    if unused is not None and of_parts:
        unused.update(f"{key} of a part" for key in of_parts)
    return {"id": name, "messages": parted, "images": [_usable(image, root) for image in ordered]}


def _usable(image: Any, root: str | ImageFolders | None) -> dict[str, Any]:
    """The stored image; whatever is wrong with it is an UnusableImage."""
    try:
        return stored_image(image, root)
    except UnusableImage:
        raise
    except RecordError as error:
        raise UnusableImage(str(error)) from None


def weights_of(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of :data:`WEIGHTS` of a row. ``wanted``: those that the first record has, and so every one.

    Raises:
        RecordError: a column that the others lack or have, or one that is no list of numbers that its type can hold.
    """
    for name in WEIGHTS:
        if (name in row) != (name in wanted):
            here, there = ("has", "has none") if name in row else ("has none", "has them")
            raise RecordError(
                f"key {name!r}: it {here} and the first record {there}. Give them in every record or in none; columns="
                f"{{{name!r}: None}} leaves them out."
            )
    for name in wanted:
        numbers = row[name]
        kinds = (int, float) if name == "weights" else int
        if not isinstance(numbers, list) or not all(isinstance(one, kinds) and one is not True for one in numbers):
            raise RecordError(
                f"key {name!r}: {show(numbers)}: expected a list with a number for each label token. If it is something "
                f"else: columns={{{name!r}: None}} leaves it out."
            )
        large = next((one for one in numbers if _LARGEST[name] < abs(one) < math.inf), None)
        if large is not None:
            raise RecordError(
                f"key {name!r}: {show(large)} is out of the range of {WEIGHTS[name].feature.dtype}. Correct it, or leave "
                f"the key out: columns={{{name!r}: None}}."
            )
    # Arrow refuses whole numbers that float32 does not hold exactly
    return {name: list(map(float, row[name])) if name == "weights" else row[name] for name in wanted}


def _with_other_keys(message: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the message as it was before it was packed, its keys beside role and content)."""
    if len(message) == 2 and isinstance(message.get("content"), str):
        return message, _NOTHING
    message = unpacked(message)
    return message, other_keys(message)


def role_of(message: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """The message's role; RecordError unless it is one of :data:`ROLES`, or a tool's where one of those before calls it."""
    role = message.get("role")
    if role not in ROLES and not (role == TOOL and any("tool_calls" in rest for rest in before)):
        raise RecordError(
            f"key 'role': {show(role)} is not one of {', '.join(ROLES)}. Rename it or leave the turn out."
        )
    return str(role)


def _check_answers(messages: list[dict[str, Any]], others: list[Mapping[str, Any]]) -> None:
    """RecordError without an answer that is learnt, or where one of those is empty. ``others``: none, or one a message."""
    if not others:
        answers = [(message["content"], _NOTHING) for message in messages if message["role"] == "assistant"]
    else:
        answers = [
            (message["content"], rest)
            for message, rest in zip(messages, others, strict=True)
            if is_learnt({**rest, "role": message["role"]}) and message["role"] == "assistant"
        ]
    if not answers:
        turned_off = any(message["role"] == "assistant" for message in messages)
        what = "no assistant turn that is learnt" if turned_off else "no assistant turn"
        raise NoAnswer(f"{what}, so nothing to learn from it. Add one, or leave the record out.")
    for number, (answer, rest) in enumerate(answers, start=1):
        if len(answer) == 1 and (text := answer[0].get("text")) and not text.isspace():
            continue  # most answers: what is below, sooner
        spoken = bool(rest) and any(rest.get(key) for key in SPOKEN_KEYS)
        if not spoken and not any(part.get("text", "").strip() for part in answer):
            which = f" {number} of {len(answers)}" if len(answers) > 1 else ""
            raise NoAnswer(f"assistant turn{which} is empty. Write its text, or leave the record out.")


def stored_image(value: Any, root: str | ImageFolders | None) -> dict[str, Any]:
    """``{"path", "bytes"}`` of an image, one of the two None; nothing is decoded, but the header is looked at.

    A Pillow image is written as PNG (once, upright and in RGB). Paths are resolved inside ``root``. RecordError otherwise.
    """
    if isinstance(value, Mapping):
        if not {"path", "bytes"} & set(value):
            raise RecordError(f"image {show(value)} has neither 'bytes' nor 'path'.")
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        held = embedded_image(path)
        if held is None:
            return {"path": _whole(path, root), "bytes": None}
        value = held
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise RecordError("an image of 0 bytes. Put the image in, or leave the record out.")
        value = bytes(value)
        _check(value[:64], value, f"an image of {len(value):,} bytes")
        return {"path": None, "bytes": value}
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        try:
            upright(value, f"its {value.format or value.mode} image").save(buffer, "PNG")
        except ValueError as error:
            raise RecordError(str(error)) from None
        return {"path": None, "bytes": buffer.getvalue()}
    raise RecordError(f"image {show(value)} is neither a path, nor bytes, nor an image.")


def _whole(path: str, root: str | ImageFolders | None) -> str:
    """The real path of an image file whose header can be used."""
    folders = root if isinstance(root, ImageFolders) else ImageFolders(() if root is None else (root,))
    try:
        real, start = folders.found(path, read=True)
    except MissingImage as error:
        return folders.without(path, error)
    try:
        _check(start, real, f"image {show(path)}")
    except RecordError as error:
        return folders.without(path, error)
    return real


def _check(start: bytes, where: str | bytes, called: str) -> None:
    """RecordError unless the header of an image, a file's path or its content, can be used."""
    try:
        if not check_start(start, partial(_read_at, where), called):
            with open(where, "rb") if isinstance(where, str) else io.BytesIO(where) as file:
                check_header(file, called)
    except (ValueError, OSError) as error:
        raise RecordError(str(error)) from None


def _read_at(where: str | bytes, offset: int, size: int) -> bytes:
    if isinstance(where, bytes):
        return where[offset : offset + size]
    with open(where, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)
