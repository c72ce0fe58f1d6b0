"""A chat template's text for messages, in the form of content that the template takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def words(message: dict[str, Any]) -> str:
    """The texts of a message whose content is a list of parts."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def rendered_text(
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


def in_a_form_it_takes(
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
            text, spans = rendered_text(chat, template, special_tokens, name, marked)
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
    # An empty list would be written as "[]" by a template for texts
    return message if message["content"] else {**message, "content": ""}


def _others_as_text(message: dict[str, Any]) -> dict[str, Any]:
    return _as_parts(message) if message["role"] == "user" else _as_text(message)


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if any(part["type"] == "image" for part in message["content"]):
        return message
    return {**message, "content": words(message)}
