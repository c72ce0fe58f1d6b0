"""What is planned: ``NAME.yaml`` read strictly, and the runs that it asks for.

question, hypothesis, stopping    in words
endpoints: {primary, secondary}   in words
arms: NAME: {options, weights, stage_1, start, trace}
compare: [[arm, baseline], …]
runs: blocks of {cells, noise, arms, seeds, learning_rates}; every combination is a run
minutes: {alignment, run}         what one takes on one core, until rows say it
cut: [{what, why}, …]             what was left out, by name
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from seecal import CALOptions

HERE = Path(__file__).parent
DEMO = "demo"  # the model with real weights, in the place of a cell
CALIBRATED, PERCENTILE = "calibrated", "percentile "
WEIGHTS = ("oracle", "start", "tuned", "larger")
STARTS = ("aligned", "cold")
_KEYS = {"question", "hypothesis", "endpoints", "arms", "compare", "runs", "minutes", "stopping", "cut"}
_NOTES = {"learning_rate", "calibrated", "percentile 30", "model", "judged_on"}
_BLOCK = {"cells", "noise", "arms", "seeds", "learning_rates"}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        options: of :class:`seecal.CALOptions`, in stage 2; alpha and beta may be "calibrated", threshold "percentile P":
            measured on the aligned model.
        weights: None: measured in every step; else stored ones: "oracle" (beta for the words of the image, alpha for the
            rest), or of a model: the "start", one "tuned" plainly on the same data, a "larger" one's start.
        stage_1: options of the joint part of the alignment; None: plain.
        start: "aligned", or "cold": nothing was trained before.
        trace: Δ is measured on validation before the first step and after each of this many parts of the training.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    stage_1: Mapping[str, Any] | None = None
    start: str = "aligned"
    trace: int | None = None

    def told(self) -> dict[str, Any]:
        """What differs from the defaults, as the rows have it."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        default = Arm()
        return {name: value for name, value in values.items() if value != getattr(default, name) or name == "options"}


