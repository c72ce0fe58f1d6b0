"""The half of ``seecal eval`` that runs tasks of lmms-eval: ``--tasks``. It only parses and prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from .. import verbosity


def refuse_others(options: Mapping[str, Any]) -> None:
    """ValueError for options that have no meaning beside ``--tasks``."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"--tasks brings its own questions and metrics: leave out {', '.join(given)}, or --tasks")


def run(model: str, tasks: str, **options: Any) -> None:
    """Run the tasks and print their scores beside the paper's figures.

    Args:
        model, tasks, options: of :func:`seecal.evaluation.run_tasks`.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # lmms-eval's bars; ours stay
    from rich.console import Console

    from ..evaluation.lmms_eval import run_tasks

    verbosity.quiet()
    _quiet_harness()
    found = run_tasks(model, tasks, **options)
    if found is None:  # a rank that only helped
        return
    console = Console(highlight=False)
    console.print(table(found))
    for note in notes(found):
        console.print(f" {note}", markup=False)
    if found.file is not None:
        verbosity.say(f"{found.file}: the same as JSON; answers beside it, samples_TASK.jsonl")


def table(found: Any) -> Any:
    """A line for each figure of each task; where the paper has it, in the paper's unit with its baseline and CAL."""
    from rich import box
    from rich.table import Table

    shown = Table("task", "figure", "value", "documents", "the paper", box=box.SIMPLE_HEAD)
    for task, scores in found.scores.items():
        for name, value in scores.items():
            beside = [one for one in found.paper.get(task, []) if one.figure == name]
            paper = "; ".join(f"{one.system} {one.baseline:g} → {one.cal:g}" for one in beside)
            value *= beside[0].times if beside else 1
            shown.add_row(task, name, f"{value:.4f}", str(found.counts.get(task, "")), paper)
    return shown


def notes(found: Any) -> list[str]:
    """What one has to know to compare these figures with others."""
    lines = []
    if found.about["limit"] is not None:
        lines.append(f"Only the first {found.about['limit']} documents of each task: not a benchmark's figure.")
        if "ocrbench" in found.scores:
            lines.append("ocrbench counts right answers out of 1000, whatever --limit says.")
    figures = [one for of_task in found.paper.values() for one in of_task]
    if figures:
        lines.append("The paper: baseline → CAL, single runs (arXiv 2405.17871); values beside it in its unit.")
    unknown = {f"{one.about}: {one.unknown}." for one in figures if one.unknown}
    return [*lines, *sorted(unknown)]


def _quiet_harness() -> None:
    """lmms-eval writes through loguru: from warnings on, to stderr."""
    try:
        from loguru import logger
    except ImportError:  # without lmms-eval; the run says so
        return
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
