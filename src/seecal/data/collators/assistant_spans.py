"""Which characters of a rendered conversation are the assistant's."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ..message_keys import SPOKEN_KEYS
from .template_forms import in_a_form_it_takes, rendered_text, words

logger = logging.getLogger(__name__)

# As jinja and transformers spell the block that a training template puts around the assistant's words.
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates split an answer at, or put around its pieces: <think>, </think>, [THINK]
_TAG = re.compile(r"</?[A-Za-z_]\w*>|\[/?[A-Z_]+\]|<\|[A-Za-z_]\w*\|>")
_ADD_HERE = (
    "Put {% generation %} ... {% endgeneration %} around the assistant's messages in the template: then it says itself "
    "where they are."
)

Span = tuple[int, int]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and [start, stop) of what the assistant says in it and is learnt, in characters.

    Attributes:
        text: as the template writes it.
        spans: in order, none of them empty.
        turns: for each span which of the assistant's messages it is of, from 0. A piece that the template's own markers cut
            out, and of which that cannot be told, has a number that no message has.
        unused: keys of messages that the template does not write.
    """

    text: str
    spans: list[Span]
    turns: list[int]
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Chat:
    """A conversation and what the template makes of it."""

    messages: Messages
    text: str
    render: Callable[[Messages], str]  # in the form that the template takes
    name: str

    def with_changed(self, changed: dict[int, dict[str, Any]]) -> str | None:
        """The text with other messages in some places; None where the template refuses them."""
        try:
            return self.render([changed.get(index, message) for index, message in enumerate(self.messages)])
        except ValueError:
            return None


def render(
    messages: Messages,
    template: str,
    special_tokens: dict[str, Any],
    name: str,
    learnt: Collection[int] | None = None,
) -> Rendered:
    """The template's text for ``messages`` (contents as lists of parts) and where the assistant speaks in it.

    With ``{% generation %}`` blocks the template says so itself. Otherwise it is rendered again with marks at either end of
    the assistant's messages, or of their pieces between tags such as ``</think>``, and the marks are taken out again. A
    message with tool calls or reasoning beside its content is what differs from the same message without them.

    Args:
        learnt: the places of the assistant's messages that are learnt; None: all of them.

    Raises:
        ValueError: the template fails, takes no parts, leaves a message out, or changes the assistant's messages so that
            their place cannot be found with certainty, naming the record by ``name``.
    """
    marked = bool(_MARKER.search(template))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = answers if learnt is None else sorted(learnt)
    form, text, spans = in_a_form_it_takes(messages, template, special_tokens, name, marked)

    def rendered(chat: Messages) -> str:
        return rendered_text([form(message) for message in chat], template, special_tokens, name, False)[0]

    chat = _Chat(messages, text, rendered, name)
    unused = _unused_keys(chat, template)
    _refuse_if_left_out(chat, learnt, marked)
    if marked:
        pairs = _of_messages(chat, spans, answers, learnt, unused)
    else:
        found = _spans_of(chat, learnt, unused)
        pairs = sorted((span, answers.index(index)) for index, of_message in found.items() for span in of_message)
    return Rendered(text, [span for span, _ in pairs], [turn for _, turn in pairs], unused)


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
    question, answer = (words(message) for message in messages)
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    before = f"{image * images}{bos}{question}\n"
    spans = [(len(before), len(before) + len(answer))] if answer.strip() else []
    return Rendered(f"{before}{answer}{eos}", spans, [0] * len(spans))


def _spans_of(chat: _Chat, learnt: list[int], unused: frozenset[str]) -> dict[int, list[Span]]:
    """Where each of the messages ``learnt`` stands in the text, whatever markers of its own the template has."""
    spoken = [index for index in learnt if any(key in chat.messages[index] for key in SPOKEN_KEYS if key not in unused)]
    plain = [index for index in learnt if index not in spoken and words(chat.messages[index]).strip()]
    found = _located(chat, plain)
    if found is None:
        raise ValueError(
            f"{chat.name}: the chat template rewrites the assistant's messages, so their place in its text cannot be "
            f"found. {_ADD_HERE}"
        )
    return found | {index: _spoken_spans(chat, index) for index in spoken}


