"""Which characters of an answer each label token is, so that scores can be mapped to words and to other tokenizers."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ..data.collators.conversation import Conversation


@dataclass(frozen=True)
class LabelToken:
    """One label token of a record.

    Attributes:
        turn: the number of its answer in the record, from 0.
        token_id: its id.
        start, stop: its characters in that answer as rendered. Both are the answer's length for the token that ends the
            turn (and for blanks that a template puts before it).
        text: those characters; "" where it has none.
    """

    turn: int
    token_id: int
    start: int
    stop: int
    text: str


def label_tokens(conversation: Conversation) -> list[LabelToken]:
    """The label tokens of a record in order. Their spans tile each answer::

        "".join(token.text for token in label_tokens(conversation) if token.turn == turn) == the answer as rendered

    A character that several tokens make up (an emoji in bytes) belongs to the first of them, the others are empty. Blanks
    that the tokenizer leaves out of its offsets belong to the token that carries them: the next one, or at the end of the
    answer its last. A placeholder for an image inside an answer is no label and has no span.
    """
    answers, text = conversation.answers, conversation.text
    begins = [start for start, _ in answers]
    found: list[LabelToken] = []
    last_of_answer: dict[int, int] = {}  # turn -> where its last token with characters stands in `found`
    cursor = 0
    for token_id, label, (first, last) in zip(
        conversation.ids.ids, conversation.labelled, conversation.offsets, strict=True
    ):
        # Offsets may overlap, and leave gaps where blanks were trimmed: whatever lies between two ends is the second's
        begin, cursor = cursor, max(cursor, last)
        if not label:
            continue
        turn = max(bisect_left(begins, last) - 1, 0)
        start, stop = answers[turn]
        if first >= stop and last > stop:  # beyond the answer: what ends the turn
            begin, end = stop, stop
        else:
            begin, end = min(max(begin, start), stop), min(max(cursor, start), stop)
            last_of_answer[turn] = len(found)
        found.append(LabelToken(turn, token_id, begin - start, end - start, text[begin:end]))
    for turn, index in last_of_answer.items():
        start, stop = answers[turn]
        token = found[index]
        whole = text[start + token.start : stop]
        found[index] = LabelToken(turn, token.token_id, token.start, stop - start, whole)
    return found
