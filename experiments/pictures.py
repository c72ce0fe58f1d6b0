"""Pictures of docs/evidence.md: paired differences in exact match with their intervals. The dev extra has matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .designs import design
from .findings import Comparison, Findings, alignments, cell_name
from .trials_page import in_order

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of what draws

BLUE, GREY, ORANGE = "#0072B2", "#999999", "#D55E00"  # Okabe and Ito's, which colour-blind people can tell apart
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "seecal"}


def draw(rows: Mapping[str, Any], folder: Path) -> list[Path]:
    """``evidence-NAME.svg`` of every experiment that has comparisons; the paths.

    Args:
        rows: of all experiments, by key.
    """
    known, drawn = alignments(rows.values()), []
    for name in in_order():
        found = Findings(design(name), rows, known)
        compared = found.compared() if found.found else []
        if compared:
            with plt.rc_context(_STYLE):
                figure = _over_noise(found, compared) if _is_a_line(found, compared) else _forest(found, compared)
                drawn.append(folder / f"evidence-{name}.svg")
                figure.savefig(drawn[-1], metadata={"Date": None})
                plt.close(figure)
    return drawn


def _is_a_line(found: Findings, compared: Sequence[Comparison]) -> bool:
    """Whether there are several shares of swapped answers in one cell: a curve says more than a list."""
    return len({one.noise for one in compared}) > 2 and len(found.design.cells) == 1


def _forest(found: Findings, compared: Sequence[Comparison]) -> Any:
    """A line a comparison, the pooled ones first."""
    figure, axis = plt.subplots(figsize=(8, 1 + 0.28 * len(compared)), layout="constrained")
    for place, one in enumerate(compared):
        counts = one.is_pooled or found.counts(one.cells[0])
        colour = (ORANGE if one.is_pooled else BLUE) if counts else GREY
        _interval(axis, one, (one.primary.estimate, place), colour, horizontal=True)
    labels = [f"{_where(one)}, {100 * one.noise:.0f} %: {one.arm} − {one.baseline}" for one in compared]
    axis.set_yticks(range(len(compared)), labels)
    axis.set_ylim(len(compared) - 0.4, -0.6)  # the first one above
    axis.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    keys = ["orange: pooled"] if any(one.is_pooled for one in compared) else []
    keys += ["grey: does not count"] if not all(one.is_pooled or found.counts(one.cells[0]) for one in compared) else []
    axis.set_xlabel(
        "\n".join(["difference in exact match, points, with 95 % intervals", *filter(None, ["; ".join(keys)])])
    )
    return figure


def _where(one: Comparison) -> str:
    return f"pooled over {len(one.cells)}" if one.is_pooled else cell_name(json.loads(one.cells[0]))


def _interval(axis: Any, one: Comparison, place: tuple[float, float], colour: str, horizontal: bool) -> None:
    low, high = one.primary.low, one.primary.high
    if not np.isnan(low):
        ends = ([low, high], [place[1]] * 2) if horizontal else ([place[0]] * 2, [low, high])
        axis.plot(*ends, color=colour, linewidth=1.8, solid_capstyle="butt")
    axis.plot(*place, "o", color=colour, markersize=5)


def _over_noise(found: Findings, compared: Sequence[Comparison]) -> Any:
    """Exact match of each arm, and the differences below, over the share of swapped answers."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.5, 5.5), layout="constrained", sharex=True)
    cell = json.dumps(found.design.cells[0], sort_keys=True)
    shares = sorted({run.noise for run in found.design.runs})
    colours = dict(zip(found.design.arms, (GREY, BLUE, ORANGE, "#009E73"), strict=False))
    for arm, colour in colours.items():
        points = [(100 * share, _mean(found, cell, share, arm)) for share in shares]
        points = [point for point in points if not np.isnan(point[1])]
        above.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.8, label=arm)
    above.set_ylabel("exact match, %")
    above.legend(frameon=False)
    for one in compared:
        place = (100 * one.noise, one.primary.estimate)
        _interval(below, one, place, colours.get(one.arm, BLUE), horizontal=False)
    below.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    below.set(xlabel="swapped answers, %", ylabel="difference, points")
    return figure


def _mean(found: Findings, cell: str, noise: float, arm: str) -> float:
    from .items import unpacked

    rows = found.chosen(cell, noise, arm).values()
    return 100 * float(np.mean([unpacked(row["test"]["exact"]).mean() for row in rows])) if rows else float("nan")
