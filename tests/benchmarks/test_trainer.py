"""Whole trainings: the same labels in every arm, what is counted, and when an arm is not comparable."""

import argparse
import sys

import pytest

from seecal.cli import bench
from tests.benchmarks.test_benchmarks import rows, seecal_bench


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(bench.FOLDER))


@pytest.fixture
def trained(tmp_path):
    """What a training of this arm reports, in this process."""
    import trainer

    size = trainer.SIZES["tiny"]
    scored = trainer.prepare(tmp_path, size, 12)
    assert scored > 0
    return lambda arm: trainer.train(arm, tmp_path, size, workers=0)


def test_every_arm_learns_the_same_labels(trained):
    import trainer

    found = {arm: trained(arm) for arm in trainer.ARMS}
    assert len({one["label_tokens"] for one in found.values()}) == 1
    assert found["sft"]["label_tokens"] > 12 * 4
    for one in found.values():
        assert one["samples_per_s"] > 0
        assert 0 < one["wait_share"] < 1
        assert one["workers_mib"] == 0
        assert one["peak_mib"] > 100


def options(**changes):
    return argparse.Namespace(**{"size": "tiny", "records": None, "workers": 1, "rounds": 3, **changes})


def made_up(monkeypatch, speeds, labels=None):
    """Trainings that report these speeds, one after the other; returns the order that they came in."""
    import trainer

    order = []

    def report(arm, folder, options):
        order.append(arm)
        speed = speeds[arm][order.count(arm) - 1]
        numbers = {"samples_per_s": speed, "wait_share": 0.25, "peak_mib": 800.4, "workers_mib": 0}
        return {**numbers, "label_tokens": (labels or {}).get(arm, 100)}

    monkeypatch.setattr(trainer, "prepare", lambda *_: 40.0)
    monkeypatch.setattr(trainer, "in_a_process", report)
    return order


def test_the_arms_take_turns_and_are_compared_round_by_round(monkeypatch):
    from common import shuffled

    import trainer

    order = made_up(monkeypatch, {"sft": [10, 5, 20], "cal": [20, 10, 40]})
    found = {row["variant"]: row for row in trainer.rows_of(["sft", "cal"], options())}
    assert order == [arm for turn in range(3) for arm in shuffled(["sft", "cal"], turn)]
    assert [found["cal"][f"of_sft_{spot}"] for spot in ("p20", "p50", "p80")] == [0.5] * 3
    assert found["cal"]["samples_per_s_p50"] == 20
    assert (found["cal"]["peak_mib_p50"], found["cal"]["wait_share_p50"]) == (800, 0.25)
    assert found["sft"]["scored_per_s"] == ""


@pytest.mark.parametrize("other", [99, 101, 0])
def test_an_arm_with_other_labels_is_not_comparable(monkeypatch, tmp_path, other):
    import trainer

    made_up(monkeypatch, {"sft": [1], "cal": [1]}, {"cal": other})
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--arms", "sft,cal", "--rounds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"'cal': {other}.*not comparable"):
        trainer.main()


def test_a_training_that_fails_says_why(monkeypatch, tmp_path):
    import trainer

    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit(f'no model for {sys.argv[-3]}')\n")
    monkeypatch.setattr(trainer, "__file__", str(script))
    with pytest.raises(RuntimeError, match="the training of cal failed:\nno model for cal"):
        trainer.in_a_process("cal", tmp_path, options())


@pytest.mark.slow
def test_the_command_runs_each_arm_in_a_process_of_its_own(tmp_path):
    done = seecal_bench("trainer", "--rounds", 1, "--records", 8, "--arms", "sft,weights", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["variant"]: row for row in rows(tmp_path / "trainer-tiny.csv")}
    assert list(found) == ["sft", "weights"]
    assert float(found["weights"]["scored_per_s"]) > 0
    assert float(found["weights"]["workers_mib_p50"]) > 0
    assert float(found["weights"]["of_sft_p50"]) > 0
