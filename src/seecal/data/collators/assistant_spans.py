"""Which characters of a rendered conversation are the assistant's."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger(__name__)

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
        ValueError: the template fails, takes no parts, leaves a message out, or changes the assistant's messages so that
            the marks do not survive, naming the record by ``name``.
    """
    marked = bool(_MARKER.search(template))
    form, text, spans = _in_a_form_it_takes(messages, template, special_tokens, name, marked)

    def rendered(chat: list[dict[str, Any]]) -> str:
        return _rendered([form(message) for message in chat], template, special_tokens, name, False)[0]

    _refuse_if_left_out(messages, text, rendered, name, marked)
    if marked:
        return Rendered(text, [span for span in spans if text[slice(*span)].strip()])
    # A template may trim messages: then marks inside the outer blanks still leave the text as it was.
    for inside_blanks in (False, True):
        opening, closing = _marks(text)
        with_marks = rendered([_with_marks(message, opening, closing, inside_blanks) for message in messages])
        plain, spans = _without_marks(with_marks, opening, closing)
        if plain == text and len(spans) == sum(_has_words(message) for message in messages):
            return Rendered(text, spans)
    raise ValueError(
        f"{name}: the chat template rewrites the assistant's messages, so their place in its text cannot be found. Put "
        "{% generation %} ... {% endgeneration %} around them in the template."
    )


def render_prefix(messages: list[dict[str, Any]], image: str, bos: str, eos: str, name: str) -> Rendered:
    """PaliGemma's own form, for which there is no chat template: images, bos, the question and a newline, the answer, eos.

    Raises:
        ValueError: the messages are not one of the user's and one of the assistant's, naming the record by ``name``.
    """
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"{name}: its messages are {', '.join(roles)}, but without a chat template PaliGemma takes one question and "
            "one answer (user, assistant). Split the record into such pairs, or give the processor a chat_template: all "
            "before the first answer is then the prefix, and the rest is read in order."
        )
    question, answer = (_words(message) for message in messages)
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    before = f"{image * images}{bos}{question}\n"
    spans = [(len(before), len(before) + len(answer))] if answer.strip() else []
    return Rendered(f"{before}{answer}{eos}", spans)


def _rendered(
    chat: list[dict[str, Any]], template: str, special_tokens: dict[str, Any], name: str, spans: bool
) -> tuple[str, list[tuple[int, int]]]:
    try:
        answer: Any = render_jinja_template(
            [chat], chat_template=template, return_assistant_tokens_mask=spans, **special_tokens
        )
    except Exception as error:  # a template's own raise_exception, or anything jinja meets in it
        raise ValueError(f"{name}: the chat template cannot render its messages: {error}") from error
    texts, indices = answer
    return texts[0], [(start, stop) for start, stop in indices[0]] if spans else []


def _in_a_form_it_takes(
    messages: list[dict[str, Any]], template: str, special_tokens: dict[str, Any], name: str, marked: bool
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], str, list[tuple[int, int]]]:
    """(how to give a message to the template, its text, the spans of its own markers).

    Templates for text take a message's content as a text: given a list of parts they fail, or write it as Python does.
    Messages without images are then given as texts, first those that are not the user's: some take parts from users only.
    """
    refused: ValueError | None = None
    for form in (_as_parts, _others_as_text, _as_text):
        chat = [form(message) for message in messages]
        try:
            text, spans = _rendered(chat, template, special_tokens, name, marked)
        except ValueError as error:
            refused = refused or error
            continue
        contents = [message["content"] for message in chat if message["content"]]
        if not any(isinstance(content, list) and str(content) in text for content in contents):
            return form, text, spans
    raise refused or ValueError(
        f"{name}: the chat template writes a message's list of parts as Python does instead of its text and images: it is "
        "a template for text only. Use the one that comes with the model's own processor."
    )


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    return message


def _others_as_text(message: dict[str, Any]) -> dict[str, Any]:
    return message if message["role"] == "user" else _as_text(message)


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if any(part["type"] == "image" for part in message["content"]):
        return message
    return {**message, "content": _words(message)}


def _refuse_if_left_out(
    messages: list[dict[str, Any]],
    text: str,
    rendered: Callable[[list[dict[str, Any]]], str],
    name: str,
    marked: bool,
) -> None:
    """ValueError for an answer that the template's text does not depend on. What other roles say may be left out, as
    LLaVA's "plain" template of projector training leaves out the question: that is said once.
    """
    rest = "".join(text.split())
    for index, message in enumerate(messages):
        words = ["".join(part["text"].split()) for part in message["content"] if part["type"] == "text"]
        words = [word for word in words if word]
        # Markers say which answers are learnt; what a template does to the others is its own choice.
        if not words or (marked and message["role"] == "assistant"):
            continue
        if all(word in rest for word in words):
            rest = rest[rest.index(words[0]) + len(words[0]) :]
            continue
        opening, closing = _marks(text)
        marked_message = _with_marks(message, opening, closing, inside_blanks=True, any_role=True)
        changed = [*messages[:index], marked_message, *messages[index + 1 :]]
        if rendered(changed) != text:
            continue
        if message["role"] != "assistant":
            _say_left_out(message["role"])
            continue
        raise ValueError(
            f"{name}: the chat template leaves out its message {index} (role 'assistant'), so nothing would be learnt from "
            "it. Use a template that writes every answer, or take this one out of the record."
        )


@functools.cache
def _say_left_out(role: str) -> None:
    logger.warning("the chat template leaves out what the role %r says: the model answers without it", role)


def _marks(text: str) -> tuple[str, str]:
    """Two strings that the text does not contain."""
    core = "seecal"
    while core in text:
        core += "x"
    return f"[{core}<]", f"[>{core}]"


def _words(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _has_words(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(_words(message).strip())


def _with_marks(
    message: dict[str, Any], opening: str, closing: str, inside_blanks: bool, any_role: bool = False
) -> dict[str, Any]:
    """``message`` with marks before its first and after its last text with words, if it is the assistant's."""
    if not _has_words(message) and not any_role:
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
