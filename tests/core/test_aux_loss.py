"""The load-balancing loss of mixture-of-experts decoders is added as the model's own forward adds it."""

import copy

import pytest
import torch
import transformers

import seecal
from seecal import CALOptions
from tests.support import zoo, zoo_parts
from tests.support.reference import assert_same_gradients, gradients
from tests.support.zoo_models import ZOO

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


def test_another_name_for_the_number_of_experts():
    """GLM-4.5V says n_routed_experts and num_local_experts, and has no row."""
    whole = zoo.model_of("glm4v").config.to_dict()
    text = {
        name: whole["text_config"][name] for name in ("rope_parameters", "head_dim") if name in whole["text_config"]
    }
    text |= zoo_parts.TEXT | {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "router_aux_loss_coef": COEFFICIENT,
    }
    ids = {name: value for name, value in whole.items() if name.endswith("_token_id") and value is not None}
    tower = {name: value for name, value in whole["vision_config"].items() if name != "model_type"}
    config = transformers.Glm4vMoeConfig(vision_config=tower, text_config=text, **ids)
    assert not hasattr(config.text_config, "num_experts")
    model = zoo.scaled(transformers.Glm4vMoeForConditionalGeneration(config), ZOO["glm4v"]).train()
    batch = zoo.batch_of("glm4v", zoo.MIXED)
    expected = copy.deepcopy(model)(**batch, output_router_logits=True)
    assert float(expected.aux_loss.detach()) > 0.5
    seecal.enable_cal(model, CALOptions(weighting="uniform"))
    output = model(**batch, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
