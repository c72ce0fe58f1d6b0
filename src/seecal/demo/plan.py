"""How much ``seecal demo`` does on this machine: a few steps are timed, the rest is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_STEPS, MOST_STEPS = 10, 600
LEAST_HELD_OUT, MOST_HELD_OUT = 10, 150
# Of the time: the table is read with an error of a few percent, so it may cost less than the training
MEASURING_SHARE = 0.2
# As shipped, after stage 1, after stage 2; two splits, two questions about each drawing
QUESTIONS_A_DRAWING = 3 * 2 * 2
_ALIGN_SHARE = 1 / 11


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of both stages, drawings at most in each held-out split, and one line that says why."""

    align_steps: int
    tune_steps: int
    held_out: int
    why: str

    @property
    def steps(self) -> int:
        return self.align_steps + self.tune_steps


def budget(minutes: float, preparing: float, trial: float) -> float:
    """Seconds for training and measuring.

    Args:
        minutes: what was asked for.
        preparing: seconds that images, weights and imports took. A machine on which that lasts will also save, load and
            answer slowly afterwards: about a quarter of it again. All together should stay below one and a half times
            ``minutes``.
        trial: seconds that the trial steps took.
    """
    asked = 60 * minutes
    return max(min(asked, 1.5 * asked - 1.25 * preparing) - trial, 0.25 * asked)


def plan(seconds: float, a_step: float, a_question: float, held_out: int | None = None) -> Plan:
    """The plan that fits ``seconds``, where a step and a held-out question take so many seconds each."""
    if held_out is None:
        fits = int(MEASURING_SHARE * seconds / (QUESTIONS_A_DRAWING * a_question))
        held_out = min(max(fits, LEAST_HELD_OUT), MOST_HELD_OUT)
    left = seconds - held_out * QUESTIONS_A_DRAWING * a_question
    steps = min(max(int(left / a_step), LEAST_STEPS), MOST_STEPS)
    rate = f"{1 / a_step:.2g}"
    limit = {MOST_STEPS: ", the most it ever takes", LEAST_STEPS: ", the least that shows anything"}.get(steps, "")
    why = f"This machine does {rate} steps/s: {steps} steps{limit}, {held_out} drawings in each measurement"
    return of_steps(steps, held_out, why)


def of_steps(steps: int, held_out: int | None = None, why: str | None = None) -> Plan:
    """The plan for so many steps in all, whatever the machine: a part of them for stage 1, at least one each."""
    align = max(1, round(steps * _ALIGN_SHARE))
    said = why or f"--steps {steps}: {align} for stage 1, {steps - align} for stage 2"
    return Plan(align, steps - align, held_out or MOST_HELD_OUT, said)
