"""What data sets call things: a table of formats, and one of all their keys with what becomes of each.

A format of your own is one row in :data:`FORMATS`: which keys tell it, and a function from a row (a dict without nulls) to
``(messages, images)`` as ``make_record`` in ``records.py`` takes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..message_keys import LEARN_KEYS, MEDIA_KEYS, SPOKEN_KEYS, holds_image
from ..paths import RecordError, show
from .conversions import Converted, from_caption, from_conversations, from_messages, from_prompt_completion

USED, REFUSED, COUNTED = "used", "refused", "counted"


@dataclass(frozen=True)
class Key:
    """Keys of one place in a row, and what becomes of them.

    Attributes:
        names: the keys; for all others there, how people call them.
        where: "row", "message" (or turn) or "part" of a content.
        fate: "used"; "refused", a record with it is bad; "counted", it is left out, which is said once with the number of
            records.
        what: for whom or why.
        formats: in which it is so; none: in all.
        others: whether it stands for all keys that have no row of their own.
    """

    names: tuple[str, ...]
    where: str
    fate: str
    what: str
    formats: tuple[str, ...] = ()
    others: bool = False


_CHATS = ("sharegpt", "llava")
_ONLY_IMAGES = "images are the only medium; leave the records out, or the key with columns={'KEY': None}"
# The one list of keys: the check and the table in docs/data.md are made from it.
KEYS = (
    Key(("id",), "row", USED, "what errors and reports call the record; 12.0 is 12"),
    Key(("image", "images"), "row", USED, "one image or a list, also as JSON text; an empty text is none"),
    Key(("conversations",), "row", USED, "the turns, also as JSON text", _CHATS),
    Key(("messages",), "row", USED, "the turns, also as JSON text", ("messages",)),
    Key(("system",), "row", USED, "the system message; an empty text is none", (*_CHATS, "messages")),
    Key(("prompt", "completion"), "row", USED, "question and answer, texts or messages", ("prompt_completion",)),
    Key(("file_name",), "row", USED, "the image", ("captions",)),
    Key(("text", "caption"), "row", USED, "the answer; one of them", ("captions",)),
    Key(("prompt",), "row", USED, "the question", ("captions",)),
    Key(MEDIA_KEYS, "row", REFUSED, _ONLY_IMAGES),
    Key(
        ("tools", "functions"), "row", REFUSED, "chat templates are not given them; write them into the system message"
    ),
    Key(
        ("weights", "weight_ids"), "row", USED, "a weight for each label token, and the ids of those tokens; see below"
    ),
    Key(("any other with an image, or the name of an image file",), "row", REFUSED, "see columns", others=True),
    Key(("any other",), "row", COUNTED, "nothing of it is learnt", others=True),
    Key(("role", "content"), "message", USED, "who, and what; also under conversations"),
    Key(("from", "value"), "message", USED, "who, and what; also under messages"),
    Key(LEARN_KEYS, "message", USED, "false or 0: this assistant turn is not learnt"),
    Key((*SPOKEN_KEYS, "name", "tool_call_id"), "message", USED, "where the chat template writes it; else counted"),
    Key(
        (*MEDIA_KEYS, "any other with an image"),
        "message",
        REFUSED,
        "images stand in the record or in parts",
        others=True,
    ),
    Key(("any other",), "message", COUNTED, "unless the chat template writes it", others=True),
    Key(("type", "text"), "part", USED, "a text, or where an image stands; any type but text and image is refused"),
    Key(("image", "path", "url", "image_url"), "part", USED, "an image of its own; an address is refused"),
    Key(("index",), "part", USED, "which of the record's images stands here, where all places say so"),
    Key(("any other",), "part", COUNTED, "nothing of it is learnt", others=True),
)


@dataclass(frozen=True)
class Format:
    """One way to write a record.

    Attributes:
        keys: what a row has, for people.
        matches: whether a row with these keys is in this format. The first of the table that says yes is taken.
        convert: the row's messages and images; RecordError where a key is missing or of a wrong type.
        uses: all keys that ``convert`` reads; any other is refused or counted. None: nothing is said.
    """

    keys: str
    matches: Callable[[set[str]], bool]
    convert: Callable[[dict[str, Any]], Converted]
    uses: frozenset[str] | None = None


def _any_of(*names: str) -> Callable[[set[str]], bool]:
    return lambda keys: not keys.isdisjoint(names)


def _uses(name: str) -> frozenset[str]:
    of_rows = [
        key for key in KEYS if key.where == "row" and key.fate == USED and (name in key.formats or not key.formats)
    ]
    return frozenset(key_name for key in of_rows for key_name in key.names)


_REFUSED = {name: key.what for key in KEYS if key.where == "row" and key.fate == REFUSED for name in key.names}

FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        "conversations (from, value), images or system",
        lambda keys: "conversations" in keys and not keys.isdisjoint({"images", "system"}),
        from_conversations,
        _uses("sharegpt"),
    ),
    "llava": Format("conversations (from, value), image", _any_of("conversations"), from_conversations, _uses("llava")),
    "messages": Format(
        "messages (role, content), images or image", _any_of("messages"), from_messages, _uses("messages")
    ),
    "prompt_completion": Format(
        "prompt, completion, images or image",
        lambda keys: {"prompt", "completion"} <= keys,
        from_prompt_completion,
        _uses("prompt_completion"),
    ),
    "captions": Format(
        "file_name, image or images, with text or caption, perhaps prompt",
        lambda keys: not (keys.isdisjoint({"file_name", "image", "images"}) or keys.isdisjoint({"text", "caption"})),
        from_caption,
        _uses("captions"),
    ),
}


def known_formats() -> str:
    return "; ".join(f"{name}: {row_format.keys}" for name, row_format in FORMATS.items())


def detect(row: Mapping[str, Any]) -> str | None:
    """The name of the first format that the row's keys match."""
    return next((name for name, row_format in FORMATS.items() if row_format.matches(set(row))), None)


def check_keys(row: Mapping[str, Any], uses: frozenset[str] | None, unused: Counter[str]) -> None:
    """Counts in ``unused`` the keys of a row that its format has no use for. RecordError for those that are refused."""
    if uses is None or row.keys() <= uses:
        return
    for key in row.keys() - uses:
        value = row[key]
        if key in _REFUSED:
            if not _is_empty(value):
                raise RecordError(f"key {key!r}: {_REFUSED[key].replace('KEY', key)}.")
        elif holds_image(value):
            raise RecordError(
                f"key {show(key, 40)}: {show(value)} is an image that nothing would look at. Name its key "
                f"(columns={{{show(key, 40)}: 'image'}}), or leave it out (columns={{{show(key, 40)}: None}})."
            )
        else:
            unused[str(key)] += 1


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, tuple, dict)) and not value
