"""One run → one row: align (or load what is there), swap answers, train through CALTrainer, measure."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from transformers import TrainerCallback

import seecal
from seecal.scoring import RecordScores, read_scores

from . import nano
from .designs import CALIBRATED, DEMO, PERCENTILE, Run, is_measured
from .items import packed
from .kept import once, weight_shares
from .nano.measure import data_set, deltas, means, quartiles
from .weightings import Annealing

Record = dict[str, Any]
_BATCH, _LOOKED_AT = 64, 256  # records of a scoring forward; of those that Δ is traced on
ARRAYS = ("exact", "nll_visual", "nll_filler")


def trial(run: Run, folder: Path, scale: str = "cpu", steps: int | None = None) -> dict[str, Any]:
    """The row of a run.

    Args:
        folder: keeps alignments, for other runs and for later.
        scale: "cpu" or "gpu", of :data:`experiments.nano.PLANS`.
        steps: at most so many steps of everything, to see that it runs; such rows say nothing.

    Returns:
        What the run is (``key``, ``cell``, ``noise``, …), ``options`` and ``plan`` as they were used, ``facts`` of the
        alignment, ``validation`` and ``test`` (arrays of :mod:`experiments.items`), shares of the weights, seconds,
        versions.
    """
    begun = time.monotonic()
    found = _demo(run, folder, steps) if run.cell["model"] == DEMO else Trial(run, folder, scale, steps).row()
    told = {"experiment": run.experiment, "key": run.key(scale, steps), "cell": dict(run.cell), "noise": run.noise}
    told |= {"seed": run.seed, "arm": run.name, "learning_rate": run.learning_rate, "scale": scale}
    seconds = {**found.pop("seconds", {}), "all": round(time.monotonic() - begun, 1)}
    return {**told, **({"steps": steps} if steps else {}), **found, "seconds": seconds, **machine()}


def machine() -> dict[str, Any]:
    """What it ran on, and with which versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    return {"device": device, "threads": torch.get_num_threads(), "seecal": seecal.__version__, **versions}


