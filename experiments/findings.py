"""What the rows of a design say: chosen learning rates, paired differences, and which cells count."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seecal.evaluation.over_seeds import Paired, pooled

from .designs import DEMO, Design
from .holm import holm
from .items import unpacked

Row = dict[str, Any]
MEASURES = {
    "exact": "exact match, points",
    "nll_visual": "NLL of visual tokens",
    "nll_fitted": "the same, temperature fitted",
    "nll_filler": "NLL of filler",
}
POINTS = 100.0  # an exact match of 1 is 100 points


def cell_name(cell: Mapping[str, Any]) -> str:
    """In words: what it says beside the defaults, the model first."""
    words = {"side": " px", "size": ""}
    return " ".join(f"{value}{words.get(name, '')}" for name, value in cell.items())


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(dict(cell), sort_keys=True)


@dataclass(frozen=True)
class Alignment:
    """How well the models of a cell see, as means over its seeds.

    Attributes:
        seeds: those that have a plain stage 2 without swapped answers.
        commonest, accuracy, tuned: test accuracy of who says the commonest answer, after stage 1, after clean stage 2.
        visual, filler: mean Δ after stage 1, logits.
        alpha, beta, inside: calibrated, and the share of tokens inside the paper's [1, 5].
    """

    cell: Mapping[str, Any]
    seeds: int
    commonest: float
    accuracy: float
    tuned: float
    visual: float
    filler: float
    alpha: float
    beta: float
    inside: float

    @property
    def counts(self) -> bool:
        """Clean accuracy at least halfway from the commonest answer's share to 1; Δ of visual tokens at least 1 and above
        that of filler."""
        halfway = self.commonest + (1 - self.commonest) / 2
        return self.tuned >= halfway and self.visual >= 1 and self.visual > self.filler


def alignments(rows: Iterable[Row]) -> dict[str, Alignment]:
    """Of every cell of the nano models that has a plain run on clean answers, by its key."""
    cells: dict[str, dict[int, Row]] = {}
    for row in rows:
        cold = row.get("facts", {}).get("cold", False)
        plain = row["options"] == {"weighting": "uniform"} and "calibration" in row.get("facts", {})
        if row["noise"] == 0 and plain and not cold:
            seeds = cells.setdefault(_key(row["cell"]), {})
            if row["seed"] not in seeds or _accuracy(row, "validation") > _accuracy(seeds[row["seed"]], "validation"):
                seeds[row["seed"]] = row
    return {key: _alignment(list(seeds.values())) for key, seeds in cells.items()}


def _accuracy(row: Row, split: str) -> float:
    return float(unpacked(row[split]["exact"]).mean())


def _alignment(rows: Sequence[Row]) -> Alignment:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    facts = [row["facts"] for row in rows]
    paper = [one["calibration"]["paper"] for one in facts]
    return Alignment(
        cell=rows[0]["cell"],
        seeds=len(rows),
        commonest=mean(one["commonest"] for one in facts),
        accuracy=mean(one["accuracy"] for one in facts),
        tuned=mean(_accuracy(row, "test") for row in rows),
        visual=mean(one["delta"]["visual"] for one in facts),
        filler=mean(one["delta"]["filler"] for one in facts),
        alpha=mean(one["calibration"]["alpha"] for one in facts),
        beta=mean(one["calibration"]["beta"] for one in facts),
        inside=mean(1 - one["at_alpha"] - one["at_beta"] for one in paper),
    )


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline at a share of swapped answers, over one cell or all that count.

    Attributes:
        cells: their keys; more than one: pooled.
        measures: of MEASURES, those that were measured, each with its paired difference.
        corrected: p of the primary measure after Holm's correction over the experiment; nan before :func:`compared`.
    """

    arm: str
    baseline: str
    noise: float
    cells: tuple[str, ...]
    measures: Mapping[str, Paired]
    split: str = "test"
    corrected: float = math.nan
    is_pooled: bool = False

    @property
    def primary(self) -> Paired:
        return self.measures["exact"]

    @property
    def verdict(self) -> str:
        return self.primary.verdict(self.corrected)


