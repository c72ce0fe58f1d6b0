"""Records of a task: a question, an answer whose words of the image are known, and noise put into the answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
"""``id``, ``messages`` (question, answer), ``images`` (one picture, or none), ``kind`` of the question, and ``visual``:
the spans of characters of the answer that only the image tells."""

_OPENINGS = (
    "well looking at the picture i would say that",
    "from what i can see here",
    "as far as the image goes",
    "let me have a look at it first and then",
    "if you ask me",
    "here is what comes to mind when i see this :",
    "to answer your question in plain words",
)
_CLOSINGS = (
    ". hope that helps you .",
    ". that is all there is to it .",
    ". please ask again if you need more .",
    ". it is a simple little drawing .",
    ". there is nothing else to add .",
)


def record(
    identity: str, kind: str, question: str, core: str, image: Any, answers: str, rng: random.Random, **more: Any
) -> Record:
    """A record.

    Args:
        core: the sentence that answers, the words of the image between braces: ``"it shows a {circle}"``.
        answers: "sentence": the core between two stock phrases; "short": the words of the image alone.
        rng: chooses the stock phrases.
        more: further entries.
    """
    parts = [(part, bool(place % 2)) for place, part in enumerate(core.replace("}", "{").split("{"))]
    if answers == "short":
        words = [(text, True) for text, seen in parts if seen]
        parts = [piece for word in words for piece in (word, (" ", False))][:-1]
    else:
        parts = [(f"{rng.choice(_OPENINGS)} ", False), *parts, (f" {rng.choice(_CLOSINGS)}", False)]
    text, visual = "", []
    for part, seen in parts:
        if seen:
            visual.append((len(text), len(text) + len(part)))
        text += part
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"id": identity, "messages": messages, "images": [image], "kind": kind, "visual": visual, **more}


def told(one: Record) -> str:
    """The words of the image in a record's answer."""
    text = one["messages"][1]["content"]
    return " ".join(text[start:stop] for start, stop in one["visual"])


def phrases() -> str:
    """Every word that stands around an answer."""
    return " ".join((*_OPENINGS, *_CLOSINGS))


def without_image(one: Record) -> Record:
    """The same question and answer, nothing shown."""
    return {**one, "id": f"{one['id']}-text", "images": []}


def plain(records: Sequence[Record]) -> list[Record]:
    """What a collator reads of the records: without what only the experiments know, with stored weights."""
    names = ("id", "messages", "images", "weights", "weight_ids")
    return [{name: one[name] for name in names if name in one} for one in records]


def swapped(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """The records, of which exactly ``round(share · n)`` have the answer of another one.

    Two of one kind that say different things exchange their whole answers, so each answer stays as frequent as it was; of
    an odd number the last one takes an answer without giving its own. What was exchanged has ``swapped: True``.

    Args:
        records: for training; a test set has no noise.
        share: from 0 to 1.
        seed: which ones.

    Raises:
        ValueError: more than the records allow: a kind whose answers are all the same has none to exchange.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected a part of the records, from 0 to 1")
    count = round(share * len(records))
    rng = random.Random(f"swapped {seed}")
    pairs = _pairs(records, rng)
    if count > 2 * len(pairs):
        raise ValueError(
            f"share={share}: {count} of {len(records)} answers should be exchanged, but only {2 * len(pairs)} have another "
            "one of their kind to take. Set a smaller share"
        )
    rng.shuffle(pairs)
    takes = [(one, other) for pair in pairs for one, other in (pair, pair[::-1])][:count]
    noisy = list(records)
    for one, other in takes:
        question, answer = records[one]["messages"][0], records[other]["messages"][1]
        messages = [dict(question), dict(answer)]
        noisy[one] = {**records[one], "messages": messages, "visual": list(records[other]["visual"]), "swapped": True}
    return noisy


def _pairs(records: Sequence[Record], rng: random.Random) -> list[tuple[int, int]]:
    """As many pairs of one kind and different answers as a walk over them in random order finds."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(records):
        kinds[one["kind"]].append(place)
    pairs = []
    for kind in sorted(kinds):
        rng.shuffle(kinds[kind])
        waiting: dict[str, list[int]] = {}
        for place in kinds[kind]:
            said = told(records[place])
            other = next((word for word, places in waiting.items() if word != said and places), None)
            if other is None:
                waiting.setdefault(said, []).append(place)
            else:
                pairs.append((place, waiting[other].pop()))
    return pairs
