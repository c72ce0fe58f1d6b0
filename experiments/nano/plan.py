"""How long each part of a training is: what the machine at hand allows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .cell import Cell


@dataclass(frozen=True)
class Plan:
    """Steps, records and learning rates.

    Attributes:
        tower, language, joint: steps of the three parts of an alignment: the tower on attributes of images, the language
            model on texts alone, both together.
        tuning: steps of stage 2.
        tower_rate, language_rate, joint_rate, tuning_rate: learning rates at the top of their cosines.
        tower_batch, batch: rows of a step.
        align, train, validation, test: records of each split; the image of one is in no other.
        text_only: rows without their image that are added in the joint part, as a share of those with one.
    """

    tower: int = 1500
    language: int = 120
    joint: int = 350
    tuning: int = 120
    tower_rate: float = 1e-3
    language_rate: float = 1e-3
    joint_rate: float = 1e-3
    tuning_rate: float = 5e-4
    tower_batch: int = 32
    batch: int = 32
    align: int = 4000
    train: int = 5000
    validation: int = 400
    test: int = 600
    text_only: float = 0.25

    def capped(self, steps: int | None) -> Plan:
        """The same with no part longer than ``steps`` and no split larger than that needs: to see that it runs."""
        if steps is None:
            return self
        rows = max(16, 2 * steps * 8)
        least = {name: min(getattr(self, name), steps) for name in ("tower", "language", "joint", "tuning")}
        least |= {name: min(getattr(self, name), rows) for name in ("align", "train", "validation", "test")}
        return dataclasses.replace(self, **least, batch=min(self.batch, 8), tower_batch=min(self.tower_batch, 8))


PLANS = {
    "cpu": Plan(),
    "gpu": Plan(
        tower=3000,
        language=400,
        joint=2000,
        tuning=800,
        tower_batch=128,
        batch=128,
        align=20_000,
        train=20_000,
        validation=800,
        test=2000,
    ),
}
# What a task or a model needs more or less of, as factors of the steps: letters, or two things, are more to learn than one
# shape, charts are less; the tower of Qwen2-VL has four patches where the others have one, learns faster and takes longer
_MORE = {
    "reading": {"tower": 1.7, "joint": 1.15},
    "scenes": {"tower": 1.5, "joint": 1.2},
    "charts": {"tower": 0.4, "joint": 0.7},
    "qwen2_vl": {"tower": 0.5},
}


def plan_of(cell: Cell, scale: str = "cpu", steps: int | None = None) -> Plan:
    """The plan of a cell for a kind of machine; with ``steps`` no part is longer.

    Raises:
        ValueError: a scale that there is no plan for.
    """
    if scale not in PLANS:
        raise ValueError(f"scale={scale!r}: there is no plan for it. Set one of {', '.join(PLANS)}")
    plan = PLANS[scale]
    for of in (cell.task, cell.model):
        more = {name: round(getattr(plan, name) * factor) for name, factor in _MORE.get(of, {}).items()}
        plan = dataclasses.replace(plan, **more)
    return plan.capped(steps)