def _processor() -> str:
    """The kind of CPU."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text("utf8").splitlines() if known.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Trial:
    """A run of a nano model."""

    def __init__(self, run: Run, folder: Path, scale: str, steps: int | None) -> None:
        self.run, self.folder, self.scale, self.steps = run, folder, scale, steps
        self.aligned = self.alignment(nano.Cell(**run.cell))
        self.plan = self.aligned.plan
        self.records: Sequence[Record] = nano.swapped(self.aligned.train, run.noise, run.seed)
        self.calibration: dict[str, Any] = once(self.aligned.folder / "calibration.json", self.calibrate)

    def alignment(self, cell: nano.Cell) -> nano.Aligned:
        """Of the run's seed and start."""
        arm, options = self.run.arm, {"cold": self.run.arm.start == "cold", "steps": self.steps}
        if arm.stage_1 is not None:
            options["stage_1"] = dict(arm.stage_1)
        return nano.aligned(cell, self.run.seed, self.folder, self.scale, **options)

    def calibrate(self) -> dict[str, Any]:
        """α and β for this alignment, and which shares of the validation tokens lie where by the paper's [1, 5]."""
        alpha, beta = nano.calibrated(self.aligned)
        records = self.aligned.validation[:_LOOKED_AT]
        with tempfile.TemporaryDirectory() as place:
            delta = np.concatenate([one.columns["delta"] for one in self.scored(self.aligned, records, {}, place)])
        shares = {"at_alpha": float((delta <= 1).mean()), "at_beta": float((delta >= 5).mean())}
        return {
            "alpha": round(alpha, 4),
            "beta": round(beta, 4),
            "paper": {key: round(shares[key], 4) for key in shares},
        }

    def scored(
        self, of: nano.Aligned, records: Sequence[Record], options: Mapping[str, Any], place: str, model: Any = None,
        logprobs: bool = False,
    ) -> list[RecordScores]:  # fmt: skip
        """Δ and weights of records, by ``seecal.score``."""
        settings = {"processor": of.processor, "options": seecal.CALOptions(**options), "batch_size": _BATCH}
        model = of.model if model is None else model
        seecal.score(model, data_set(records), place, logprobs=logprobs, **settings)
        return [one for one in read_scores(place) if isinstance(one, RecordScores)]

    # ---- Options ----

    def options(self) -> dict[str, Any]:
        """The arm's, with numbers for what is measured."""
        return {name: self.number(name, value) for name, value in self.run.arm.options.items()}

    def number(self, name: str, value: Any) -> Any:
        if not is_measured(value):
            return value
        if value == CALIBRATED:
            return self.calibration[name]
        with tempfile.TemporaryDirectory() as place:
            found = self.scored(self.aligned, self.records, {}, place, logprobs=True)
        gains = [float((one.columns["logprob_with"] - one.columns["logprob_without"]).mean()) for one in found]
        return round(float(np.percentile(gains, float(value.removeprefix(PERCENTILE)))), 4)

    # ---- Training ----

    def row(self) -> dict[str, Any]:
        options, model = self.options(), self.aligned.model
        begun = time.monotonic()
        records = self.weighted(options)
        weighing = time.monotonic() - begun
        begun = time.monotonic()
        trace = Trace(self, model)
        trainer = self.train(model, records, options, [Annealing(), *([trace] if self.run.arm.trace else [])])
        training = time.monotonic() - begun - trace.seconds
        begun = time.monotonic()
        measured = {
            name: nano.measure(model, self.aligned.processor, getattr(self.aligned, name))
            for name in ("validation", "test")
        }
        after = nano.fitted(measured["validation"], measured["test"])
        arrays = {name: {key: found[key] for key in ARRAYS} for name, found in measured.items()}
        arrays["test"]["nll_fitted"] = after["nll_visual"]
        seconds = {"weighing": weighing, "training": training, "measuring": time.monotonic() - begun}
        return {
            "options": options,
            "facts": {**self.aligned.facts, "calibration": self.calibration},
            "shares": weight_shares(trainer.state.log_history),
            **({"trace": trace.points} if trace.points else {}),
            "plan": dataclasses.asdict(self.plan),
            "items": items_of([one["id"] for one in self.aligned.test]),
            "temperature": round(after["temperature"], 4),
            **{name: packed(found) for name, found in arrays.items()},
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }

    def train(self, model: Any, records: Sequence[Record], options: Mapping[str, Any], callbacks: Sequence[Any]) -> Any:
        settings = {"steps": self.plan.tuning, "rate": self.run.learning_rate, "batch": self.plan.batch}
        with tempfile.TemporaryDirectory() as place:
            return nano.trained(
                model,
                self.aligned.processor,
                records,
                place,
                seed=self.run.seed,
                callbacks=callbacks,
                **settings,
                **options,
            )

    def weighted(self, options: Mapping[str, Any]) -> Sequence[Record]:
        """The records, with stored weights where the arm wants them."""
        kind = self.run.arm.weights
        if kind is None:
            return self.records
        of, model = self.aligned, None
        if kind == "larger":
            of = self.alignment(dataclasses.replace(self.aligned.cell, size="m"))
        elif kind == "tuned":
            model = self.aligned.model
            self.train(model, self.records, {"weighting": "uniform"}, ())
        with tempfile.TemporaryDirectory() as place:
            found = self.scored(of, self.records, options, place, model)
        if len(found) != len(self.records):
            raise ValueError(f"{len(found)} of {len(self.records)} records have scores: stored weights need all")
        weights = [
            oracle(record, one, options) if kind == "oracle" else [float(weight) for weight in one.columns["weight"]]
            for record, one in zip(self.records, found, strict=True)
        ]
        return [
            {**record, "weights": of_record, "weight_ids": [int(token) for token in one.columns["token_id"]]}
            for record, of_record, one in zip(self.records, weights, found, strict=True)
        ]


def oracle(record: Record, scores: RecordScores, options: Mapping[str, Any]) -> list[float]:
    """beta for tokens in words of the image, alpha for the others; a swapped answer's words are no words of the image."""
    low, high = float(options["alpha"]), float(options["beta"])
    spans = [] if record.get("swapped") else record["visual"]
    columns = zip(scores.columns["start"], scores.columns["stop"], strict=True)
    return [high if any(start < end and begin < stop for begin, end in spans) else low for start, stop in columns]


def items_of(ids: Sequence[str]) -> str:
    """What tells two sets of test items apart."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]


class Trace(TrainerCallback):
    """Mean and quartiles of Δ of visual tokens and filler on validation, before the first step and after each part."""

    def __init__(self, of: Trial, model: Any) -> None:
        self.of, self.model, self.seconds = of, model, 0.0
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        parts = self.of.run.arm.trace or 1
        if state.global_step in {round(part * state.max_steps / parts) for part in range(1, parts + 1)}:
            self.look(state.global_step)

    def look(self, step: int) -> None:
        begun = time.monotonic()
        records = self.of.aligned.validation[:_LOOKED_AT]
        found = deltas(self.model, self.of.aligned.processor, records)
        self.points.append({"step": step, **means(found), **quartiles(found)})
        self.seconds += time.monotonic() - begun


def _demo(run: Run, folder: Path, steps: int | None) -> dict[str, Any]:
    """A run of the model with real weights."""
    from . import real_weights

    found = real_weights.run(
        run.seed, run.noise, dict(run.arm.options), folder / DEMO, steps=steps, learning_rate=run.learning_rate
    )
    arrays = packed(found.pop("arrays"))
    return {**found, "options": dict(run.arm.options), "test": arrays}
