"""The control that shuffles, and an alpha that falls."""

import types

import pytest
import torch
from experiments.weightings import Annealing, annealed, shuffled

from seecal import CALOptions, VisualDelta

OPTIONS = CALOptions(alpha=0.5, beta=4, window=1)


def delta_of(values, first=3):
    count = len(values)
    labels, position = torch.arange(first, first + count), torch.arange(1, count + 1)
    sample, seen = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
    return VisualDelta(torch.tensor(values), labels, sample, position, seen)


def test_shuffled_weights_are_the_same_ones_elsewhere():
    delta = delta_of(torch.linspace(0, 5, 40).tolist())
    weights, plain = shuffled(delta, OPTIONS), delta.delta.clamp(0.5, 4)
    assert weights.sort().values.tolist() == pytest.approx(plain.sort().values.tolist())
    assert abs(torch.corrcoef(torch.stack([weights, plain]))[0, 1]) < 0.5
    assert torch.equal(weights, shuffled(delta, OPTIONS)), "the same batch, the same order"
    other = shuffled(delta_of(torch.linspace(0, 5, 40).tolist(), first=4), OPTIONS)
    assert not torch.equal(weights, other)


def test_alpha_falls_from_the_options_to_zero():
    delta, callback = delta_of([-1.0, 0.0, 0.25, 3.0, 9.0]), Annealing()
    for step, alpha in ((0, 0.5), (5, 0.25), (10, 0.0)):
        callback.on_step_begin(None, types.SimpleNamespace(global_step=step, max_steps=10), None)
        assert annealed(delta, OPTIONS).tolist() == pytest.approx([alpha, alpha, max(alpha, 0.25), 3, 4])
    callback.on_train_end(None, None, None)
    assert annealed(delta, OPTIONS)[0] == 0.5, "the next training of the process begins anew"
