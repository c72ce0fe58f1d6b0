"""What CAL keeps on a model: one small object at one attribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import CALOptions

_ATTRIBUTE = "_seecal"


@dataclass
class CALState:
    """What CAL knows of one model.

    Attributes:
        options: while CAL is on; None while it is off.
        patched: our forward stands on the instance, even if a wrapper put on later hides it.
        previous_forward: what stood on the instance before our forward; None: nothing, the class's own.
        by_trainer: a trainer enabled CAL, not the caller: the next stage's trainer may change the options.
        counts_top1: training forwards say at which label tokens the label is the likeliest token.
        step: the number of the optimizer step, as a trainer says it; None: nobody does.
        forwards: training forwards so far, for when nobody says the step.
        tested: an undeclared family has passed its self-test.
        takes_no_count: ``accepts_loss_kwargs`` on the instance is ours; trainers read it.
        inside: our forward is running.
        told: what training forwards do without CAL has been said: "no labels", "gone past".
    """

    options: CALOptions | None = None
    patched: bool = False
    previous_forward: Any = None
    by_trainer: bool = False
    counts_top1: bool = False
    step: int | None = None
    forwards: int = 0
    tested: bool = False
    takes_no_count: bool = False
    inside: bool = False
    told: frozenset[str] = frozenset()

    def forget_steps(self) -> None:
        """Steps are counted from here on, and by the model itself until a trainer says them."""
        self.step, self.forwards = None, 0

    def next_step(self) -> int:
        """The optimizer step that this training forward belongs to; counts the forward."""
        count, self.forwards = self.forwards, self.forwards + 1
        return count if self.step is None else self.step


def state_of(model: Any) -> CALState:
    """The model's state; a fresh one, not put on it, where it has none. Changes of that one are lost: see :func:`keep`."""
    state = model.__dict__.get(_ATTRIBUTE)
    return CALState() if state is None else state


def keep(model: Any, state: CALState | None) -> None:
    """Puts the state on the model; None takes it off."""
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state
