"""The tasks. Each is a module with

- ``texts()``: all that can be asked or answered, for the vocabulary;
- ``ATTRIBUTES``: what a picture can be told by, each with its values; a record has ``attributes``, a value's number for
  each, or -100 where it is not known;
- ``records(split, count, seed, side, answers)``: records of a split, "align" (stage 1), "train" (stage 2), "validation" or
  "test". Test records do not depend on the seed;
- ``held_out(record)``: of what kind of thing none that is in the test set may be in another split: a table, a font, a
  combination.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records import Record

SPLITS = ("align", "train", "validation", "test")


def task_of(name: str) -> Any:
    """The module of a task."""
    return importlib.import_module(f".{name}", __name__)


def digest(image: Any) -> str:
    """Of a picture's content."""
    return hashlib.sha256(f"{image.size} {image.mode}".encode() + image.tobytes()).hexdigest()


def leaks(task: Any, splits: Mapping[str, Sequence[Record]]) -> list[str]:
    """What of the test set stands in another split too: one line each; empty where there is nothing.

    Pictures are told by their content, in every split; tables, fonts and combinations by ``held_out`` of the task.
    """
    found = []
    pictures = {name: {digest(image) for one in records for image in one["images"]} for name, records in splits.items()}
    held = {name: {task.held_out(one) for one in records} - {None} for name, records in splits.items()}
    for what, sets in (("pictures", pictures), ("held-out things", held)):
        others: Iterable[str] = [name for name in sets if name != "test"]
        for name in others:
            both = sets["test"] & sets[name]
            if both:
                found.append(f"{len(both)} {what} of the test set are in {name}, such as {min(map(str, both))}")
    return found