@dataclass
class Findings:
    """A design with its rows.

    Args:
        rows: of all experiments, by key; those of other designs are not looked at, but for the alignment of cells.
    """

    design: Design
    rows: Mapping[str, Row]
    aligned: Mapping[str, Alignment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = [(run, self.rows[run.key()]) for run in self.design.runs if run.key() in self.rows]
        self.whole = len(self.found) == len(self.design.runs)
        self.split = self.design.told.get("judged_on", "test")

    def counts(self, cell: str) -> bool:
        """Whether a cell counts; a model with real weights does, and a nano model that is not known to see does not."""
        return json.loads(cell) == {"model": DEMO} or (cell in self.aligned and self.aligned[cell].counts)

    def runs(self, cell: str, noise: float, arm: str) -> dict[float, dict[int, Row]]:
        """Rows by learning rate and seed."""
        rates: dict[float, dict[int, Row]] = {}
        for run, row in self.found:
            if (_key(run.cell), run.noise, run.name) == (cell, noise, arm):
                rates.setdefault(run.learning_rate, {})[run.seed] = row
        return rates

    def rate(self, cell: str, noise: float, arm: str, among: Iterable[float] | None = None) -> float | None:
        """The learning rate with the highest mean exact match on validation, over the seeds that all rates have."""
        rates = self.runs(cell, noise, arm)
        if among is not None:
            rates = {rate: seeds for rate, seeds in rates.items() if rate in among}
        if len(rates) < 2:
            return next(iter(rates), None)
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        if not common:  # not all of them have been run: the one that most seeds have
            return max(rates, key=lambda rate: len(rates[rate]))
        return max(rates, key=lambda rate: np.mean([_accuracy(rates[rate][seed], "validation") for seed in common]))

    def chosen(self, cell: str, noise: float, arm: str, among: Iterable[float] | None = None) -> dict[int, Row]:
        """Rows by seed, at the rate chosen among all of the arm's, or some."""
        rate = self.rate(cell, noise, arm, among)
        return {} if rate is None else self.runs(cell, noise, arm)[rate]

    def differences(
        self, arm: str, baseline: str, cell: str, noise: float, split: str, at: float | None = None
    ) -> dict[str, list[np.ndarray]]:
        """measure -> one array [items] a seed that both arms have. Both choose among the learning rates that both were run
        with, an arm that was tuned against one that was not would be no comparison; or both have the rate ``at``."""
        both = set(self.runs(cell, noise, arm)) & set(self.runs(cell, noise, baseline))
        both = both if at is None else both & {at}
        ours, theirs = (self.chosen(cell, noise, name, both) for name in (arm, baseline))
        found: dict[str, list[np.ndarray]] = {}
        for seed in sorted(set(ours) & set(theirs)):
            one, other = ours[seed], theirs[seed]
            if one.get("items") != other.get("items"):
                raise ValueError(f"rows {one['key']} and {other['key']} were tested on other items: they are no pair")
            for measure in MEASURES:
                if measure in one[split] and measure in other[split]:
                    difference = unpacked(one[split][measure]) - unpacked(other[split][measure])
                    found.setdefault(measure, []).append(difference * (POINTS if measure == "exact" else 1))
        return found

    def compared(self) -> list[Comparison]:
        """Every comparison, with p after Holm's correction: pooled ones among themselves, single cells among themselves."""
        single, together = [], []
        for arm, baseline in self.design.compare:
            for noise in sorted({run.noise for run in self.design.runs}):
                of_cells = {}
                for cell in map(_key, self.design.cells):
                    found = self.differences(arm, baseline, cell, noise, self.split)
                    if "exact" in found:
                        of_cells[cell] = found
                        single.append(self._comparison(arm, baseline, noise, {cell: found}))
                counted = {cell: found for cell, found in of_cells.items() if self.counts(cell)}
                if len(counted) > 1:
                    together.append(
                        dataclasses.replace(self._comparison(arm, baseline, noise, counted), is_pooled=True)
                    )
        return [*_corrected(together), *_corrected(single)]

    def _comparison(self, arm: str, baseline: str, noise: float, found: Mapping[str, Any]) -> Comparison:
        measures = {
            measure: pooled([of_cell[measure] for of_cell in found.values()])
            for measure in MEASURES
            if all(measure in of_cell for of_cell in found.values())
        }
        return Comparison(arm, baseline, noise, tuple(found), measures, self.split)


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    corrected = holm([one.primary.p for one in found])
    return [dataclasses.replace(one, corrected=p) for one, p in zip(found, corrected, strict=True)]
