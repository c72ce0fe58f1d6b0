"""Which characters of an answer each label token is, so that scores can be mapped to words and to other tokenizers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace

from ..data.collators.conversation import Conversation


@dataclass(frozen=True)
class LabelToken:
    """One label token of a record.

    Attributes:
        turn: which of the record's answers it is of, from 0, those that are not learnt counted too.
        token_id: its id.
        start, stop: its characters in that answer as rendered; where a template writes an answer in pieces, in those one
            after another. Both are the answer's length (of the pieces so far) for the token that ends the turn, and for
            blanks that a template puts before it.
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
    pieces, text = conversation.answers, conversation.text
    begins = [start for start, _ in pieces]
    shifts, lengths = [], Counter[int]()  # from a place in the text to one in the answer
    for (start, stop), turn in zip(pieces, conversation.turns, strict=True):
        shifts.append(lengths[turn] - start)
        lengths[turn] += stop - start
    found: list[LabelToken] = []
    last_of_piece: dict[int, int] = {}  # place in `pieces` -> where its last token with characters stands in `found`
    cursor = 0
    for token_id, label, (first, last) in zip(
        conversation.ids.ids, conversation.labelled, conversation.offsets, strict=True
    ):
        # Offsets may overlap, and leave gaps where blanks were trimmed: whatever lies between two ends is the second's
        begin, cursor = cursor, max(cursor, last)
        if not label:
            continue
        place = max(bisect_left(begins, last) - 1, 0)
        start, stop = pieces[place]
        if first >= stop and last > stop:  # beyond the answer: what ends the turn
            begin, end = stop, stop
        else:
            begin, end = min(max(begin, start), stop), min(max(cursor, start), stop)
            last_of_piece[place] = len(found)
        turn, shift = conversation.turns[place], shifts[place]
        found.append(LabelToken(turn, token_id, begin + shift, end + shift, text[begin:end]))
    for place, index in last_of_piece.items():
        stop, token = pieces[place][1], found[index]
        whole = text[token.start - shifts[place] : stop]
        found[index] = replace(token, stop=stop + shifts[place], text=whole)
    return found
