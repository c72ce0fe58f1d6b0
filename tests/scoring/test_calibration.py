"""seecal.calibrate: the shares at α and β are those that were asked for; the interval is that of other samples."""

import numpy as np
import pytest
import yaml

import seecal
from seecal.scoring import calibration, read_scores
from seecal.scoring.read import RecordScores
from tests.scoring.test_score import write_llava
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records


def planted(monkeypatch, records):
    """calibrate reads these Δ, one array a record."""
    scored = [
        RecordScores("data", row, f"r{row}", {"has_contrast": np.ones(len(delta), dtype=bool), "delta": delta})
        for row, delta in enumerate(records)
    ]
    monkeypatch.setattr(calibration, "read_scores", lambda folder, columns: iter(scored))
    return np.concatenate(records)


def test_shares_are_those_asked_for(monkeypatch):
    rng = np.random.default_rng(0)
    delta = planted(monkeypatch, [rng.normal(2, 3, 50).astype(np.float32) for _ in range(100)])
    found = seecal.calibrate(scores="planted", at_alpha=0.4, at_beta=0.15)
    assert (delta <= found.alpha).mean() == pytest.approx(0.4, abs=1e-3)
    assert (delta >= found.beta).mean() == pytest.approx(0.15, abs=1e-3)
    assert found.shares == (pytest.approx((delta <= 1).mean()), pytest.approx((delta >= 5).mean()))
    assert (found.records, found.tokens, found.raised) == (100, 5000, False)


def test_the_interval_is_over_records(monkeypatch):
    """Records whose tokens are all alike say as much as one token each; as single tokens they would seem sure."""
    rng = np.random.default_rng(0)
    means = rng.normal(3, 1, 60).astype(np.float32)
    planted(monkeypatch, [np.full(100, mean) for mean in means])
    found = seecal.calibrate(scores="planted", resamples=500)
    low, high = found.alpha_interval
    assert low < np.median(means) < high
    # the median of 60 normal draws: standard error 1.25 / √60
    assert high - low == pytest.approx(2 * 1.96 * 1.25 / 60**0.5, rel=0.5)
    planted(monkeypatch, [np.full(1, mean) for mean in np.repeat(means, 100)])
    narrow = seecal.calibrate(scores="planted", resamples=500).alpha_interval
    assert narrow[1] - narrow[0] < 0.3 * (high - low)


def test_weights_are_not_negative(monkeypatch):
    planted(monkeypatch, [np.array([-3, -2, -1, 4], dtype=np.float32)] * 5)
    found = seecal.calibrate(scores="planted", at_alpha=0.5, at_beta=0.2)
    assert (found.alpha, found.beta, found.raised) == (0.0, 4.0, True)
    assert "50% lie below 0, where no weight can be" in found.yaml()
    seecal.CALOptions(alpha=found.alpha, beta=found.beta)


def test_of_a_model_and_of_its_scores(tmp_path):
    model, processor = tiny_llava().eval(), tiny_llava_processor()
    data = write_llava(tmp_path / "data", 12)
    seecal.score(model, data, tmp_path / "scores", processor=processor)
    by_scores = seecal.calibrate(scores=tmp_path / "scores")
    assert seecal.calibrate(model, data, processor=processor) == by_scores
    seen = [record.columns["has_contrast"].sum() for record in read_scores(tmp_path / "scores")]
    assert by_scores.tokens == sum(seen)
    assert by_scores.records == sum(map(bool, seen)) < 12
    lines = yaml.safe_load(by_scores.yaml())
    assert lines == {"alpha": pytest.approx(by_scores.alpha, rel=0.01), "beta": pytest.approx(by_scores.beta, rel=0.01)}


def test_what_calibrate_refuses(tmp_path):
    model, processor = tiny_llava().eval(), tiny_llava_processor()
    for shares in ({"at_alpha": 0.0}, {"at_beta": 1.0}, {"at_alpha": 0.6, "at_beta": 0.5}):
        with pytest.raises(ValueError, match="expected shares above 0 that sum to less than 1"):
            seecal.calibrate(scores=tmp_path, **shares)
    for arguments in ({}, {"model": model}, {"model": model, "data": tiny_dataset(2), "scores": tmp_path}):
        with pytest.raises(ValueError, match="either model and data, or scores="):
            seecal.calibrate(**arguments)
    text_only = [record for record in tiny_records(10) if not record["images"]]
    with pytest.raises(ValueError, match="no token has an image before it, so Δ is 0 everywhere"):
        seecal.calibrate(model, text_only, processor=processor)
