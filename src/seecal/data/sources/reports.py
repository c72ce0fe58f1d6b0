"""What became of the records while they were read: accepted, refused (also into a run's quarantine file)."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..paths import show
from .quarantine_file import LOADING, QuarantineFile, too_many
from .records import OF_A_MESSAGE

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What became of the records of the last pass: ``accepted + rejected == total``.

    Attributes:
        accepted: how many became records.
        reasons: of those left out, in order: (how errors call it, why).
        format: the name of the format that was read.
        known: how many of those left out were named in ``skip_records``.
    """

    accepted: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    format: str | None = None
    known: int = 0

    @property
    def rejected(self) -> int:
        return len(self.reasons)

    @property
    def total(self) -> int:
        return self.accepted + self.rejected

    def reject(self, called: str, why: str, record_id: str | None = None, source: str = "", row: int = -1) -> None:
        """One more is left out: how errors call it, why, its id, the name of its file and its place there."""
        self.reasons.append((called, why))

    def clear(self) -> None:
        self.accepted = self.known = 0
        self.reasons.clear()


@dataclass
class FileReport(LoadReport):
    """A :class:`seecal.LoadReport` that also writes what was refused into a quarantine file, whatever process reads.

    Attributes:
        file: of the run; None: only counts.
        most: ``max_bad_records``.
        where: "of data.json", as the error of too many says it.
        as_it_comes: whether to end in the middle when a share is passed, for a stream, which has no end to wait for.
    """

    file: QuarantineFile | None = None
    most: float | None = None
    where: str = ""
    as_it_comes: bool = False
    _seen: set[tuple[Any, ...]] | None = field(default=None, repr=False)

    def reject(self, called: str, why: str, record_id: str | None = None, source: str = "", row: int = -1) -> None:
        super().reject(called, why, record_id, source, row)
        if self.file is None:
            return
        if self._seen is None:  # another epoch, or another rank of this machine
            self._seen = {(entry["source"], entry["row"]) for entry in self.file.read() if entry["where"] == LOADING}
        if (source, row) not in self._seen:
            self._seen.add((source, row))
            rank = int(os.environ.get("RANK", "0"))
            told = {"id": record_id, "reason": why, "rank": rank, "stage": None, "source": source, "row": row}
            self.file.add([{**told, "where": LOADING}])
        if self.as_it_comes or (self.most is not None and self.most >= 1):
            self.stop_at_too_many()

    def stop_at_too_many(self) -> None:
        """ValueError where more was refused than may be; what ``skip_records`` names was known."""
        bad, file = self.rejected - self.known, None if self.file is None else self.file.path
        some = [f"{called}: {why}" for called, why in self.reasons]
        message = too_many(bad, self.total - self.known, self.most, self.where, file, some)
        if message is not None:
            raise ValueError(message)


@dataclass
class KeyTally:
    """Which keys the records had that were not used, and how many records each."""

    unused: Counter[str] = field(default_factory=Counter)
    renamed: set[str] = field(default_factory=set)

    def say(self, where: str, columns: Mapping[str, str | None], format: str, total: int) -> None:
        """One line each for the keys left out and those that go to the template, of ``total`` records.

        Raises:
            ValueError: ``columns`` names keys that no record had.
        """
        missing = [key for key in columns if key not in self.renamed]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(
                f"{where}: columns names {names}, which no record has. It maps the data's keys to ours, as in "
                "{'image_path': 'image'}."
            )
        in_messages = {key for key in self.unused if key.endswith(OF_A_MESSAGE)}
        for keys, what in (
            (self.unused.keys() - in_messages, f"left out the keys %s, which {format} has no use for"),
            (in_messages, "the keys %s go to the chat template, and are lost where it does not write them"),
        ):
            if keys:
                numbers = ", ".join(f"{self.unused[key]:,}" for key in sorted(keys)[:20])
                logger.warning(f"%s: {what} (in %s of %s records)", where, listed(keys), numbers, f"{total:,}")


def listed(keys: set[str]) -> str:
    """The first twenty of them, in order, as errors show them."""
    return ", ".join(show(key, 40) for key in sorted(keys)[:20]) + (", …" if len(keys) > 20 else "") or "none"
