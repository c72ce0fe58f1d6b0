"""PEFT before and after, checkpointing, and low precision: the passes are the same."""

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

import seecal
from seecal import CALOptions
from tests.support.reference import assert_same_gradients, gradients


def lora(model, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False, **options)
    return get_peft_model(model, config)


def test_peft_before_and_after(case):
    model, batch = case
    after = seecal.enable_cal(lora(copy.deepcopy(model))).train()
    before = lora(seecal.enable_cal(copy.deepcopy(model))).train()
    outputs = [one(**batch) for one in (after, before)]
    for one, output in zip((after, before), outputs, strict=True):
        output.loss.backward()
        assert set(gradients(one)) == {name for name, _ in one.named_parameters() if "lora" in name}
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert_same_gradients(gradients(after), gradients(before), 1e-6)
    plain = seecal.enable_cal(copy.deepcopy(model))(**batch)
    assert abs(float((outputs[0].loss - plain.loss).detach())) > 1e-3, "the adapter is not used"
    contrast = seecal.visual_delta(after, batch, contrast="mask")
    torch.testing.assert_close(contrast.delta, outputs[0].cal.visual_delta.delta, atol=1e-3, rtol=1e-4)


def test_an_adapter_on_the_head_is_refused(case):
    model, batch = case
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        seecal.enable_cal(get_peft_model(copy.deepcopy(model), config))
    later = get_peft_model(seecal.enable_cal(model), config).train()
    with pytest.raises(ValueError, match="adapter"):
        later(**batch)


def test_a_head_in_modules_to_save_is_the_one_that_trains(case):
    model, batch = case
    trained = seecal.enable_cal(lora(model, modules_to_save=["lm_head"])).train()
    trained(**batch).loss.backward()
    assert any("lm_head.modules_to_save" in name for name in gradients(trained))


@pytest.mark.parametrize("contrast", ["drop", "mask"])
def test_checkpointing_gives_the_same_gradients(case, contrast):
    model, batch = case
    seecal.enable_cal(model, CALOptions(contrast=contrast))
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    twin.model.language_model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (model, twin):
        one(**batch).loss.backward()
    assert len(calls) == 3, "main, contrast, and the main pass again in the backward"
    assert_same_gradients(gradients(twin), gradients(model), 1e-6)


def test_bf16_autocast_and_pure_bf16(case):
    model, batch = case
    seecal.enable_cal(model)
    truth = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**batch)
    autocast.loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    pure = copy.deepcopy(model).to(torch.bfloat16)
    pure.zero_grad()
    low = pure(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    low.loss.backward()
    for output in (autocast, low):
        assert output.loss.dtype == torch.float32
        assert output.cal.visual_delta.delta.dtype == torch.float32
        torch.testing.assert_close(output.loss, truth.loss, atol=0, rtol=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(pure).values())


def test_with_the_adapter_off_the_head_is_the_original_one(case):
    model, batch = case
    trained = seecal.enable_cal(lora(model, modules_to_save=["lm_head"])).train()
    with torch.no_grad():
        trained.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    with trained.disable_adapter():
        ours = trained(**batch).cal.cross_entropy
        plain = {name: value for name, value in batch.items() if name != "labels"}
        logits = trained.eval()(**plain).logits
    delta = seecal.visual_delta(trained, batch)
    expected = torch.nn.functional.cross_entropy(logits[delta.sample, delta.position - 1], delta.labels)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


PIXELS = "contrast_pixel_values"


@pytest.mark.parametrize("adapters", [False, True], ids=["decoder", "lora"])
@pytest.mark.parametrize("contrast", ["drop", "mask", "blur"])
def test_dropout_stays_out_of_every_contrast_pass(case, contrast, adapters):
    """Of the decoder and of adapters on it. Prefixes kept from a pass with dropout would carry it into the other."""
    model, batch = case
    if adapters:
        model = lora(model, lora_dropout=0.5)
    else:
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.model.language_model.config.attention_dropout = 0.5
    batch[PIXELS] = batch["pixel_values"] * 0.3
    expected = seecal.visual_delta(model.eval(), batch, contrast=contrast)
    seecal.enable_cal(model.train(), CALOptions(contrast=contrast))
    first, second = (model(**batch).cal.visual_delta for _ in range(2))
    contrasted = first.has_contrast
    for got in (first, second):
        torch.testing.assert_close(
            got.logit_without[contrasted], expected.logit_without[contrasted], atol=1e-4, rtol=1e-4
        )
    assert not torch.equal(first.logit_with, second.logit_with), "the training pass has its dropout"
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer of another test may have left one
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("keep_fp32_wrapper", [True, False])
def test_accelerates_unwrapping_leaves_cal_on(case, accelerator, keep_fp32_wrapper):
    model, batch = case
    prepared = accelerator.prepare_model(seecal.enable_cal(model))
    assert hasattr(prepared(**batch), "cal")
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep_fp32_wrapper)
    assert hasattr(unwrapped(**batch), "cal")
    assert hasattr(unwrapped(**batch), "cal"), "and stays"
    seecal.disable_cal(unwrapped)
    assert not hasattr(unwrapped(**batch), "cal")


def test_enabling_after_accelerates_mixed_precision_is_refused(case, accelerator):
    """Ours would stand outside of its autocast, so training would run in float32 without a word."""
    model, batch = case
    prepared = accelerator.prepare_model(model)
    with pytest.raises(ValueError, match=r"enable_cal\(model\) before accelerator.prepare"):
        seecal.enable_cal(prepared)
    assert not hasattr(prepared(**batch), "cal")


def test_enabling_after_prepare_without_mixed_precision_works(case):
    model, batch = case
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = seecal.enable_cal(Accelerator(cpu=True).prepare_model(model))
        assert hasattr(prepared(**batch), "cal")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_signature_is_the_models(case):
    model, _ = case
    expected = inspect.signature(model.forward)
    assert inspect.signature(seecal.enable_cal(model).forward) == expected
