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
# Where two ways to train are compared: two splits, three questions about each drawing. What is compared is the measuring
COMPARED_QUESTIONS, COMPARED_SHARE = 2 * 3, 0.3


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


def plan(seconds: float, a_step: float, a_question: float, held_out: int | None = None, trainings: int = 0) -> Plan:
    """The plan that fits ``seconds``, where a step and a held-out question take so many seconds each.

    Args:
        trainings: 0: the demo. Else how often stage 2 is made from one stage 1, to be compared; the plan is of one of them.
    """
    questions, share = QUESTIONS_A_DRAWING, MEASURING_SHARE
    if trainings:
        questions, share = COMPARED_QUESTIONS * (1 + trainings), COMPARED_SHARE
    if held_out is None:
        fits = int(share * seconds / (questions * a_question))
        held_out = min(max(fits, LEAST_HELD_OUT), MOST_HELD_OUT)
    left = seconds - held_out * questions * a_question
    all_of_one = a_step * (_ALIGN_SHARE + max(trainings, 1) * (1 - _ALIGN_SHARE))
    steps = min(max(int(left / all_of_one), LEAST_STEPS), MOST_STEPS)
    rate = f"{1 / a_step:.2g}"
    limit = {MOST_STEPS: ", the most it ever takes", LEAST_STEPS: ", the least that shows anything"}.get(steps, "")
    each = f" in each of {trainings} trainings" if trainings else ""
    why = f"This machine does {rate} steps/s: {steps} steps{each}{limit}, {held_out} drawings in each measurement"
    return of_steps(steps, held_out, why)


def of_steps(steps: int, held_out: int | None = None, why: str | None = None) -> Plan:
    """The plan for so many steps in all, whatever the machine: a part of them for stage 1, at least one each."""
    align = max(1, round(steps * _ALIGN_SHARE))
    said = why or f"--steps {steps}: {align} for stage 1, {steps - align} for stage 2"
    return Plan(align, steps - align, held_out or MOST_HELD_OUT, said)
