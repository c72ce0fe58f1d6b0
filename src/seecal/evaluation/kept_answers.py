"""Answers as they come, in a file: a run that was stopped, or whose scoring failed, goes on from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class KeptAnswers(dict[str, str]):
    """Question -> answer; what is put in is in the file at once.

    Args:
        path: a JSONL file. Its first line is ``about``; then one [question, answer] a line.
        about: of what the answers depend on beside the question, JSON. A file about something else is begun anew.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        super().__init__(_read(path, about))
        self.path = path
        begun = [json.dumps(dict(about)), *(json.dumps(one) for one in self.items())]
        part = path.with_name(f"{path.name}.part")
        part.write_text("".join(f"{line}\n" for line in begun), "utf8")  # without a line that was cut off
        part.replace(path)

    def __setitem__(self, question: str, answer: str) -> None:
        super().__setitem__(question, answer)
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps([question, answer]) + "\n")

    def forget(self) -> None:
        """Take the file away: the results hold the answers."""
        self.path.unlink(missing_ok=True)


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, str]:
    """The answers that are there already; the last line may be cut off."""
    try:
        first, *lines = path.read_text("utf8").splitlines()
        if json.loads(first) != json.loads(json.dumps(dict(about))):
            return {}
    except (OSError, ValueError):
        return {}
    found = {}
    for line in lines:
        try:
            question, answer = json.loads(line)
        except ValueError:
            break
        found[question] = answer
    return found


def state_of(model: str) -> list[Any]:
    """What tells one model from another of the same name: size and time of every file in its folder; [] for a hub id."""
    folder = Path(model)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [[path.name, (found := path.stat()).st_size, found.st_mtime_ns] for path in files if path.is_file()]