@dataclass(frozen=True)
class Run:
    """One training. ``cell`` is what ``nano.Cell`` takes; ``{"model": "demo"}``: the model with real weights."""

    experiment: str
    name: str
    arm: Arm
    cell: Mapping[str, Any]
    noise: float
    seed: int
    learning_rate: float

    @property
    def aligned(self) -> str:
        """What it shares its alignment with."""
        return json.dumps([dict(self.cell), self.seed, self.arm.start, self.arm.stage_1 and dict(self.arm.stage_1)])

    def key(self, scale: str = "cpu", steps: int | None = None) -> str:
        """The same for runs of any experiment that are the same training: one of them is made."""
        told = [
            dict(sorted(self.cell.items())),
            self.noise,
            self.seed,
            self.learning_rate,
            self.arm.told(),
            scale,
            steps,
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Design:
    """A YAML file, checked."""

    name: str
    told: Mapping[str, Any]
    arms: Mapping[str, Arm]
    compare: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    minutes: Mapping[str, float]
    cut: tuple[Mapping[str, str], ...]

    @property
    def cells(self) -> list[dict[str, Any]]:
        found = {json.dumps(dict(run.cell), sort_keys=True): dict(run.cell) for run in self.runs}
        return list(found.values())


def names(folder: Path = HERE) -> list[str]:
    """The experiments that train, in the order of the alphabet."""
    found = {path.stem: yaml.safe_load(path.read_text("utf8")) for path in sorted(folder.glob("*.yaml"))}
    return [name for name, told in found.items() if "runs" in told]


def design(name: str, folder: Path = HERE) -> Design:
    """The experiment's design.

    Raises:
        ValueError: there is none of that name; a key that is missing or unknown, an arm, option or cell that there is not,
            a comparison of arms that share no run; names the file and the key.
    """
    path = folder / f"{name}.yaml"
    told = yaml.safe_load(path.read_text("utf8")) if path.exists() else {}
    if "runs" not in told:
        raise ValueError(f"there is no experiment {name!r} that trains; there are {', '.join(names(folder))}")
    _keys(path.name, told, _KEYS, _NOTES)
    _keys(f"{path.name}: endpoints", told["endpoints"], {"primary", "secondary"})
    _keys(f"{path.name}: minutes", told["minutes"], {"alignment", "run"})
    arms = {str(arm): _arm(f"{path.name}: arms: {arm}", given) for arm, given in told["arms"].items()}
    runs: list[Run] = []
    for number, block in enumerate(told["runs"], 1):
        place = f"{path.name}: runs, block {number}"
        _keys(place, block, _BLOCK)
        if unknown := [arm for arm in block["arms"] if arm not in arms]:
            raise ValueError(f"{place}: there is no arm {', '.join(map(repr, unknown))}; there are {', '.join(arms)}")
        runs += _runs(name, place, block, arms)
    if len({run.key() for run in runs}) < len(runs):
        raise ValueError(f"{path.name}: a run is asked for twice: take it out of one block")
    for one in told["cut"]:
        _keys(f"{path.name}: cut", one, {"what", "why"})
    compare = tuple((str(arm), str(baseline)) for arm, baseline in told["compare"])
    made = Design(name, told, arms, compare, tuple(runs), told["minutes"], tuple(told["cut"]))
    for pair in compare:
        if not (set.intersection(*({_place(run) for run in runs if run.name == arm} for arm in pair))):
            raise ValueError(f"{path.name}: compare: {pair[0]!r} and {pair[1]!r} share no cell, noise and seed")
    return made


def _place(run: Run) -> tuple[str, float, int]:
    return json.dumps(dict(run.cell), sort_keys=True), run.noise, run.seed


def _keys(place: str, told: Any, needed: set[str], allowed: set[str] | None = None) -> None:
    if not isinstance(told, Mapping):
        raise ValueError(f"{place}: {told!r} has no keys; it needs {', '.join(sorted(needed))}")
    if missing := needed - set(told):
        raise ValueError(f"{place}: {', '.join(sorted(missing))} missing")
    if unknown := set(told) - needed - (allowed or set()):
        raise ValueError(f"{place}: {', '.join(sorted(map(str, unknown)))}: there is no such key")


def _arm(place: str, told: Any) -> Arm:
    _keys(place, told, {"options"}, {"weights", "stage_1", "start", "trace"})
    arm = Arm(**told)
    if arm.weights not in (None, *WEIGHTS):
        raise ValueError(f"{place}: weights={arm.weights!r}: expected one of {', '.join(WEIGHTS)}")
    if arm.start not in STARTS:
        raise ValueError(f"{place}: start={arm.start!r}: expected one of {', '.join(STARTS)}")
    for options in (arm.options, arm.stage_1 or {}):
        measured = dict.fromkeys((key for key, value in options.items() if is_measured(value)), 0.0)
        try:
            CALOptions(**{**options, **measured})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
    return arm


def is_measured(value: Any) -> bool:
    """Whether an option's value is measured on the aligned model instead of given."""
    return value == CALIBRATED or (isinstance(value, str) and value.startswith(PERCENTILE))


def _runs(name: str, place: str, block: Mapping[str, Any], arms: Mapping[str, Arm]) -> Iterator[Run]:
    for cell in block["cells"]:
        if cell != {"model": DEMO}:
            from .nano import Cell

            try:
                Cell(**cell)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {cell}: {error}") from None
    grid = itertools.product(block["cells"], block["seeds"], block["noise"], block["arms"], block["learning_rates"])
    for cell, seed, noise, arm, rate in grid:
        if not 0 <= noise <= 1 or not isinstance(seed, int) or not rate > 0:
            raise ValueError(f"{place}: noise {noise}, seed {seed!r}, learning rate {rate}: out of range")
        yield Run(name, arm, arms[arm], cell, float(noise), seed, float(rate))
