"""Which of the paper's figures belong beside a task of lmms-eval."""

from __future__ import annotations

from dataclasses import dataclass

from .paper import paper_tables


@dataclass(frozen=True)
class PaperFigure:
    """What the paper reports for one system on one benchmark.

    Attributes:
        system: as the paper calls it.
        about: the benchmark and the unit of ``baseline`` and ``cal``.
        figure: of the task's results, the one that this stands beside.
        times: what that one is multiplied with to be in the paper's unit.
        baseline, cal: without CAL and with it; single runs.
        unknown: what the paper leaves open about it; "" if nothing.
    """

    system: str
    about: str
    figure: str
    times: float
    baseline: float
    cal: float
    unknown: str = ""


def figures_for(task: str) -> list[PaperFigure]:
    """Those of one task, one a system; none where the paper has no such benchmark."""
    tables = paper_tables()
    return [
        PaperFigure(
            system,
            benchmark["about"],
            benchmark["lmms_eval"]["figure"],
            benchmark["lmms_eval"]["times"],
            figures[name]["baseline"],
            figures[name]["cal"],
            benchmark.get("unknown", ""),
        )
        for name, benchmark in tables["benchmarks"].items()
        if task in benchmark["lmms_eval"]["tasks"]
        for system, figures in tables["figures"].items()
        if name in figures
    ]
