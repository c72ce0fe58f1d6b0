"""What engines with hooks on modules rely on: the same order on all ranks, and ZeRO-3's head in its own forward only."""

import copy

import pytest
import torch

import seecal
from seecal import CALOptions
from seecal.core import forward
from tests.support.builders import MIXED, Row, batch_of, build

TEXT = [Row([12, -6]), Row([5, -9])]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_a_rank_without_images_visits_the_modules_in_the_others_order(family, monkeypatch):
    model, tokens, pixels = build(family)
    monkeypatch.setattr(forward, "world_size", lambda: 2)
    monkeypatch.setattr(forward, "sum_over_ranks", lambda value: value)
    seecal.enable_cal(model.train(), CALOptions())
    seen = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
            module.register_full_backward_hook(lambda *_, name=name: seen.append(f"back {name}"))

    def order(rows):
        seen.clear()
        model(**batch_of(rows, tokens, pixels)).loss.backward()
        return list(dict.fromkeys(seen))

    with_image = order(MIXED[:2])
    assert any("vision_tower" in name for name in with_image)
    assert order(TEXT) == with_image


@pytest.mark.parametrize("rows", [MIXED, TEXT])
def test_a_head_that_is_whole_in_its_own_forward_only(rows):
    model, tokens, pixels = build("llava")
    batch = batch_of(rows, tokens, pixels)
    plain = seecal.enable_cal(copy.deepcopy(model).train())
    expected = plain(**batch)
    expected.loss.backward()

    head = model.lm_head
    whole = head.weight.data
    head.weight.ds_id = 0  # DeepSpeed's mark
    calls = []

    def hand_out(*_):
        calls.append(torch.is_grad_enabled())
        head.weight.data = whole

    def take_back(*_):
        head.weight.data = whole.new_empty(0)

    head.weight.data = whole.new_empty(0)
    head.register_forward_pre_hook(hand_out)
    head.register_forward_hook(take_back)
    output = seecal.enable_cal(model.train())(**batch)
    assert calls == [False, True], "once for Δ, once for the loss"
    assert "forward" not in vars(head)
    head.weight.data = whole  # as its hooks do before its backward
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.cal.visual_delta.delta, expected.cal.visual_delta.delta)
    torch.testing.assert_close(head.weight.grad, plain.lm_head.weight.grad)


def test_an_empty_head_of_nobody_is_refused():
    model, *_ = build("llava")
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"the head's weight has shape \(0,\).*Use DDP, FSDP2 or DeepSpeed"):
        seecal.enable_cal(model)