def _of_messages(
    chat: _Chat, marked: list[Span], answers: list[int], learnt: list[int], unused: frozenset[str]
) -> list[tuple[Span, int]]:
    """(span, which of the ``answers`` it is of): those of the template's own ``marked`` spans whose messages are learnt."""
    spans = [span for span in marked if chat.text[slice(*span)].strip()]
    if len(answers) == 1:
        return [(span, 0) for span in spans if learnt]
    for some in (marked, spans):
        if len(some) == len(answers):  # one each, perhaps an empty one
            return [(span, turn) for turn, span in enumerate(some) if answers[turn] in learnt and span in spans]
    try:
        found = _spans_of(chat, learnt, unused)
    except ValueError:
        if learnt != answers:
            raise ValueError(
                f"{chat.name}: the chat template marks {len(spans)} pieces for {len(answers)} assistant messages, so which "
                "of them are learnt cannot be told. Have it mark each message once."
            ) from None
        found = {}
    pairs = []
    for place, span in enumerate(spans):
        of = [index for index, own in found.items() if any(span[0] < stop and start < span[1] for start, stop in own)]
        if of or learnt == answers:
            pairs.append((span, answers.index(of[0]) if of else len(answers) + place))
    return pairs


# ---- Marks ----


@dataclass(frozen=True)
class _Marked:
    """A message with marks in it, and what stands before, between and behind the pieces that they enclose."""

    message: dict[str, Any]
    between: list[str]


def _located(chat: _Chat, indices: list[int]) -> dict[int, list[Span]] | None:
    """For each message of ``indices`` where its words stand; None where marks do not show it beyond doubt."""
    if not indices:
        return {}
    core = _core(chat.text)
    # A template may trim messages: then marks inside the outer blanks still leave the text as it was. One may take an
    # answer apart at a tag and drop or move what is before it: then each piece has to be marked.
    for cut in (_whole, _inside_blanks, _pieces):
        marked = {index: _with_marks(chat.messages[index], f"{core}{index}", cut) for index in indices}
        text = chat.with_changed({index: one.message for index, one in marked.items()})
        if text is None:
            continue
        plain, found = _read_marks(text, core)
        if plain != chat.text or found is None:
            continue
        spans = {index: _joined(plain, found.get(index, {}), one.between) for index, one in marked.items()}
        if all(spans.values()):
            return spans
    return None


def _core(text: str) -> str:
    """A word that the text does not contain."""
    core = "seecal"
    while core in text:
        core += "x"
    return core


def _opening(core: str, piece: int) -> str:
    return f"[{core}.{piece}<]"


def _closing(core: str, piece: int) -> str:
    return f"[>{core}.{piece}]"


def _whole(text: str) -> list[Span]:
    return [(0, len(text))] if text.strip() else []


def _inside_blanks(text: str) -> list[Span]:
    start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    return [(start, stop)] if start < stop else []


def _pieces(text: str) -> list[Span]:
    """What stands between tags, without the blanks around."""
    found: list[Span] = []
    begin = 0
    for start, stop in [*(tag.span() for tag in _TAG.finditer(text)), (len(text), len(text))]:
        found += [(begin + first, begin + last) for first, last in _inside_blanks(text[begin:start])]
        begin = stop
    return found


