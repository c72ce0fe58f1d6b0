"""The two options that make the pass without the image cheaper and inexact: float8 products, and only every k-th step."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import seecal
from seecal import CALOptions
from seecal.ops.float8 import fp8_linears, fp8_product
from tests.support.builders import MIXED, batch_of, build
from tests.trainer.test_cal_trainer import trainer


def e4m3(value):
    """The nearest float with 4 exponent and 3 mantissa bits (largest 448, smallest step 2**-9), by its definition."""
    exponent = torch.floor(torch.log2(value.abs().clamp(min=2.0**-30))).clamp(min=-6)
    step = 2.0 ** (exponent - 3)
    return (value / step).round() * step  # torch rounds halves to even, and so does the type


def test_a_product_is_the_definitions():
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(5, 32, generator=generator), torch.randn(48, 32, generator=generator) * 3
    rows[0], weight[1] = 0, 0
    scaled = []
    for values in (rows, weight):
        scale = values.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        scaled.append((e4m3(values / scale), scale))
    (left, left_scale), (right, right_scale) = scaled
    expected = (left.double() @ right.double().T * left_scale.double() * right_scale.double().T).bfloat16()
    got = fp8_product(rows, weight)
    torch.testing.assert_close(got.float(), expected.float(), atol=1e-2, rtol=8e-3)
    assert not got[0].any()
    assert not got[:, 1].any()
    assert float((got.float() - rows @ weight.T).abs().max()) > 1e-3, "three bits of mantissa leave a trace"


def test_only_inside_the_block_and_only_what_fits():
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 20), nn.Linear(20, 16))
    inputs = torch.randn(2, 3, 32)
    plain = [layers[0](inputs), layers(inputs)]
    with fp8_linears(layers):
        assert [("forward" in one.__dict__) for one in layers] == [True, False, False]
        inside = layers[0](inputs)
        assert inside.shape == plain[0].shape
        assert not torch.equal(inside, plain[0])
        torch.testing.assert_close(inside, plain[0], atol=0.1, rtol=0.1)
    assert not any("forward" in one.__dict__ for one in layers)
    assert torch.equal(layers(inputs), plain[1])


def test_adapters_stay_as_they_are_and_so_does_a_forward_that_was_there():
    """accelerate and others put a forward on a layer, too: it comes back when the block is left."""
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), LoraConfig(r=16, target_modules=["0"])).base_model.model
    layer, plain = model[0], nn.Linear(32, 32)
    adapters = [layer.lora_A["default"], layer.lora_B["default"]]
    plain.forward = mine = lambda inputs: inputs
    decoder = nn.ModuleList([model, plain])
    with fp8_linears(decoder):
        assert "forward" in layer.base_layer.__dict__
        assert not any("forward" in one.__dict__ for one in adapters)
        assert plain.forward is not mine
    assert "forward" not in layer.base_layer.__dict__
    assert plain.forward is mine


@pytest.mark.parametrize("contrast", ["drop", "mask"])
def test_only_the_pass_without_the_image_is_rounded(contrast):
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    exact, rounded = (
        seecal.visual_delta(model, batch, contrast=contrast, options=CALOptions(contrast=contrast, fp8_contrast=fp8))
        for fp8 in (False, True)
    )
    seen = exact.has_contrast
    assert torch.equal(exact.logit_with, rounded.logit_with)
    apart = (exact.logit_without - rounded.logit_without)[seen].abs()
    spread = exact.logit_without[seen].std()
    assert 1e-4 * spread < apart.mean() < 0.2 * spread
    assert torch.equal(exact.logit_without[~seen], rounded.logit_without[~seen])


def test_training_with_it_has_exact_gradients_of_rounded_weights():
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    given = copy.deepcopy(model)
    seecal.enable_cal(model.train(), CALOptions(fp8_contrast=True))
    output = model(**batch)
    output.loss.backward()
    weights = torch.zeros(batch["labels"].shape)
    found = output.cal.visual_delta
    weights[found.sample, found.position] = output.cal.weights
    seecal.enable_cal(given.train())
    given(**batch, token_weights=weights).loss.backward()
    for (name, one), other in zip(model.named_parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    layer = nn.Linear(16, 16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Old GPU")

    class There(nn.Module):
        def parameters(self):
            yield type("Weight", (), {"device": torch.device("cuda")})()

    with pytest.raises(ValueError, match=r"Old GPU.*8\.9"), fp8_linears(There()):
        layer(torch.zeros(1, 16))


# ---------------------------------------------------------------- every k-th step


def test_every_third_forward_takes_the_image_away():
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    plain = copy.deepcopy(model)
    seecal.enable_cal(model.train(), CALOptions(contrast_every=3))
    seecal.enable_cal(plain.train(), CALOptions(weighting="uniform"))
    outputs = [model(**batch) for _ in range(7)]
    assert [one.cal.contrast_tokens > 0 for one in outputs] == [True, False, False, True, False, False, True]
    for one in outputs:
        measured = one.cal.contrast_tokens > 0
        assert bool(one.cal.visual_delta.has_contrast.any()) == measured
        assert bool((one.cal.weights != 1).any()) == measured
    torch.testing.assert_close(outputs[1].loss, plain(**batch).loss)
    assert seecal.visual_delta(model, batch).has_contrast.any(), "it is asked by name, and measures"


def test_the_trainer_counts_optimizer_steps(tmp_path):
    """Two micro-batches a step: both of a step take the image away, or none of them."""
    changes = {"contrast_every": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 4}
    this = trainer(tmp_path, changes={**changes, "logging_steps": 1})
    seen = []
    this.model.register_forward_hook(lambda module, args, output: seen.append(output.cal.contrast_tokens > 0))
    this.train()
    assert [any(seen[start : start + 2]) for start in range(0, 8, 2)] == [True, False, True, False]
    assert seen[:2] == [True, True]
    logs = [one for one in this.state.log_history if "contrast_token_share" in one]
    assert [one["contrast_token_share"] > 0 for one in logs] == [True, False, True, False]
    assert ["delta_mean" in one for one in logs] == [True, False, True, False]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_number_of_steps_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match="contrast_every"):
        CALOptions(contrast_every=every)
