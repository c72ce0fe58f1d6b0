"""Scores that are no finite numbers are counted, left out and said: never a threshold, never in a file."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.scoring.token_rules import TokenRule
from tests.support.scored import llava_file, scored_folder

BAD = [math.nan, math.inf, -math.inf]
# Records of 4 tokens (three words, and the end): Δ, which is the gain too
DELTAS = [[4.0, 4, 4, 4], [3.0, 3, 3, 3], [2.0, 2, 2, 2], [1.0, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]]


def scores(folder, bad, where, deltas=DELTAS, what=("delta", "gain")):
    """The scores of the records; ``where``: (record, token) → ``what`` of it is ``bad``."""

    def change(record, token, values):
        if (record, token) in where:
            values["delta"] = bad if "delta" in what else values["delta"]
            values["logprob_without"] = -bad if "gain" in what else values["logprob_without"]

    data = llava_file(folder / "data", ["one two three"] * len(deltas))
    return scored_folder(
        data, folder / "scores", delta_of=lambda number, count: deltas[number], change=change, logprobs=True
    )


def strict(path):
    """The lines of a file; ValueError for what JSON does not have."""

    def refuse(name):
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("by", ["delta", "gain"])
def test_the_threshold_is_that_of_the_finite_tokens(tmp_path, bad, by):
    folder = scores(tmp_path, bad, {(1, 0), (1, 2), (3, 1)}, what=(by,))
    report = seecal.filter(folder, tmp_path / "kept.json", top=0.6, by=by)
    assert report.threshold == 2.0
    assert (report.not_finite, report.kept) == (3, 3)
    assert [line["row"] for line in strict(report.log)] == [3, 4]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("by", ["delta", "gain"])
def test_a_record_without_a_finite_score_goes(tmp_path, bad, by):
    folder = scores(tmp_path, bad, {(0, token) for token in range(4)})
    report = seecal.filter(folder, tmp_path / "kept.json", top=1.0, by=by)
    assert report.threshold == 0.5
    assert (report.kept, report.reasons, report.not_finite) == (4, {"no finite score": 1}, 4)
    assert strict(report.log) == [
        {"source": "data.json", "row": 0, "record": "r0", "why": "no finite score", "value": 4}
    ]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", [{"max_contradictory": 0.3, "below": 0.7}, {"min_delta": 0.7}])
def test_rules_for_records_count_finite_tokens(tmp_path, bad, rule):
    folder = scores(tmp_path, bad, {(0, 0), (4, 1)})
    report = seecal.filter(folder, tmp_path / "kept.json", **rule)
    assert [line["row"] for line in strict(report.log)] == [4]
    assert report.not_finite == 2


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", [{"by": "gain", "top": 1.0}, {"by": "delta", "below": 0.0}])
def test_such_a_token_gets_weight_0(tmp_path, bad, rule):
    folder = scores(tmp_path, bad, {(2, 1)})
    report = seecal.filter(folder, tmp_path / "kept.json", tokens=True, **rule)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [row["weights"] for row in kept] == [[1.0] * 4, [1.0] * 4, [1.0, 0.0, 1.0, 1.0], [1.0] * 4, [1.0] * 4]
    assert report.tokens_removed == 1


def test_a_record_without_an_image_keeps_its_tokens():
    columns = {"has_contrast": np.zeros(2, bool), "logprob_with": np.float32([-1, -np.inf])}
    columns["logprob_without"] = columns["logprob_with"]
    assert TokenRule("gain", 0.5).stays(columns).tolist() == [True, True]


@pytest.mark.parametrize("bad", BAD)
def test_calibrate_leaves_them_out_and_says_so(tmp_path, bad):
    clean = seecal.calibrate(scores=scores(tmp_path / "clean", 0.0, ()), at_alpha=0.3, at_beta=0.3)
    # one more record of which nothing is finite, and two that say nothing new
    deltas = [*DELTAS, [9.0, 9, 9, 9]]
    folder = scores(tmp_path / "odd", bad, {(5, token) for token in range(4)}, deltas)
    found = seecal.calibrate(scores=folder, at_alpha=0.3, at_beta=0.3)
    assert (found.alpha, found.beta, found.tokens, found.records) == (clean.alpha, clean.beta, 20, 5)
    assert (clean.not_finite, found.not_finite) == (0, 4)
    assert "# 4 more tokens have no finite Δ" in found.yaml()
    assert "finite" not in clean.yaml()
    assert all(math.isfinite(value) for value in (*found.alpha_interval, *found.beta_interval, *found.shares))


def test_nothing_finite_is_told(tmp_path):
    folder = scores(tmp_path, math.nan, {(record, token) for record in range(5) for token in range(4)})
    with pytest.raises(ValueError, match="none of its 20 tokens with an image has a finite Δ"):
        seecal.calibrate(scores=folder)


def test_the_command_says_how_many(tmp_path):
    folder = scores(tmp_path, math.nan, {(1, 0)})
    said = CliRunner().invoke(app, ["filter", str(folder), "--out", str(tmp_path / "kept.json"), "--top", "0.6"])
    assert said.exit_code == 0, said.output
    assert "1 label tokens have a score that is no finite number, and count nowhere" in said.output
