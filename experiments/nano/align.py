"""A model and the splits of its task, up to and with stage 1: what the arms of an experiment share."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .cell import Cell
from .measure import deltas, means, measure
from .models import built, parts
from .plan import Plan, plan_of
from .records import Record, told, without_image
from .tasks import SPLITS, task_of
from .tower import pretrained_tower
from .training import trained

_DELTA_RECORDS = 256


@dataclass
class Aligned:
    """A cell after stage 1.

    Attributes:
        cell, seed, plan: what it is of.
        processor: of the model.
        train, validation, test: records of stage 2, clean.
        facts: ``accuracy`` on the test set after stage 1; ``commonest``: what saying the commonest answer of each kind
            would reach; ``delta``: mean Δ of ``visual`` and ``filler`` tokens in logits; ``tower``: loss and share of
            attributes right; ``seconds`` of each part; ``parameters``; ``cold``.
    """

    cell: Cell
    seed: int
    plan: Plan
    processor: Any
    train: list[Record]
    validation: list[Record]
    test: list[Record]
    facts: dict[str, Any]
    _weights: Path
    _texts: list[str] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where it is kept; what is measured of it can be kept there too."""
        return self._weights.parent

    @property
    def model(self) -> Any:
        """The model, a fresh copy each time; its tower takes no gradients, as in stage 2."""
        model, _ = built(self.cell, self._texts, self.seed)
        safetensors.torch.load_model(model, str(self._weights))
        _trainable(model, "tower", frozen=True)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def aligned(
    cell: Cell,
    seed: int,
    folder: str | Path,
    scale: str = "cpu",
    *,
    cold: bool = False,
    steps: int | None = None,
    plan: Plan | None = None,
    stage_1: Mapping[str, Any] | None = None,
) -> Aligned:
    """Makes what is not in ``folder`` yet: the tower on attributes of pictures, the language model on texts alone, then
    both together with a quarter of the rows without their image. Parts that are whole are not made again.

    Args:
        seed: of weights, splits and order.
        folder: keeps weights and facts, a folder in it for each (cell, seed, plan).
        scale: "cpu" or "gpu": how long, see :data:`PLANS`.
        cold: stage 1 as it is for pre-trained models, the projector alone, on towers and language models that know nothing.
        steps: at most so many steps of each part, to see that it runs.
        plan: another one than the scale's.
        stage_1: fields of :class:`seecal.CALConfig` for the joint part; None: plain cross-entropy.

    Raises:
        ValueError: an unknown scale.
        ImportError: a package of the task's is missing.
    """
    plan = plan.capped(steps) if plan is not None else plan_of(cell, scale, steps)
    task = task_of(cell.task)
    splits = {name: task.records(name, getattr(plan, name), seed, cell.side, cell.answers) for name in SPLITS}
    place = Path(folder) / f"{cell}-seed{seed}{'-cold' if cold else ''}-{_name_of(asdict(plan))}"
    place.mkdir(parents=True, exist_ok=True)
    model, processor = built(cell, task.texts(), seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(cell, seed, plan, task, model, processor, splits, place, cold)
    for part in () if cold else ("tower", "language"):
        run.part(part)
    if stage_1 is not None:  # the parts before are the same ones
        run.place = place = place / f"stage-1-{_name_of(dict(stage_1))}"
        run.joint_settings = dict(stage_1)
        place.mkdir(exist_ok=True)
    run.part("joint")
    facts = run.facts()
    kept = [splits[name] for name in ("train", "validation", "test")]
    return Aligned(cell, seed, plan, processor, *kept, facts, place / "joint.safetensors", task.texts())


def commonest(records: Sequence[Record]) -> float:
    """The share right of who knows the kind of a question and says its commonest answer."""
    kinds = Counter((one["kind"], told(one)) for one in records)
    best: dict[str, int] = {}
    for (kind, _), count in kinds.items():
        best[kind] = max(best.get(kind, 0), count)
    return sum(best.values()) / len(records)


def counts(facts: dict[str, Any], accuracy: float) -> bool:
    """Whether a cell says anything about CAL: its image is used, and Δ shows where.

    Args:
        facts: of :class:`Aligned`.
        accuracy: on the test set after a stage 2 without noise.
    """
    halfway = facts["commonest"] + (1 - facts["commonest"]) / 2
    visual, filler = facts["delta"]["visual"], facts["delta"]["filler"]
    return accuracy >= halfway and visual >= 1 and visual > filler


@dataclass
class _Run:
    """The parts of one alignment."""

    cell: Cell
    seed: int
    plan: Plan
    task: Any
    model: Any
    processor: Any
    splits: dict[str, list[Record]]
    place: Path
    cold: bool
    joint_settings: dict[str, Any] = field(default_factory=lambda: {"weighting": "uniform"})

    def part(self, name: str) -> None:
        """Loads its weights, or trains and writes them."""
        weights = self.place / f"{name}.safetensors"
        if not weights.exists():
            begun = time.monotonic()
            told = getattr(self, f"_{name}")() or {}
            facts = {**told, "seconds": round(time.monotonic() - begun, 1)}
            _written(self.place / f"{name}.json", lambda path: path.write_text(json.dumps(facts), "utf8"))
            _written(weights, lambda path: safetensors.torch.save_model(self.model, str(path)))
        else:
            safetensors.torch.load_model(self.model, str(weights))

    def facts(self) -> dict[str, Any]:
        """What was reached, measured once."""
        path = self.place / "facts.json"
        if not path.exists():
            begun = time.monotonic()
            test = self.splits["test"]
            found = {
                "accuracy": round(float(measure(self.model, self.processor, test)["exact"].mean()), 4),
                "commonest": round(commonest(test), 4),
                "delta": means(deltas(self.model, self.processor, test[:_DELTA_RECORDS])),
                "parameters": sum(value.numel() for value in self.model.parameters()),
                "cold": self.cold,
            }
            known = {name: json.loads((self.place / f"{name}.json").read_text("utf8")) for name in self._parts()}
            found["seconds"] = {name: of_part.pop("seconds") for name, of_part in known.items()}
            found["seconds"]["measuring"] = round(time.monotonic() - begun, 1)
            found |= {name: of_part for name, of_part in known.items() if of_part}
            _written(path, lambda aside: aside.write_text(json.dumps(found), "utf8"))
        return json.loads(path.read_text("utf8"))

    def _parts(self) -> list[str]:
        return [name for name in ("tower", "language", "joint") if (self.place / f"{name}.json").exists()]

    def _tower(self) -> dict[str, float]:
        plan = self.plan
        pictures = {id(one["images"][0]): one for one in self.splits["align"]}
        _trainable(self.model, "language", frozen=True)
        return pretrained_tower(
            self.model, self.processor, list(pictures.values()), self.task.ATTRIBUTES,
            steps=plan.tower, rate=plan.tower_rate, batch=plan.tower_batch, seed=self.seed,
        )  # fmt: skip

    def _language(self) -> None:
        _trainable(self.model, "tower", "projector", frozen=True)
        texts = [without_image(one) for one in self.splits["align"]]
        self._trained(texts, self.plan.language, self.plan.language_rate, weighting="uniform")

    def _joint(self) -> None:
        records = self.splits["align"]
        alone = [without_image(one) for one in records[: round(self.plan.text_only * len(records))]]
        _trainable(self.model, *(("tower", "language") if self.cold else ("tower",)), frozen=True)
        self._trained([*records, *alone], self.plan.joint, self.plan.joint_rate, **self.joint_settings)

    def _trained(self, records: list[Record], steps: int, rate: float, weighting: str = "cal", **settings: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings |= {"batch": self.plan.batch, "seed": self.seed, "weighting": weighting}
            trained(self.model, self.processor, records, folder, steps=steps, rate=rate, **settings)


def _trainable(model: Any, *names: str, frozen: bool) -> None:
    """All takes gradients but the named parts."""
    for part, parameters in zip(("tower", "projector", "language"), parts(model), strict=True):
        for one in parameters:
            one.requires_grad_(not (frozen and part in names))


def _name_of(settings: dict[str, Any]) -> str:
    """Short, and another one for other settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _written(path: Path, write: Callable[[Path], Any]) -> None:
    """Aside, then renamed: what stands there is whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    write(aside)
    os.replace(aside, path)
