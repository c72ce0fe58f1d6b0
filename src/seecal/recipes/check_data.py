"""``seecal check-data``: every record of a recipe's data looked at before training, every image opened, on all cores.

What is wrong, and what training would do about it, is told by the code of ``seecal preview``, record by record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..data.sources.quarantine_file import CHECK, QuarantineFile
from ..scoring.previewed import CUT, KINDS, STOPS, Bad, Check
from ..verbosity import Progress
from .recipe import Recipe, Source, Stage, arguments, read

_CHUNK = 64  # rows that a process looks at at a time
_AHEAD = 4  # chunks a process that are read before they are needed


@dataclass
class DataCheck:
    """What :func:`seecal.check_data` found.

    Attributes:
        looked_at: how many records.
        bad: how many of them training cannot use; those that it only cuts are not among them.
        checks: those that failed, cut records too.
        file: where the bad ones are listed.
        before: how many records an interrupted run had looked at, which this one went on from.
    """

    looked_at: int = 0
    bad: int = 0
    checks: list[Check] = field(default_factory=list)
    file: Path = Path()
    before: int = 0

    def verdict(self) -> str:
        """One line."""
        rows = f"{self.looked_at:,} record{'s' if self.looked_at != 1 else ''} looked at"
        if not self.bad:
            return f"{rows}: training can use {'them all' if self.looked_at != 1 else 'it'}"
        stops = any(check.fate == STOPS for check in self.checks)
        ends = "; training would stop at the first" if stops else ""
        return f"{rows}: {self.bad:,} cannot be used ({self.bad / self.looked_at:.1%}){ends}"

    def __str__(self) -> str:
        lines = [self.verdict()]
        for check in self.checks:
            lines += [f"  {check.count:,} × {check.text}: {check.consequence}", f"      the first: {check.first}"]
        if self.bad:
            lines.append(f"All of them: {self.file}. To train without them: --skip_records {self.file}")
        return "\n".join(lines)


def check_data(
    config: str | Path,
    *,
    out: str | Path = "bad-records.jsonl",
    workers: int | None = None,
    overrides: Sequence[str] = (),
    console: Any = None,
) -> DataCheck:
    """Look at every record of a recipe's training and evaluation data as training would, and list those it cannot use.

    Each record goes alone through the loader, the chat template, the processor and the labels of its stage; its images are
    opened. The list is a ``quarantine.jsonl`` (``where`` is "check"), for ``skip_records`` of a recipe. An interrupted
    check goes on where it was when it is run again; a finished one begins anew.

    Args:
        config: a recipe's file, or the name of one of ours: what ``seecal train --config`` takes.
        out: the list; ``OUT.progress`` beside it says how far it is.
        workers: how many processes; None: one for each core.
        overrides: more settings, as on the command line of ``seecal train``.
        console: a rich console for the progress.

    Raises:
        FileNotFoundError: no such recipe, or no such data.
        ValueError: something in the recipe that training would refuse too; an ``out`` that is something else.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None and hasattr(os, "sched_getaffinity") else workers
    workers = os.cpu_count() or 1 if workers is None else workers
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers={workers!r}: expected a whole number of processes, 1 or more")
    recipe = read(str(config), arguments(overrides))
    parts = _parts(recipe)
    sources = [_located(part) for part in parts]
    state = _State.open(Path(out), recipe, sources)
    with Progress(console) as progress:
        with progress.task("counting records"):
            total = sum(1 for source in sources for _ in source.rows(lambda row: False))
        task = progress.start("checking records", total, unit="record", done=state.looked_at)
        for number, source in enumerate(sources):
            done = state.done[number]
            rows = islice(source.rows(lambda row, done=done: row >= done), done, None)
            for found, chunk in _looked(rows, parts[number], recipe.model, workers):
                state.add(number, chunk, found)
                task.advance(len(chunk), note=f"{state.bad:,} bad" if state.bad else None)
        task.end()
    return state.finish()


@dataclass(frozen=True)
class _Part:
    """One source as a stage uses it."""

    source: Source
    stage: Stage


def _parts(recipe: Recipe) -> list[_Part]:
    """Each source once for each way in which the stages make batches of it."""
    found: dict[str, _Part] = {}
    for stage in recipe.stages:
        names = ("train_on", "max_length", "on_long", "image_decoding", "processor_kwargs")
        settings = [stage.settings.get(name) for name in names]
        for source in (*stage.data, *stage.eval_data):
            key = repr((source, settings, stage.chat_template, stage.on_bad))
            found.setdefault(key, _Part(source, stage))
    return list(found.values())


def _located(part: _Part) -> Any:
    from ..data.sources.load import LocatedRecords

    return LocatedRecords(part.source.path, **part.source.options())


# ---- Looking ----

_PREVIEWERS: dict[str, Any] = {}  # of this process, one for each way of making batches


