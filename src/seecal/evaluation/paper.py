"""The paper's figures for a benchmark, to stand beside a result. They are kept in ``paper_tables.json``."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PaperFigure:
    """What the paper reports for one model on one benchmark.

    Attributes:
        model, benchmark: as the paper calls them.
        task, metric: of lmms-eval, and the name of the figure in its results.
        times: what that figure is multiplied with to be in the paper's unit.
        unit: of ``baseline`` and ``cal``.
        baseline, cal: without CAL and with it; single runs.
        unknown: what the paper leaves open about it; "" if nothing.
    """

    model: str
    benchmark: str
    task: str
    metric: str
    times: float
    unit: str
    baseline: float
    cal: float
    unknown: str = ""


@functools.cache
def paper_figures() -> tuple[PaperFigure, ...]:
    """All of them, one a model and task."""
    told: dict[str, Any] = json.loads(Path(__file__).with_name("paper_tables.json").read_text("utf8"))
    return tuple(
        PaperFigure(
            model, name, task, one["metric"], one["times"], one["unit"], *figures[name], unknown=one.get("unknown", "")
        )
        for model, figures in told["models"].items()
        for name, one in told["benchmarks"].items()
        if name in figures
        for task in one["tasks"]
    )


def figures_for(task: str) -> list[PaperFigure]:
    """Those of one of lmms-eval's tasks, one a model; none where the paper has no such benchmark."""
    return [figure for figure in paper_figures() if figure.task == task]
