"""Every design runs: an arm of each by the sizes of a GPU in two steps, and every arm where there is time."""

import dataclasses
import json

import numpy as np
import pytest
from experiments.designs import DEMO, design, names
from experiments.findings import Findings, alignments
from experiments.items import unpacked
from experiments.nano import models
from experiments.rows import Rows

from experiments import trials

for package in ("easy_vqa", "vega_datasets", "font_lato"):
    pytest.importorskip(package, reason="pip install 'seecal[experiments]'")

TINY = {"s": (32, 48, 2, 1), "m": (48, 64, 2, 2)}
# One arm of each, the one that does most of what no other does
ARMS = {
    "types_and_tasks": "oracle", "noise": "calibrated", "stages": "both", "clamp": "[0, 5]", "contrasts": "swap",
    "window": "window 1", "relatives": "vig", "delta_over_training": "cold, [1, 5]", "stored_weights": "of the start",
    "beyond": "larger reference", "more_cells": "calibrated", "scenes": "shuffled",
    "scenes_rates": "uniform", "controls": "oracle",
}  # fmt: skip
NANO = [name for name in names() if design(name).cells != [{"model": DEMO}]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(models, "SIZES", TINY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Alignments of all tests."""
    return tmp_path_factory.mktemp("alignments")


def run_of(name, arm, noise=None):
    return next(run for run in design(name).runs if run.name == arm and noise in (None, run.noise))


def row_of(run, cache):
    row = trials.trial(run, cache, "gpu", 2)
    assert json.loads(json.dumps(row)) == row
    count = {unpacked(values).shape for values in row["test"].values()}
    assert len(count) == 1
    assert set(row["test"]) == {"exact", "nll_visual", "nll_filler", "nll_fitted"}
    assert np.isfinite(unpacked(row["test"]["nll_visual"])).all()
    return row


def test_all_have_an_arm():
    assert set(ARMS) == set(NANO)


@pytest.mark.parametrize("name", NANO)
def test_each_design_runs_by_the_sizes_of_a_gpu(name, cache, tmp_path):
    run = run_of(name, ARMS[name])
    row = row_of(run, cache)
    assert row["key"] == run.key("gpu", 2)
    rows = Rows(name, tmp_path)
    rows.add(row)
    kept = Rows(name, tmp_path).all[0]
    found = Findings(design(name), {run.key(): kept}, alignments([kept]))
    assert len(found.found) == 1
    if name == "types_and_tasks":
        assert row["options"] == {
            "alpha": row["facts"]["calibration"]["alpha"],
            "beta": row["facts"]["calibration"]["beta"],
        }
    if name == "relatives":
        assert isinstance(row["options"]["threshold"], float)
    if name == "delta_over_training":
        assert row["facts"]["cold"]
        assert [point["step"] for point in row["trace"]] == [0, 1, 2]
        for point in row["trace"]:
            assert sorted(point["visual_quartiles"]) == point["visual_quartiles"] != []
            assert min(point["visual_quartiles"]) - 1 < point["visual"] < max(point["visual_quartiles"]) + 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name in NANO for arm in design(name).arms])
def test_each_arm_runs(name, arm, cache):
    row_of(run_of(name, arm), cache)


def test_arms_share_the_alignment_and_the_answers_and_not_the_weights(cache):
    uniform, calibrated = (trials.Trial(run_of("clamp", arm), cache, "gpu", 2) for arm in ("uniform", "[0, 5]"))
    assert uniform.aligned.folder == calibrated.aligned.folder
    answers = [[one["messages"][1]["content"] for one in of.records] for of in (uniform, calibrated)]
    assert answers[0] == answers[1]
    changed = sum(a != one["messages"][1]["content"] for a, one in zip(answers[0], uniform.aligned.train, strict=True))
    assert changed == round(0.2 * len(answers[0]))
    for one, other in zip(uniform.aligned.test, calibrated.aligned.test, strict=True):
        assert one["messages"] == other["messages"]
    stage_1 = trials.Trial(run_of("stages", "stage 1"), cache, "gpu", 2)
    assert stage_1.aligned.folder != uniform.aligned.folder


def test_the_oracle_knows_the_words_of_the_image(cache):
    trial = trials.Trial(run_of("types_and_tasks", "oracle"), cache, "gpu", 2)
    trial.records = trial.records[:8]
    for record in trial.weighted({"alpha": 0.25, "beta": 3.0}):
        text = record["messages"][1]["content"]
        words = [trial.aligned.processor.tokenizer.decode([token]) for token in record["weight_ids"]]
        high = [word for word, weight in zip(words, record["weights"], strict=True) if weight == 3.0]
        low = {weight for weight in record["weights"] if weight != 3.0}
        told = [] if record.get("swapped") else " ".join(text[a:b] for a, b in record["visual"]).split()
        assert high == told
        assert low == {0.25}


def test_stored_weights_are_those_of_the_model(cache):
    """Two steps of training by the weights of the start are two steps of measuring them, to the first one."""
    run = run_of("stored_weights", "of the start")
    stored = trials.Trial(run, cache, "gpu", 2)
    every = trials.Trial(dataclasses.replace(run, arm=dataclasses.replace(run.arm, weights=None)), cache, "gpu", 2)
    options = {"alpha": 0.0, "beta": 5.0}
    logs = []
    for trial in (stored, every):
        model = trial.aligned.model
        trainer = trial.train(model, trial.weighted(options), options, ())
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0][0] == pytest.approx(logs[1][0], abs=2e-3)
