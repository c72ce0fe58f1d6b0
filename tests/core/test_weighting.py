"""Δ → weights: against the loop it replaces, at the edges, and what is refused."""

import pytest
import torch

import seecal
from seecal import CALOptions, VisualDelta, token_weights


def loop(delta, runs, alpha, beta, window):
    out = []
    for j in range(len(delta)):
        near = [
            min(max(float(delta[k]), alpha), beta)
            for k in range(max(0, j - window // 2), min(len(delta), j + window // 2 + 1))
            if runs[k] == runs[j]
        ]
        out.append(sum(near) / len(near))
    return torch.tensor(out)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [7], [3, 1, 4, 2], [40, 1, 25]], ids=str)
def test_equals_the_loop(lengths, window):
    runs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    delta = torch.randn(len(runs), generator=torch.Generator().manual_seed(window)) * 5
    torch.testing.assert_close(token_weights(delta, runs, 1, 5, window), loop(delta, runs, 1, 5, window))


def test_no_label_token():
    assert token_weights(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_low_precision_deltas_give_float32_weights():
    weights = token_weights(torch.full((3,), 2.0, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 2}, "odd"),
        ({"window": 0}, "odd"),
        ({"window": -1}, "odd"),
        ({"alpha": 3.0, "beta": 1.0}, "alpha=3.0, beta=1.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"runs": torch.zeros(4, dtype=torch.long)}, r"\(3,\) and runs \(4,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    call = {"delta": torch.zeros(3), "runs": torch.zeros(3, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        token_weights(**call)


def test_runs_change_with_the_sample_and_where_the_position_skips():
    sample = torch.tensor([0, 0, 0, 1, 1, 2])
    position = torch.tensor([1, 2, 5, 6, 7, 8])
    delta = VisualDelta(torch.zeros(6), torch.zeros(6), sample, position, torch.ones(6, dtype=torch.bool))
    assert delta.runs.tolist() == [0, 0, 1, 2, 2, 3]
    assert len(delta) == 6


def test_weightings_are_a_plain_dict_of_callables():
    assert type(seecal.WEIGHTINGS) is dict
    assert {"cal", "uniform"} <= set(seecal.WEIGHTINGS)
    delta = VisualDelta(*(torch.tensor(values) for values in ([0.0, 9.0], [1, 2], [0, 0], [1, 2], [True, True])))
    assert seecal.WEIGHTINGS["uniform"](delta, CALOptions()).tolist() == [1.0, 1.0]
    assert seecal.WEIGHTINGS["cal"](delta, CALOptions()).tolist() == [3.0, 3.0]
    reading = [name for name, weighting in seecal.WEIGHTINGS.items() if weighting.needs_logprob]
    assert reading == ["vig", "prior", "dft", "dpa"]


def test_a_weighting_of_ones_own_is_one_row():
    seecal.WEIGHTINGS["only_visual"] = lambda delta, options: (delta.delta > options.alpha).float()
    try:
        delta = VisualDelta(*(torch.tensor(values) for values in ([0.0, 9.0], [1, 2], [0, 0], [1, 2], [True, True])))
        assert seecal.WEIGHTINGS["only_visual"](delta, CALOptions()).tolist() == [0.0, 1.0]
    finally:
        del seecal.WEIGHTINGS["only_visual"]


def test_defaults_are_the_papers():
    options = CALOptions()
    assert (options.weighting, options.alpha, options.beta, options.window) == ("cal", 1.0, 5.0, 3)
    assert (options.pool_scope, options.contrast, options.normalize) == ("answer", "drop", "global")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "erase"}, "contrast='erase'"),
        ({"contrast": "patch_mask", "contrast_strength": 1.5}, "at most 1"),
        ({"contrast": "blur", "contrast_strength": 0.0}, "above 0"),
        ({"contrast": "swap", "contrast_strength": 1.0}, "Leave it None"),
        ({"delta": "probability"}, "delta='probability'"),
        (
            {"delta": "logprob", "pool_scope": "released", "contrast": "mask"},
            "CAL's code compares logits and DPA's probabilities. Set delta='logit'",
        ),
        ({"pool_scope": "batch"}, "pool_scope='batch'"),
        ({"pool_scope": "released"}, "contrast='mask'"),
        ({"normalize": "token"}, "normalize='token': expected one of global, micro_batch, sample, tokens, matched"),
        ({"prior_exponent": -1.0}, "prior_exponent=-1.0: expected a power"),
        ({"prior_exponent": float("nan")}, "prior_exponent=nan"),
        ({"prior_exponent": float("inf")}, "prior_exponent=inf"),
        ({"weighting": "dpa", "delta": "logprob"}, "weighting='dpa' with delta='logprob': DPA compares probabilities"),
        ({"weighting": "dpa", "alpha": 0.7}, r"alpha=0.7, beta=0.5"),
        ({"delta": "prob"}, r"delta='prob' with alpha=1.0: no difference of probabilities is above 1.*weighting='dpa'"),
        ({"delta": "prob", "weighting": "negative", "beta": 1.0}, "every weight would be alpha"),
        ({"window": 4}, "window=4"),
        ({"alpha": 6.0}, "alpha=6.0"),
        ({"padding_free": "yes"}, "padding_free='yes'"),
        ({"contrast_strength": 0.5}, "contrast_strength=0.5"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"contrast_every": 0}, "contrast_every=0"),
        ({"contrast_every": -2}, "contrast_every=-2"),
        ({"contrast_every": True}, "contrast_every=True"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        CALOptions(**options)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        CALOptions().alpha = 2.0
