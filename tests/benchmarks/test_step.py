"""The step on a CPU: SmolLM2's shape, the spread of ratios, and the CSV that docs/performance.md reads."""

import csv
import dataclasses
import sys

import pytest
import torch

from seecal.cli import bench

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(bench.FOLDER))


def small(**changes):
    """SmolLM2's nine heads over three, its tied head and its kind of batch, in little."""
    import shapes

    numbers = {"layers": 2, "hidden": 54, "inter": 96, "vocab": 2000, "text": (20, 60), "vision": shapes.CLIP_TINY}
    return dataclasses.replace(shapes.CPU_SHAPES["135m"], **{**numbers, **changes})


@pytest.mark.parametrize(("name", "parameters"), [("135m", 134_515_008), ("135m-next", 134_515_008)])
def test_the_decoder_is_smollm2s(name, parameters):
    """As many as its card on the hub counts, the head being the embedding."""
    import shapes

    model = shapes.build(shapes.CPU_SHAPES[name], torch.device("meta"), torch.float32)
    assert sum(one.numel() for one in model.model.language_model.parameters()) == parameters
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_small_decoder_under_a_large_vocabulary_has_60_million():
    import shapes

    model = shapes.build(shapes.CPU_SHAPES["60m-152k"], torch.device("meta"), torch.float32)
    parts = [sum(one.numel() for one in part.parameters()) for part in (model.model.language_model, model.lm_head)]
    assert round(parts[0] / 1e6) == 60
    assert parts[1] == 151_936 * 256


def test_a_shape_for_cpus_leaves_its_ratios_and_their_spread(monkeypatch, tmp_path):
    import shapes
    import step

    monkeypatch.setitem(shapes.SHAPES, "135m", small())
    monkeypatch.setattr(sys, "argv", ["step.py", "--shape", "135m", "--rounds", "3", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        step.main()
    assert not left.value.code
    with (tmp_path / "step-135m-cpu.csv").open(encoding="utf-8") as file:
        found = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(found) == ["hf", "trl", "released", "mle", "cal"]
    for name, row in found.items():
        low, middle, high = (float(row[f"of_hf_{spot}"]) for spot in ("p20", "p50", "p80"))
        assert 0 < low <= middle <= high, name
        assert row["rounds"] == "3"
        assert row["device"].startswith("cpu (")
    assert float(found["hf"]["of_hf_p20"]) == float(found["hf"]["of_hf_p80"]) == 1
    peak = {name: float(row["peak_mib"]) for name, row in found.items()}
    assert peak["cal"] < peak["hf"] < peak["released"]
    assert int(found["cal"]["contrast_tokens"]) < int(found["released"]["contrast_tokens"])


def test_the_peak_of_the_first_round_is_that_of_any_round():
    """It is watched where nothing is timed; a later step asks for as much."""
    import common
    import shapes
    import step
    import variants

    model, batch = shapes.build(small(), CPU, torch.float32), shapes.batch_of(small(), CPU, torch.float32)
    made = {name: variants.make(name, model, batch) for name in ("hf", "released", "mle", "cal")}

    def run(variant):
        model.zero_grad(set_to_none=True)
        variant.loss().backward()

    steps = {name: lambda variant=variant: run(variant) for name, variant in made.items()}
    able, peaks, notes = step._first_round(steps, model, CPU)
    assert (list(able), notes) == (list(steps), {})
    for name, one in able.items():
        assert peaks[name] == pytest.approx(common.peak_mib(one), rel=0.02)


def test_one_that_cannot_run_is_out_of_the_first_round():
    import step

    def broken():
        raise RuntimeError("no kernel")

    able, peaks, notes = step._first_round({"a": lambda: torch.ones(2**18), "b": broken}, torch.nn.Identity(), CPU)
    assert list(able) == list(peaks) == ["a"]
    assert peaks["a"] == pytest.approx(1)
    assert notes == {"b": "failed: RuntimeError: no kernel"}


@pytest.mark.parametrize(
    ("slow", "expected"),
    [([1, 1, 1], 2.0), ([1, 5, 1], 2.0), ([3, 1, 9], 2.0)],
    ids=["even", "one slow round", "drift"],
)
def test_what_slows_a_whole_round_falls_out_of_its_ratio(slow, expected):
    import common

    found = common.spread([2.0 * one for one in slow], [1.0 * one for one in slow])
    assert found == {"p20": expected, "p50": expected, "p80": expected}


def test_the_spread_is_of_single_rounds():
    import common

    found = common.spread([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert found["p50"] == 2
    assert found["p20"] == pytest.approx(1.4)
    assert found["p80"] == pytest.approx(3.2)
