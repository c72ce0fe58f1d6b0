"""The plan's arithmetic: what fits into the minutes, with the ends where nothing fits or all does."""

import pytest

from seecal.demo.plan import (
    LEAST_HELD_OUT,
    LEAST_STEPS,
    MOST_HELD_OUT,
    MOST_STEPS,
    QUESTIONS_A_DRAWING,
    budget,
    of_steps,
    plan,
)


@pytest.mark.parametrize("minutes", [2, 5, 20])
@pytest.mark.parametrize("a_step", [0.4, 2.0, 7.0])
@pytest.mark.parametrize("a_question", [0.01, 0.1, 0.3])
def test_the_plan_fits_the_time_and_uses_it(minutes, a_step, a_question):
    seconds = 60 * minutes
    found = plan(seconds, a_step, a_question)
    measuring = found.held_out * QUESTIONS_A_DRAWING * a_question
    spent = found.steps * a_step + measuring
    assert LEAST_STEPS <= found.steps <= MOST_STEPS
    assert LEAST_HELD_OUT <= found.held_out <= MOST_HELD_OUT
    if found.steps > LEAST_STEPS and found.held_out > LEAST_HELD_OUT:
        assert measuring <= 0.2 * seconds + 1e-6
        assert spent <= seconds
    if found.steps < MOST_STEPS:
        assert spent > seconds - a_step - QUESTIONS_A_DRAWING * a_question


def test_the_line_says_speed_steps_and_drawings():
    found = plan(300, 1 / 0.15, 0.25)
    assert found.held_out == 20
    assert found.steps == 36
    assert found.why == "This machine does 0.15 steps/s: 36 steps, 20 drawings in each measurement"


def test_a_slow_machine_and_a_fast_one():
    slow, fast = plan(300, 120.0, 9.0), plan(300, 0.001, 0.0001)
    assert (slow.steps, slow.held_out) == (LEAST_STEPS, LEAST_HELD_OUT)
    assert "the least that shows anything" in slow.why
    assert (fast.steps, fast.held_out) == (MOST_STEPS, MOST_HELD_OUT)
    assert "the most it ever takes" in fast.why


def test_a_fixed_number_of_drawings_is_kept_and_its_time_counted():
    found = plan(300, 1.0, 0.1, held_out=100)
    assert found.held_out == 100
    assert found.steps == 300 - 100 * QUESTIONS_A_DRAWING * 0.1


@pytest.mark.parametrize(("steps", "align"), [(2, 1), (3, 1), (11, 1), (45, 4), (165, 15)])
def test_fixed_steps_do_not_depend_on_the_machine(steps, align):
    found = of_steps(steps)
    assert (found.align_steps, found.tune_steps, found.held_out) == (align, steps - align, MOST_HELD_OUT)
    assert of_steps(steps, 3).held_out == 3


def test_what_was_spent_before_is_taken_off_where_it_was_much():
    assert budget(5, preparing=30, trial=8) == 300 - 8
    # five times slower than the machine that the defaults were chosen on: less than 8 minutes in all
    preparing, trial = 110, 45
    seconds = budget(5, preparing, trial)
    assert 200 < seconds < 300
    assert preparing + trial + seconds + 0.25 * preparing <= 1.5 * 300
    assert budget(5, preparing=1e4, trial=1e3) == 75
