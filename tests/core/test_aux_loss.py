"""The load-balancing loss of mixture-of-experts decoders is added as the model's own forward adds it."""

import copy

import pytest
import torch

import seecal
from seecal import CALOptions
from tests.support import zoo
from tests.support.reference import assert_same_gradients, gradients

COEFFICIENT = 0.3


@pytest.fixture
def moe():
    model = copy.deepcopy(zoo.model_of("qwen3_vl_moe", "sdpa"))
    model.config.text_config.router_aux_loss_coef = COEFFICIENT
    return model.train(), zoo.batch_of("qwen3_vl_moe", zoo.MIXED)


@pytest.mark.parametrize("padding_free", [False, "auto", True])
@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_loss_and_gradients_are_the_models_own(moe, padding_free, by_config):
    model, batch = moe
    asked = {} if by_config else {"output_router_logits": True}
    model.config.text_config.output_router_logits = by_config
    plain = copy.deepcopy(model)
    expected = plain(**batch, **asked)
    expected.loss.backward()
    seecal.enable_cal(model, CALOptions(weighting="uniform", padding_free=padding_free))
    output = model(**batch, **asked)
    output.loss.backward()
    assert float(expected.aux_loss) > 0.5, "the routers have something to balance"
    torch.testing.assert_close(output.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.cal.aux_loss, COEFFICIENT * expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model), gradients(plain), 1e-4)


def test_it_stands_beside_cals_own_sum(moe):
    model, batch = moe
    seecal.enable_cal(model)
    without = model(**batch)
    output = model(**batch, output_router_logits=True)
    assert without.cal.aux_loss is None
    torch.testing.assert_close(output.cal.loss_sum, without.cal.loss_sum)
    torch.testing.assert_close(output.loss, without.loss + COEFFICIENT * output.aux_loss)
    assert torch.equal(output.cal.weights, without.cal.weights)


def test_of_a_step_each_micro_batch_adds_its_share(moe):
    """With num_items_in_batch a trainer does not divide: whole ones would be as many as there are micro-batches."""
    model, batch = moe
    seecal.enable_cal(model)
    labels = len(model(**batch).cal.weights)
    alone = model(**batch, output_router_logits=True, num_items_in_batch=labels)
    third = model(**batch, output_router_logits=True, num_items_in_batch=torch.tensor(3 * labels))
    torch.testing.assert_close(alone.loss, model(**batch, output_router_logits=True).loss)
    torch.testing.assert_close(third.loss, alone.loss / 3)
    torch.testing.assert_close(third.aux_loss, alone.aux_loss)


def test_asked_for_no_logits_there_is_none(moe):
    model, batch = moe
    model.config.text_config.output_router_logits = True
    seecal.enable_cal(model)
    assert model(**batch, output_router_logits=False).cal.aux_loss is None


def test_a_decoder_without_experts_has_none():
    model = copy.deepcopy(zoo.model_of("llava", "sdpa"))
    output = seecal.enable_cal(model.train())(**zoo.batch_of("llava", zoo.MIXED))
    assert output.cal.aux_loss is None
