"""What the demo says of its own token table: where CAL has weighted nothing it says so, and how to see it do something."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from seecal.demo.report import ENOUGH, nothing_seen
from seecal.demo.state import DemoOptions

FLAT = [("The", -1.9, 1.0), (" building", 1.0, 1.0)]


def results(tokens, steps, **options):
    return SimpleNamespace(tokens=tokens, steps=steps, options=DemoOptions(out=Path("here"), **options))


def test_few_steps_without_a_weight_are_said_to_be_few():
    (line,) = nothing_seen(results(FLAT, 38, minutes=2.0, seed=3))
    assert "all weights are 1" in line
    assert "38 steps are few" in line
    assert line.endswith(f"seecal demo --out here-longer --steps {ENOUGH} --seed 3")


@pytest.mark.parametrize("steps", [ENOUGH, 600])
def test_enough_steps_are_not_called_few(steps):
    (line,) = nothing_seen(results(FLAT, steps))
    assert line.endswith("as in plain training.")


@pytest.mark.parametrize("weight", [1.1, 2.3, 5.0])
def test_a_table_with_a_weight_speaks_for_itself(weight):
    assert nothing_seen(results([*FLAT, (" face", 7.5, weight)], 38)) == []