def _look(part: _Part, model: str, rows: Sequence[Any]) -> list[tuple[int, Bad]]:
    """(place among ``rows``, what is wrong) of those that are bad. Runs in any process."""
    key = repr(part)
    if key not in _PREVIEWERS:
        from ..verbosity import quiet
        from .preview import previewer_of, settings_of

        quiet()
        _PREVIEWERS[key] = previewer_of(model, part.stage, settings_of(part.stage))
    found = []
    for place, row in enumerate(rows):
        _, bad = _PREVIEWERS[key].look(row, False)
        if bad is not None:
            found.append((place, bad))
    return found


def _looked(
    rows: Iterator[Any], part: _Part, model: str, workers: int
) -> Iterator[tuple[list[tuple[int, Bad]], list[Any]]]:
    """(what is wrong, the rows) of each chunk in order; the data is read a little ahead of the processes."""
    chunks: Iterator[list[Any]] = iter(lambda: list(islice(rows, _CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield _look(part, model, chunk), chunk
        return
    # Not forked: this process has threads
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from _in_order(pool, chunks, part, model, workers)


def _in_order(
    pool: Executor, chunks: Iterable[list[Any]], part: _Part, model: str, workers: int
) -> Iterator[tuple[list[tuple[int, Bad]], list[Any]]]:
    running: deque[tuple[Future[Any], list[Any]]] = deque()
    try:
        for chunk in chunks:
            running.append((pool.submit(_look, part, model, chunk), chunk))
            if len(running) >= workers * _AHEAD:
                future, rows = running.popleft()
                yield future.result(), rows
        while running:
            future, rows = running.popleft()
            yield future.result(), rows
    except BrokenProcessPool:
        first, last = rows[0].row, rows[-1].row
        raise ValueError(
            f"a process ended while it looked at rows {first} to {last} of {rows[0].path}, or those after them: killed, or "
            "out of memory. Run it again with --workers 1 to see at which, or fewer workers: it goes on where it was."
        ) from None
    finally:
        for future, _ in running:
            future.cancel()


# ---- What is known so far, on the disk ----


@dataclass
class _State:
    """The list, and beside it how much of each source is in it."""

    file: QuarantineFile
    digest: str
    done: list[int]
    looked_at: int = 0
    bad: int = 0
    size: int = 0
    counts: dict[str, list[Any]] = field(default_factory=dict)  # "kind/fate": [how many, the first]
    before: int = 0

    @property
    def progress(self) -> Path:
        return self.file.path.with_name(self.file.path.name + ".progress")

    @classmethod
    def open(cls, out: Path, recipe: Recipe, sources: Sequence[Any]) -> _State:
        """What an interrupted check of the same recipe and data has left there, or a new one."""
        state = cls(QuarantineFile(out), _digest(recipe, sources), [0] * len(sources))
        if out.is_dir() or (out.exists() and not state.progress.exists() and out.stat().st_size):
            raise ValueError(f"out={str(out)!r}: something else is there. Name another file")
        if state.progress.exists():
            told = json.loads(state.progress.read_text("utf8"))
            if told["digest"] == state.digest and not told["complete"] and _size(out) >= told["size"]:
                for name in ("done", "looked_at", "bad", "size", "counts"):
                    setattr(state, name, told[name])
                state.before = state.looked_at
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        os.truncate(out, state.size)  # lines of a chunk that was not noted as done
        return state

    def add(self, number: int, rows: Sequence[Any], found: Sequence[tuple[int, Bad]]) -> None:
        """One chunk of a source, looked at."""
        lines = []
        for place, bad in found:
            count = self.counts.setdefault(f"{bad.kind}/{bad.fate}", [0, bad.reason])
            count[0] += 1
            if bad.fate != CUT:
                row = rows[place]
                told = {"id": row.id, "reason": bad.reason, "where": CHECK, "source": row.path, "row": row.row}
                lines.append({**told, "kind": bad.kind})
        self.file.add(lines)
        self.bad += len(lines)
        self.looked_at += len(rows)
        self.done[number] += len(rows)
        self.size = self.file.path.stat().st_size
        self._note(complete=False)

    def _note(self, complete: bool) -> None:
        names = ("digest", "done", "looked_at", "bad", "size", "counts")
        aside = self.progress.with_name(self.progress.name + ".part")
        aside.write_text(json.dumps({**{name: getattr(self, name) for name in names}, "complete": complete}), "utf8")
        aside.replace(self.progress)

    def finish(self) -> DataCheck:
        self._note(complete=True)
        order = list(KINDS)
        parted = [(*key.split("/", 1), *told) for key, told in self.counts.items()]
        checks = [Check(kind, fate, count, first) for kind, fate, count, first in parted]
        checks.sort(key=lambda check: (order.index(check.kind), check.fate))
        return DataCheck(self.looked_at, self.bad, checks, self.file.path, self.before)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(recipe: Recipe, sources: Sequence[Any]) -> str:
    """Of the recipe and of the files that its data lies in."""
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for source in sources for path in source.files()]
    return hashlib.sha256(json.dumps([recipe.to_yaml(), files]).encode()).hexdigest()