def _with_marks(message: dict[str, Any], core: str, cut: Callable[[str], list[Span]]) -> _Marked:
    """``message`` with marks around the pieces that ``cut`` finds in each of its texts.

    Cut as a whole, its first and last text with words are the ends, whatever stands between them.
    """
    parts = [dict(part) for part in message["content"]]
    texts = [part for part in parts if part.get("text", "").strip()]
    between, before, piece = [], "", 0
    if cut is not _pieces:
        first, last = cut(texts[0]["text"])[0][0], cut(texts[-1]["text"])[0][1]
        texts[-1]["text"] = texts[-1]["text"][:last] + _closing(core, 0) + texts[-1]["text"][last:]
        texts[0]["text"] = texts[0]["text"][:first] + _opening(core, 0) + texts[0]["text"][first:]
        return _Marked({**message, "content": parts}, ["", ""])
    for part in texts:
        text, made, done = part["text"], "", 0
        for start, stop in cut(text):
            between.append(before + text[done:start])
            before = ""
            made += text[done:start] + _opening(core, piece) + text[start:stop] + _closing(core, piece)
            done, piece = stop, piece + 1
        before += text[done:]
        part["text"] = made + text[done:]
    return _Marked({**message, "content": parts}, [*between, before])


def _read_marks(marked: str, core: str) -> tuple[str, dict[int, dict[int, Span]] | None]:
    """(the text without marks, message → piece → its span); None for the latter where they are not in pairs and in order,
    so that something was cut off between them, moved or written twice."""
    mark = re.compile(rf"\[{core}(\d+)\.(\d+)<\]|\[>{core}(\d+)\.(\d+)\]")
    text, done = "", 0
    found: dict[int, dict[int, Span]] = {}
    opened: tuple[int, int] | None = None
    last, start, sound = (-1, -1), 0, True
    for match in mark.finditer(marked):
        text += marked[done : match.start()]
        done = match.end()
        opens = match[1] is not None
        place = (int(match[1]), int(match[2])) if opens else (int(match[3]), int(match[4]))
        if opens:
            sound = sound and opened is None and place > last
            opened, last, start = place, place, len(text)
        else:
            sound = sound and opened == place
            opened = None
            found.setdefault(place[0], {})[place[1]] = (start, len(text))
    text += marked[done:]
    return text, found if sound and opened is None else None


def _joined(text: str, pieces: dict[int, Span], between: list[str]) -> list[Span]:
    """The spans of a message's pieces, those and the tags around them in one where the text has them side by side."""
    spans: list[Span] = []
    for piece, (start, stop) in pieces.items():
        if not text[start:stop].strip():
            continue
        tags = _squeezed(between[piece])
        if spans and piece - 1 in pieces and _squeezed(text[spans[-1][1] : start]) == tags:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start - _length_before(text, start, tags), stop))
        if piece + 1 not in pieces:
            behind = _squeezed(between[piece + 1])
            spans[-1] = (spans[-1][0], stop + _length_behind(text, stop, behind))
    return spans


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _spread(tags: str) -> str:
    """A pattern for ``tags`` with blanks anywhere between them."""
    return r"\s*".join(re.escape(tag) for tag in _TAG.findall(tags))


def _length_before(text: str, start: int, tags: str) -> int:
    """How many characters before ``start`` are the tags of the answer itself, blanks behind them included."""
    found = re.search(rf"{_spread(tags)}\s*$", text[max(0, start - 2 * len(tags) - 64) : start]) if tags else None
    return len(found[0]) if found else 0


def _length_behind(text: str, stop: int, tags: str) -> int:
    found = re.match(rf"\s*{_spread(tags)}", text[stop : stop + 2 * len(tags) + 64]) if tags else None
    return len(found[0]) if found else 0


# ---- Tool calls and reasoning ----


def _spoken_spans(chat: _Chat, index: int) -> list[Span]:
    """Where the template writes a message that has tool calls or reasoning beside its content: what is not there, before
    and behind, when the message is a single mark."""
    message = chat.messages[index]
    mark = f"[{_core(chat.text)}]"
    bare = {key: value for key, value in message.items() if key not in SPOKEN_KEYS}
    text = chat.with_changed({index: {**bare, "content": [{"type": "text", "text": mark}]}})
    before, *rest = text.split(mark) if text is not None else [""]
    start = _end_of_header(chat.text, before) if len(rest) == 1 else None
    if start is None or not chat.text.endswith(rest[0]) or len(chat.text) - len(rest[0]) < start:
        raise ValueError(
            f"{chat.name}: the place of the tool calls or the reasoning of its message {index} cannot be found in the chat "
            f"template's text. {_ADD_HERE}"
        )
    stop = len(chat.text) - len(rest[0])
    if _others_inside(chat, index, start, stop):
        raise ValueError(
            f"{chat.name}: the chat template writes other messages inside its message {index}, whose words would be learnt "
            f"with it. {_ADD_HERE}"
        )
    return [(start, stop)] if chat.text[start:stop].strip() else []


