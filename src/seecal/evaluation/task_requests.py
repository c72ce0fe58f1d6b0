"""What lmms-eval asks of a model, as records, and the answers in its order. Without lmms-eval itself.

A request's ``args`` are (text, doc_to_messages, generation settings, number of the document, task, split); the document is
``documents[task][split][number]``.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.image_placement import PLACEHOLDER, split_text

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 1024  # of lmms-eval's own models, where a task names no number
# lmms-eval puts this in for every task that names no stop; its own LLaVA and Qwen models do not stop there either
_FILLED_IN = ["\n\n"]
# Settings of generate() that are passed on, and those of them that only sampling reads
_PASSED = frozenset(
    {"num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens", "early_stopping"}
)
_OF_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p"})
_OWN = frozenset({"max_new_tokens", "max_gen_toks", "until", "do_sample"})


@dataclass(frozen=True)
class Settings:
    """How a task wants its answers.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        until: an answer ends before the first of these texts.
        generation: more arguments of ``generate``.
        ignored: names that mean nothing here.
    """

    max_new_tokens: int
    until: tuple[str, ...]
    generation: dict[str, Any]
    ignored: tuple[str, ...] = ()


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings in a task's ``generation_kwargs``.

    Sampled is with a temperature above 0, unless ``do_sample`` is false; or with ``do_sample`` and no temperature.

    Raises:
        ValueError: ``until`` is no text or list of texts, or ``max_new_tokens`` no number above 0.
    """
    rest = {name: value for name, value in given.items() if value is not None}
    until = rest.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"until={until!r}: expected a text or a list of texts. Correct the task's generation_kwargs.")
    most = rest.get("max_new_tokens", rest.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"max_new_tokens={most!r}: expected a whole number, 1 or more. Correct generation_kwargs.")
    temperature, do_sample = rest.get("temperature"), rest.get("do_sample")
    sampled = bool(temperature) if temperature is not None else bool(do_sample)
    sampled = sampled and do_sample is not False
    names = _PASSED | (_OF_SAMPLING if sampled else frozenset())
    return Settings(
        max_new_tokens=most,
        until=tuple(stop for stop in until if stop) if list(until) != _FILLED_IN else (),
        generation={"do_sample": sampled, **{name: rest[name] for name in sorted(names & rest.keys())}},
        ignored=tuple(sorted(rest.keys() - _PASSED - _OF_SAMPLING - _OWN)),
    )


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first stop in it, without blanks around it.

    >>> cut(" red\\nUSER: and now?", ["USER:", "\\n"])
    'red'
    """
    answer = answer.strip()
    places = [place for stop in until if (place := answer.find(stop)) >= 0]
    return answer[: min(places)].strip() if places else answer


def record_of(messages: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """lmms-eval's messages as a record: ``id``, ``messages`` with image parts, ``images`` in the order of those.

    Its chat form puts images before the text. Some prompts mark their place all the same (MMT-Bench: "Question: <image>").
    As many marks as images: each image goes to its mark; one mark: all images go there; none: they stay in front.

    Raises:
        ValueError: a video or sound, an image that cannot be had, or marks that fit the images in none of these ways.
    """
    images: list[Any] = []
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        own = [_image(part, name) for part in parts if part["type"] != "text"]
        words = [dict(part) for part in parts if part["type"] == "text"]
        marks = sum(part["text"].count(PLACEHOLDER) for part in words)
        if own and marks:
            if marks not in (1, len(own)):
                raise ValueError(
                    f"{name}: {len(own)} images, but {marks} marks {PLACEHOLDER} in the prompt. Correct the task's prompt: "
                    "one mark for each image, one for all of them, or none."
                )
            parts = [placed for part in words for placed in _at_marks(part["text"], 1 if marks > 1 else len(own))]
        else:
            parts = [{"type": "image"} if part["type"] != "text" else dict(part) for part in parts]
        images += own
        turns.append({"role": message["role"], "content": parts})
    return {"id": name, "messages": turns, "images": images}


def _at_marks(text: str, images: int) -> list[dict[str, Any]]:
    """A text's parts, with this many images at each mark."""
    parts: list[dict[str, Any]] = []
    for part in split_text(text):
        parts += [part] if part["type"] == "text" else [dict(part) for _ in range(images)]
    return parts


