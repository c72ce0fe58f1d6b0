"""Which characters of a rendered conversation are the assistant's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

# As jinja and transformers spell the block that a training template puts around the assistant's words.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and [start, stop) of each assistant turn in it, in characters, none of them empty."""

    text: str
    spans: list[tuple[int, int]]


def render(messages: list[dict[str, Any]], template: str, special_tokens: dict[str, Any], name: str) -> Rendered:
    """The template's text for ``messages`` (contents as lists of parts) and where the assistant speaks in it.

    With ``{% generation %}`` blocks the template says so itself. Otherwise it is rendered a second time with a mark at
    either end of each assistant message, and the marks are taken out again.

    Raises:
        ValueError: the template fails, or changes the assistant's messages so that the marks do not survive, naming the
            record by ``name``.
    """

    def rendered(chat: list[dict[str, Any]], spans: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            answer: Any = render_jinja_template(
                [chat], chat_template=template, return_assistant_tokens_mask=spans, **special_tokens
            )
        except Exception as error:  # a template's own raise_exception, or anything jinja meets in it
            raise ValueError(f"{name}: the chat template cannot render its messages: {error}") from error
        texts, indices = answer
        return texts[0], [(start, stop) for start, stop in indices[0]] if spans else []

    if _MARKER.search(template):
        text, spans = rendered(messages, True)
        return Rendered(text, [span for span in spans if text[slice(*span)].strip()])
    text, _ = rendered(messages, False)
    # A template may trim messages: then marks inside the outer blanks still leave the text as it was.
    for inside_blanks in (False, True):
        opening, closing = _marks(text)
        marked, _ = rendered([_with_marks(one, opening, closing, inside_blanks) for one in messages], False)
        plain, spans = _without_marks(marked, opening, closing)
        if plain == text and len(spans) == sum(_has_words(one) for one in messages):
            return Rendered(text, spans)
    raise ValueError(
        f"{name}: the chat template rewrites the assistant's messages, so their place in its text cannot be found. Put "
        "{% generation %} ... {% endgeneration %} around them in the template."
    )


def _marks(text: str) -> tuple[str, str]:
    """Two strings that the text does not contain."""
    core = "seecal"
    while core in text:
        core += "x"
    return f"[{core}<]", f"[>{core}]"


def _has_words(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and any(part.get("text", "").strip() for part in message["content"])


def _with_marks(message: dict[str, Any], opening: str, closing: str, inside_blanks: bool) -> dict[str, Any]:
    """``message`` with marks before its first and after its last text with words."""
    if not _has_words(message):
        return message
    parts = [dict(part) for part in message["content"]]
    worded = [part for part in parts if part.get("text", "").strip()]
    for part, mark, leading in ((worded[0], opening, True), (worded[-1], closing, False)):
        text = part["text"]
        blanks = (len(text) - len(text.lstrip()) if leading else len(text) - len(text.rstrip())) if inside_blanks else 0
        cut = blanks if leading else len(text) - blanks
        part["text"] = text[:cut] + mark + text[cut:]
    return {**message, "content": parts}


def _without_marks(marked: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks and the spans that they enclosed."""
    text, spans, start = "", [], 0
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", marked):
        if piece == opening:
            start = len(text)
        elif piece == closing:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans
