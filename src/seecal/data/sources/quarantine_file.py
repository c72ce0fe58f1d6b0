"""quarantine.jsonl: the records that a run could not use, a line each, whoever met them: loading, training, evaluation.

``{"id", "reason", "where", "step", "epoch", "rank", "stage", "source", "row", "replaced_by"}``; what does not apply is
null: ``step`` and ``epoch`` for records refused at loading, ``source`` and ``row`` (the file, and the place in it with bad
rows counted) for those met in a batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "quarantine.jsonl"
_FIELDS = ("id", "reason", "where", "step", "epoch", "rank", "stage", "source", "row", "replaced_by")
LOADING, TRAINING, EVALUATION, CHECK = "loading", "training", "evaluation", "check"
# A share says nothing of fewer records
FEWEST = 100


def read_quarantine(path: str | Path) -> list[dict[str, Any]]:
    """The lines of such a file; none where there is none. A last line that a kill cut off is left out.

    Raises:
        ValueError: a line that is none of these.
    """
    return _entries(Path(path), 0)[0]


def _entries(path: Path, begin: int) -> tuple[list[dict[str, Any]], int]:
    """(the lines from byte ``begin`` on, where the last whole one ends)."""
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.decode("utf8", "replace").split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "id" not in entry or "reason" not in entry:
            raise ValueError(f"{path}: line {number} is no record of a quarantine: {line[:60]!r}. Remove that line.")
        found.append(dict.fromkeys(_FIELDS) | entry)
    return found, begin + len(whole)


class QuarantineFile:
    """One such file that several processes add to.

    Args:
        path: of the file; its folder is made when there is something to write.
        stage: the number of a recipe's stage.
    """

    def __init__(self, path: str | Path, stage: int | None = None) -> None:
        self.path, self.stage = Path(path), stage
        self._followed = 0  # bytes

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, each whole whatever other ranks do."""
        lines = [
            json.dumps(dict.fromkeys(_FIELDS) | {"stage": self.stage} | dict(entry), ensure_ascii=False)
            for entry in entries
        ]
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._end_a_cut_line()
        with self.path.open("ab", buffering=0) as file:  # one write a line, at the end wherever that is then
            for line in lines:
                file.write(f"{line}\n".encode(errors="replace"))

    def read(self) -> list[dict[str, Any]]:
        return read_quarantine(self.path)

    def follow(self) -> list[dict[str, Any]]:
        """The lines that any process has added since this was asked last."""
        found, self._followed = _entries(self.path, self._followed)
        return found

    def rewind(self) -> None:
        """Follow from the first line again."""
        self._followed = 0

    def begin(self, step: int) -> None:
        """Forget what this stage met after ``step``: it is going to meet it again."""
        kept = [
            entry
            for entry in self.read()
            if entry["step"] is None or entry["stage"] != self.stage or entry["step"] <= step
        ]
        self._rewrite(kept)

    def forget_loading(self) -> None:
        """Before the data is loaded anew."""
        self._rewrite([entry for entry in self.read() if entry["where"] != LOADING])

    def _rewrite(self, entries: list[dict[str, Any]]) -> None:
        if not self.path.exists():
            return
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf8", "replace")
        if entries:
            aside.replace(self.path)
        else:
            aside.unlink()
            self.path.unlink()

    def _end_a_cut_line(self) -> None:
        """A process that was killed may have left half a line, which would swallow the next."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


class KnownBad:
    """The records that a quarantine file names, to be left out without meeting them.

    A line of loading (or of ``seecal check-data``) means the row of its file; one of training, which does not know it,
    every record of its id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"skip_records={str(path)!r}: no such file. seecal check-data writes one.")
        entries = read_quarantine(self.path)
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self._rows = {(_real(entry["source"]), entry["row"]) for entry in entries if entry["row"] is not None}
        self._ids = {str(entry["id"]) for entry in entries if entry["row"] is None}

    def __contains__(self, place: tuple[str, int, str]) -> bool:
        """Whether (path of the file, row, the record's final id) is one of them."""
        source, row, record_id = place
        return record_id in self._ids or (_real(source), row) in self._rows


@functools.cache
def _real(source: str) -> str:
    return os.path.realpath(source)


def too_many(bad: int, seen: int, most: float | None, where: str, file: Path | None, some: Iterable[str]) -> str | None:
    """The message of an end because of too many bad records; None while there are few enough.

    Args:
        bad, seen: records.
        most: ``max_bad_records``.
        where: "of data.json" or the like.
        file: where all are listed.
        some: the first of them, with their reasons.
    """
    counted = most is None or most == 0 or most >= 1
    if most is None or (bad <= most if counted else bad <= most * seen or seen < FEWEST):
        return None
    listed = "; ".join(re.sub(r"\s+", " ", one)[:200].rstrip(".") for one in list(some)[:5])
    full = f" All of them: {file}." if file is not None else ""
    return (
        f"{bad} of {seen} records {where} cannot be used, more than max_bad_records={most:g} allows. The first: {listed}."
        f"{full} Correct the data, or raise max_bad_records."
    )