def _image(part: Mapping[str, Any], name: str) -> Any:
    """A PIL image, or the path of one."""
    if part["type"] != "image":
        raise ValueError(f"{name}: it holds a part of type {part['type']!r}; models here take images and text only")
    image = part.get("url", part.get("image"))
    if isinstance(image, str) and not Path(image).is_file():
        raise ValueError(f"{name}: no image at {image}. Download the task's data first.")
    if image is None:
        raise ValueError(f"{name}: an image part without an image. Correct the task's doc_to_visual.")
    return image


@dataclass(frozen=True)
class _Asked:
    """One request: its place in the order of all, the text by whose length rows go together, and its question."""

    place: int
    text: str
    task: str
    split: str
    document: int
    messages: Callable[[Any], Any]

    @property
    def name(self) -> str:
        return f"{self.task}, doc_id {self.document}"

    def key(self, settings: Settings) -> str:
        """By which its answer is known again."""
        return json.dumps([self.task, self.split, self.document, self.text, repr(settings)])


def answered(
    requests: Sequence[Any],
    documents: Mapping[str, Any],
    ask: Callable[[list[dict[str, Any]], Settings], list[str]],
    *,
    batch_size: int,
    tell: Callable[[int], None] = lambda number: None,
    kept: MutableMapping[str, str] | None = None,
) -> list[str]:
    """An answer for each request, in their order.

    Args:
        requests: lmms-eval's, for ``generate_until``.
        documents: its ``task_dict``.
        ask: gives the answers to up to ``batch_size`` records. One batch has one way to generate and, as far as may be,
            rows of one length; the longest come first, so that a batch too large for the memory shows at once.
        tell: called with the number of answers of each batch.
        kept: answers by :meth:`_Asked.key`; those that are there are not asked for, the others are put in. Sampled ones
            are not kept.

    Raises:
        ValueError: what a task asks for cannot be done; a failure is never an empty answer. It names task and document.
    """
    found: list[str | None] = [None] * len(requests)
    for settings, group in _groups(requests):
        keep = None if settings.generation["do_sample"] else kept
        asked = [one for one in group if keep is None or one.key(settings) not in keep]
        if keep is not None:
            for one in group:
                found[one.place] = keep.get(one.key(settings))
        if len(asked) < len(group):
            tell(len(group) - len(asked))
        for begin in range(0, len(asked), batch_size):
            some = asked[begin : begin + batch_size]
            texts = ask([_record(one, documents) for one in some], settings)
            if len(texts) != len(some):
                raise ValueError(f"{some[0].name}: {len(texts)} answers to {len(some)} questions")
            for one, text in zip(some, texts, strict=True):
                found[one.place] = answer = cut(text, settings.until)
                if keep is not None:
                    keep[one.key(settings)] = answer
            tell(len(some))
    assert None not in found
    return [text for text in found if text is not None]


def _groups(requests: Sequence[Any]) -> Iterator[tuple[Settings, list[_Asked]]]:
    """Requests that are generated in one way, the longest text first. What a task sets in vain is said once."""
    groups: dict[str, tuple[Settings, list[_Asked]]] = {}
    ignored: defaultdict[str, set[str]] = defaultdict(set)
    for place, request in enumerate(requests):
        text, messages, given, document, task, split = request.args
        try:
            settings = settings_of(given)
        except ValueError as error:
            raise ValueError(f"task {task}: {error}") from None
        ignored[task] |= set(settings.ignored)
        _, group = groups.setdefault(
            repr((settings.max_new_tokens, settings.until, settings.generation)), (settings, [])
        )
        group.append(_Asked(place, text, task, split, document, messages))
    for task, names in ignored.items():
        if names:
            logger.warning("task %s: its generation_kwargs %s mean nothing here", task, ", ".join(sorted(names)))
    for settings, group in groups.values():
        yield settings, sorted(group, key=lambda one: (-len(one.text), one.place))


def _record(one: _Asked, documents: Mapping[str, Any]) -> dict[str, Any]:
    try:
        messages = one.messages(documents[one.task][one.split][one.document])
    except Exception as error:  # the task's own code
        raise ValueError(f"{one.name}: the task failed to put its question: {type(error).__name__}: {error}") from error
    return record_of(messages, one.name)
