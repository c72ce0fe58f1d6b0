"""What only a model's processor knows of a record, told while data is loaded: no image is opened, few are rendered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..message_keys import KEYS_PART
from ..paths import RecordError
from .conversation import ConversationEncoder

_KEPT = 10_000


class RecordCheck:
    """Refuses loaded records that a batch would stop at, as far as texts, turns and the chat template tell.

    A record whose turns are of a kind that went through the template before (roles, parts and which keys, in order) is not
    rendered again.
    """

    def __init__(self, encoder: ConversationEncoder) -> None:
        self._encoder = encoder
        self._kinds: set[Any] = set()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """RecordError, without the record's name, where it cannot be used."""
        kind = tuple(
            (
                message["role"],
                *(part["text"] if part["type"] == KEYS_PART else part["type"] for part in message["content"]),
            )
            for message in record["messages"]
        )
        try:
            self._encoder.refuse_tokens(record["messages"], "", self._encoder.media_tokens)
            if kind in self._kinds:
                return
            self._encoder.encode(record, "")
        except ValueError as error:
            raise RecordError(str(error).removeprefix(": ")) from None
        if len(self._kinds) < _KEPT:
            self._kinds.add(kind)
