"""How far a long command is: lines in a file every half minute, bars in a terminal. The clock is the test's."""

import io
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from seecal.verbosity import SECONDS_BETWEEN_LINES, Progress
from tests.support.processes import environment, limit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def shown():
    """(progress without its thread, clock, the text so far)."""
    clock, text = Clock(), io.StringIO()
    return Progress(Console(file=text, width=40), clock=clock), clock, text


def lines(text):
    return text.getvalue().splitlines()


def test_a_line_every_half_minute_says_stage_step_time_left_and_loss(shown):
    progress, clock, text = shown
    with progress.task("stage 2 of 2 (tune)", total=50, unit="step") as task:
        for step in range(50):
            clock.now += 7.0
            task.advance(note=f"loss {step / 10:.2f}")
    first, *between, last = lines(text)
    assert first == "stage 2 of 2 (tune): 50 steps"
    assert between[0] == "stage 2 of 2 (tune): step 4 of 50, 5:22 left, loss 0.30"
    assert len(between) == 50 // 4
    assert last == "stage 2 of 2 (tune): step 50 of 50 in 5:50, loss 4.90"


def test_no_two_lines_are_more_than_thirty_seconds_apart_however_slow_a_step_is(shown):
    """The thread calls tick once a second; here the test does, while one step takes ten minutes."""
    progress, clock, text = shown
    task = progress.start("stage 1 of 1", total=3, unit="step")
    said = []
    for second in range(600):
        clock.now += 1.0
        before = len(lines(text))
        progress.tick()
        if len(lines(text)) > before:
            said.append(second)
    assert max(later - earlier for earlier, later in zip([0, *said], said, strict=False)) <= 30
    assert lines(text)[-1].startswith("stage 1 of 1: step 0 of 3")
    task.end()


def test_something_of_unknown_length_speaks_only_when_it_lasts(shown):
    progress, clock, text = shown
    with progress.task("loading m"):
        clock.now += SECONDS_BETWEEN_LINES - 1
        progress.tick()
    assert lines(text) == []
    with progress.task("loading m"):
        clock.now += 66
        progress.tick()
    assert lines(text) == ["loading m: 1:06 so far"]


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(shown):
    progress, clock, text = shown
    with progress.task("stage", total=100, unit="step", done=90) as task:
        clock.now += 30
        task.advance()
        assert lines(text)[-1] == "stage: step 91 of 100, 4:30 left"


def test_the_innermost_task_speaks_and_the_outer_one_goes_on(shown):
    progress, clock, text = shown
    outer = progress.start("train", total=2, unit="step")
    inner = progress.start("evaluate", total=4, unit="batch")
    clock.now += 30
    inner.advance()
    assert lines(text)[-1].startswith("evaluate: batch 1 of 4")
    inner.end()
    inner.end()
    clock.now += 30
    outer.advance()
    assert lines(text)[-1].startswith("train: step 1 of 2")
    assert sum("evaluate: batch 1 of 4 in" in line for line in lines(text)) == 1


def test_other_ranks_say_nothing():
    clock, text = Clock(), io.StringIO()
    with Progress(Console(file=text), shown=False, clock=clock) as progress, progress.task("a", total=1) as task:
        clock.now += 99
        task.advance()
    assert text.getvalue() == ""


def test_names_with_brackets_and_long_lines_stay_as_they_are(shown):
    progress, _, text = shown
    name = "loading [bold]" + "x" * 80
    with progress.task(name, total=1):
        pass
    assert lines(text)[0] == f"{name}: 1"


def test_a_terminal_gets_a_bar_and_no_lines():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with Progress(console) as progress, progress.task("stage 1", total=2, unit="step") as task:
        task.advance(note="loss 1.50")
        task.advance()
    assert "━" in text.getvalue()
    assert "2/2" in text.getvalue()
    assert "loss 1.50" in text.getvalue()
    assert "step 2 of 2" not in text.getvalue()


def test_the_thread_ends_with_the_command_and_writes_by_itself():
    clock, wrote = Clock(), threading.Event()

    class Noting(io.StringIO):
        def flush(self):
            if text.getvalue():
                wrote.set()

    text = Noting()
    with Progress(Console(file=text), clock=clock) as progress, progress.task("loading m"):
        clock.now += 99
        assert wrote.wait(20), "the thread said nothing"
    assert text.getvalue() == "loading m: 1:39 so far\n"


def test_nothing_heavy_is_imported():
    heavy = "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    code = f"import sys, seecal.verbosity as v; v.Progress(); {heavy}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), timeout=limit(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
