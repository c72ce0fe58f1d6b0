"""Runs what an experiment still lacks: one process a core, a row when its run is whole, in pieces of some minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .designs import Design, Run, design, names
from .rows import RESULTS, Rows

LIMIT = 8.0  # hours of two cores that the whole set may take
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """How a run is made: of :data:`experiments.nano.PLANS`, and at most so many steps of everything (None: all)."""

    name: str = "cpu"
    steps: int | None = None

    def key(self, run: Run) -> str:
        return run.key(self.name, self.steps)


def pool(folder: Path = RESULTS, only: Iterable[str] | None = None) -> dict[str, Row]:
    """The rows of all experiments by their keys: a run that another experiment has made is not made again.

    Raises:
        ValueError: a row of a nano model that was trained by another plan than ``nano/plan.py`` has now.
    """
    found: dict[str, Row] = {}
    for name in names() if only is None else only:
        for row in Rows(name, folder).all:
            if "key" in row:
                _check_plan(name, row)
                found[row["key"]] = row
    return found


def _check_plan(name: str, row: Row) -> None:
    """Keys do not hold the plan: rows of two plans would be compared as if they were one experiment."""
    from .nano import Cell
    from .nano.plan import plan_of

    if "plan" not in row:  # the model with real weights has its settings in its code
        return
    now = dataclasses.asdict(plan_of(Cell(**row["cell"]), row["scale"], row.get("steps")))
    if changed := [key for key in now if row["plan"].get(key) != now[key]]:
        raise ValueError(
            f"{name}.jsonl: the row {row['key']} was trained with {changed[0]}={row['plan'].get(changed[0])!r}, "
            f"experiments/nano/plan.py has {now[changed[0]]!r}: take that change back, or take the rows out and run again"
        )


def missing(plan: Design, rows: Mapping[str, Row], scale: Scale) -> list[list[Run]]:
    """Runs without a row, those of one alignment together, low seeds first so that no cell is far ahead."""
    groups: dict[str, list[Run]] = {}
    for run in plan.runs:
        if scale.key(run) not in rows:
            groups.setdefault(run.aligned, []).append(run)
    return sorted(groups.values(), key=lambda group: group[0].seed)


# ---- How long ----


class Minutes:
    """Minutes of one core that runs and alignments take: the median of the cell's rows, else as planned.

    Not the mean: a machine that was asleep, or busy with something else, during one run says nothing about the others.
    """

    def __init__(self, rows: Mapping[str, Row], scale: Scale = Scale()) -> None:  # frozen
        self.runs: dict[str, list[float]] = {}
        self.alignments: dict[str, list[float]] = {}
        seen = set()  # many rows tell of one alignment
        for row in rows.values():
            if row["scale"] == scale.name and row.get("steps") == scale.steps:
                cell, told = str(sorted(row["cell"].items())), row["seconds"]
                parts = [told[name] for name in ("weighing", "training", "measuring") if name in told]
                self.runs.setdefault(cell, []).append((sum(parts) or told["all"]) / 60)
                parts_of = row.get("facts", {}).get("seconds", {})
                if parts_of and (made := (cell, row["seed"], *parts_of.values())) not in seen:
                    seen.add(made)
                    self.alignments.setdefault(cell, []).append(sum(parts_of.values()) / 60)

    def of_run(self, run: Run, plan: Design) -> float:
        return self._median(self.runs, run, plan.minutes["run"])

    def of_alignment(self, run: Run, plan: Design) -> float:
        return self._median(self.alignments, run, plan.minutes["alignment"])

    @staticmethod
    def _median(known: Mapping[str, Sequence[float]], run: Run, planned: float) -> float:
        here = known.get(str(sorted(run.cell.items())), [])
        return statistics.median(here) if here else float(planned)


def planned(folder: Path = RESULTS, scale: Scale = Scale()) -> str:  # frozen
    """The whole set: runs and alignments times minutes, what is left of them, and what was cut, by name."""
    rows = pool(folder)
    minutes, runs, alignments = Minutes(rows, scale), set[str](), set[str]()
    lines, total, left = [], 0.0, 0.0
    for name in names():
        plan = design(name)
        mine = others = undone = 0.0
        count = shared = 0
        for run in plan.runs:
            key, cost = scale.key(run), 0.0
            if key in runs:
                shared += 1
            else:
                runs.add(key)
                count += 1
                cost = minutes.of_run(run, plan)
            if run.aligned not in alignments:
                alignments.add(run.aligned)
                cost += minutes.of_alignment(run, plan)
                others += 1
            mine += cost
            undone += 0 if key in rows else cost
        lines.append(
            f"{name}: {count} runs and {others:.0f} alignments of its own ({shared} runs shared with those above), "
            f"{mine:.0f} minutes of one core, {undone:.0f} of them left"
        )
        lines += [f"    cut: {one['what']}: {one['why']}" for one in plan.cut]
        total, left = total + mine, left + undone
    hours = total / 60 / 2
    verdict = "fits into" if hours <= LIMIT else "does not fit into"
    measured = "measured where there are rows, else as the YAML files say"
    lines.append(
        f"In all {hours:.1f} hours of two cores ({left / 120:.1f} left): {verdict} {LIMIT:g}. Minutes: {measured}."
    )
    return "\n".join(lines)


# ---- Running ----


def run(
    name: str, folder: Path = RESULTS, cache: Path = Path(".cache/evidence"), *, scale: Scale = Scale(),
    minutes: float = 30, workers: int = 2, say: Say = print, first: int | None = None,
) -> int:  # fmt: skip
    """Makes runs until none is missing or the time is over. Exit code: 0, 1 if a run failed, 130 after Ctrl-C.

    Args:
        folder: where ``NAME.jsonl`` is appended to.
        cache: keeps alignments; what a stopped run leaves there is used again.
        minutes: no run is begun that would be expected to end later, but for the first; what still runs then is stopped.
        workers: processes, each on one core.
        first: only the first so many of the missing runs.

    Raises:
        ValueError: another process makes runs of this experiment into this folder.
    """
    plan = design(name)
    with _alone(name, folder):
        rows = pool(folder)
        groups = missing(plan, rows, scale)
        there = len(plan.runs) - sum(map(len, groups))
        if first is not None:
            groups = [group[:first] for group in groups[:1]]
        count = sum(map(len, groups))
        of = Minutes(rows, scale)
        cost = {id(one): of.of_run(one, plan) for group in groups for one in group}
        begun = {id(group[0]): of.of_alignment(group[0], plan) for group in groups}
        whole = (sum(cost.values()) + sum(begun.values())) / max(min(workers, len(groups)), 1)
        say(f"{name}: {there} of {len(plan.runs)} runs have their row; {count} now, which take {whole:.0f} minutes")
        if not count:
            return 0
        jobs = [[(one, cost[id(one)]) for one in group] for group in groups]
        piece = Piece(Rows(name, folder), jobs, str(cache), scale, time.time() + 60 * minutes, say)
        return piece.go(workers, whole)


@contextlib.contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process makes runs of {name} into {folder}: wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)


class Piece:
    """The workers of one piece, and what they send: a row, a failure, or that a worker is done."""

    def __init__(
        self, rows: Rows, jobs: Sequence[Sequence[tuple[Run, float]]], cache: str, scale: Scale, until: float, say: Say
    ) -> None:
        self.rows, self.jobs, self.say, self.until = rows, jobs, say, until
        context = multiprocessing.get_context("spawn")
        self.todo, self.found = context.Queue(), context.Queue()
        self.given = (cache, scale, until)
        self.context = context

    def go(self, workers: int, expected: float) -> int:
        for job in self.jobs:
            self.todo.put(job)
        count = sum(map(len, self.jobs))
        begun, made, failed = time.time(), 0, 0
        active = min(workers, len(self.jobs))
        for _ in range(active):
            self.todo.put(None)
        with _one_thread():
            processes = [
                self.context.Process(target=work, args=(self.todo, self.found, *self.given)) for _ in range(active)
            ]
            for process in processes:
                process.start()
        try:
            while active and time.time() < self.until + _GRACE:
                try:
                    kind, told = self.found.get(timeout=1)
                except queue.Empty:
                    active = sum(process.is_alive() for process in processes)
                    continue
                if kind == "row":
                    self.rows.add(told)
                    made += 1
                    spent = (time.time() - begun) / 60
                    left = max(expected - spent, 0) if made < 3 else spent / made * (count - made)
                    self.say(
                        f"{made} of {count}: {_told(told)} in {told['seconds']['all']:.0f} s; {left:.0f} minutes left"
                    )
                elif kind == "failed":
                    failed += 1
                    self.say(told)
                else:
                    active -= 1
        except KeyboardInterrupt:
            self.say("Stopped. Rows and alignments that are whole are kept: the same command goes on.")
            return 130
        finally:
            for process in processes:
                process.terminate()
                process.join()
        if made + failed < count:
            self.say(f"The time is over: {count - made - failed} runs are missing. The same command goes on.")
        return 1 if failed else 0


_GRACE = 20.0  # seconds after the end for a run that is being measured


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """What is started here has one thread: two processes with two each are slower than one."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _told(row: Mapping[str, Any]) -> str:
    cell = "-".join(map(str, row["cell"].values()))
    return f"{cell}, seed {row['seed']}, noise {row['noise']:g}, {row['arm']}, learning rate {row['learning_rate']:g}"


def work(todo: Any, found: Any, cache: str, scale: Scale, until: float) -> None:
    """A worker: jobs until there is none; within a job, runs that are expected to end in time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    _ends_with_its_parent()
    from seecal import verbosity

    from .trials import trial

    verbosity.quiet()
    _silenced()
    first = True
    while (job := todo.get()) is not None:
        for one, minutes in job:
            if not first and time.time() + 60 * minutes > until:
                continue
            first = False
            try:
                found.put(("row", trial(one, Path(cache), scale.name, scale.steps)))
            except (Exception, SystemExit):  # the other runs go on, and it has no row
                found.put(("failed", f"{one.name}, {dict(one.cell)}, seed {one.seed}: {traceback.format_exc()}"))
    found.put(("done", None))


def _ends_with_its_parent() -> None:
    """A worker whose parent was killed has nobody to send its rows to, and would wait for a job for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _silenced() -> None:
    """What trainers and scorers print is not shown; the rows say what matters."""
    sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115  # for the rest of the process
