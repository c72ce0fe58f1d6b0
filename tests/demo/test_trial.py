"""The trial steps: they take the mean over the kinds of questions, and leave the weights and the model's state alone."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

from seecal.demo import trial
from seecal.demo.emoji import Answer
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor


@pytest.fixture
def batches(tmp_path):
    path = tmp_path / "image.png"
    tiny_image("red").save(path)
    answer = Answer("What is it?", (("a red square", True),))
    return [(5, [(path, answer)] * 2), (2, [(path, answer)]), (3, [(path, answer)])]


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ((4, 1, 2, 3), (5 * 1 + 2 * 2 + 3 * 3) / 10),  # the first, which sets things up, is run again
        ((10, 20, 30), (5 * 10 + 2 * 20 + 3 * 30) / 10),  # on a slow machine it is not
    ],
)
def test_the_mean_is_weighted_and_no_weight_changes(batches, monkeypatch, durations, expected):
    model, processor = tiny_llava(), tiny_llava_processor()
    before = copy.deepcopy(model.state_dict())
    ends = itertools.chain.from_iterable((0, duration) for duration in durations)
    clock = itertools.chain(ends, itertools.repeat(None))
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = trial.seconds_a_step(model, processor, batches, "cal", False)
    assert found == pytest.approx(expected)
    assert next(clock) is None, "another number of steps than the durations"
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(input_ids=torch.tensor([[1, 2]])).logits is not None, "CAL is off again"