def _others_inside(chat: _Chat, index: int, start: int, stop: int) -> bool:
    """Whether what other messages say stands between ``start`` and ``stop``, or may stand there."""
    core = _core(chat.text)
    marked = {
        other: _with_marks(message, f"{core}{other}", _inside_blanks).message
        for other, message in enumerate(chat.messages)
        if other != index and words(message).strip()
    }
    text = chat.with_changed(marked)
    plain, found = _read_marks(text, core) if text is not None else ("", None)
    if plain != chat.text or found is None or found.keys() != marked.keys():
        # One of them is written in another way: then at least its words must not be there
        said = _squeezed(chat.text[start:stop])
        return any(_squeezed(words(chat.messages[other])) in said for other in marked)
    return any(first < stop and start < last for pieces in found.values() for first, last in pieces.values())


def _end_of_header(text: str, before: str) -> int | None:
    """Where ``text`` leaves what stands before a bare message; None if that is not where the message begins.

    A template that writes an empty <think></think> for a message without reasoning leaves it inside: at its opening tag.
    """
    if text.startswith(before):
        return len(before)
    common = next(at for at, letter in enumerate(before) if text[at : at + 1] != letter)
    if _TAG.sub("", before[common:]).strip():
        return None
    closing = re.search(r"</(\w+)>", before[common:])
    opening = before.rfind(f"<{closing[1]}>", 0, common) if closing else -1
    return opening if opening >= 0 and not _TAG.sub("", before[opening:common]).strip() else common


def _unused_keys(chat: _Chat, template: str) -> frozenset[str]:
    """Keys of messages that the text does not depend on. Reasoning has several names, which transformers takes for one."""
    keys = {key for message in chat.messages for key in message} - {"role", "content"}
    unused = set()
    for key in keys:
        without = {index: {name: value for name, value in message.items() if name != key}
                   for index, message in enumerate(chat.messages) if key in message}  # fmt: skip
        if (key not in template and key not in SPOKEN_KEYS) or chat.with_changed(without) == chat.text:
            unused.add(key)
    return frozenset(unused)


# ---- Messages that are not in the text ----


def _refuse_if_left_out(chat: _Chat, learnt: list[int], marked: bool) -> None:
    """ValueError for an answer that the template's text does not depend on. What other roles say may be left out, as
    LLaVA's "plain" template of projector training leaves out the question: that is said once.
    """
    rest = _squeezed(chat.text)
    for index, message in enumerate(chat.messages):
        answer = message["role"] == "assistant"
        texts = [_squeezed(part["text"]) for part in message["content"] if part["type"] == "text"]
        texts = [text for text in texts if text]
        # Markers say which answers are learnt; what a template does to the others is its own choice.
        if not texts or (answer and (marked or index not in learnt)):
            continue
        if all(text in rest for text in texts):
            rest = rest[rest.index(texts[0]) + len(texts[0]) :]
            continue
        changed = _with_marks(message, _core(chat.text), _inside_blanks).message
        if chat.with_changed({index: changed}) != chat.text:
            continue
        if not answer:
            _say_left_out(message["role"])
            continue
        raise ValueError(
            f"{chat.name}: the chat template leaves out its message {index} (role 'assistant'), so nothing would be learnt "
            "from it. Use a template that writes every answer, or take this one out of the record."
        )


@functools.cache
def _say_left_out(role: str) -> None:
    logger.warning("the chat template leaves out what the role %r says: the model answers without it", role)
