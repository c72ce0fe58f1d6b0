"""The case recorded from the authors' released forward: tests/golden/README.md says what is in it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import seecal
from seecal import CALOptions
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "official_forward.safetensors"
IMAGE_ID = 1  # occurs nowhere in the recorded text


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(GOLDEN)
    split = lambda prefix: {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}  # noqa: E731
    return SimpleNamespace(model=split("model/"), case=SimpleNamespace(**split("case/")))


def llava_around(recorded, attention):
    """A LLaVA whose language model is the recorded one and whose image features are the recorded ones."""
    text = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation(attention)
    inner = {name.removeprefix("model."): value for name, value in recorded.model.items() if name != "lm_head.weight"}
    model.model.language_model.load_state_dict(inner)
    model.lm_head.load_state_dict({"weight": recorded.model["lm_head.weight"]})
    features = list(recorded.case.image_features)
    model.model.get_image_features = lambda **_: BaseModelOutputWithPooling(pooler_output=features)
    case = recorded.case
    batch = {
        "input_ids": torch.where(case.ids == -200, IMAGE_ID, case.ids),
        "attention_mask": case.attention_mask,
        "labels": case.labels.masked_fill(case.labels < 0, -100),
        "pixel_values": torch.zeros(len(features), 3, 8, 8),
    }
    return model, batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("contrast", ["drop", "mask"])
def test_clamped_delta_at_labels(recorded, contrast, attention):
    model, batch = llava_around(recorded, attention)
    delta = seecal.visual_delta(model, batch, contrast=contrast)
    clamped = delta.delta.clamp(1, 5)
    expected = recorded.case.weights_clamped[delta.sample, delta.position - 1]
    assert len(delta) == 85
    assert [int((expected <= 1).sum()), int((expected >= 5).sum())] == [59, 11]
    torch.testing.assert_close(clamped, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_released_loss_weights_and_gradients(recorded, attention):
    model, batch = llava_around(recorded, attention)
    options = CALOptions(contrast="mask", pool_scope="released", normalize="micro_batch")
    seecal.enable_cal(model.train(), options)
    embeds = {}

    def keep_embeds(module, args, kwargs):
        if torch.is_grad_enabled():
            embeds["main"] = kwargs["inputs_embeds"]
            embeds["main"].retain_grad()

    handle = model.model.language_model.register_forward_pre_hook(keep_embeds, with_kwargs=True)
    output = model(**batch)
    handle.remove()
    output.loss.backward()
    case, delta = recorded.case, output.cal.visual_delta
    relative = {"atol": 0, "rtol": 1e-4}
    torch.testing.assert_close(output.loss.detach(), case.loss[0], **relative)
    torch.testing.assert_close(output.cal.weights, case.weights_pooled[delta.sample, delta.position - 1], **relative)
    for got, expected in (
        (model.lm_head.weight.grad, case.grad_lm_head),
        (embeds["main"].grad, case.grad_embeds),
        (model.model.language_model.layers[0].self_attn.q_proj.weight.grad, case.grad_q0),
    ):
        assert (got - expected).norm() <= 1e-4 * expected.norm()
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_dropping_cannot_give_the_released_pooling(recorded):
    """Where a shorter row ends, the released mean reads padding: that is the difference between the two pool scopes."""
    model, batch = llava_around(recorded, "sdpa")
    seecal.enable_cal(model.train())
    cal = model(**batch).cal
    released = recorded.case.weights_pooled[cal.visual_delta.sample, cal.visual_delta.position - 1]
    assert float((cal.weights - released).abs().max()) > 0.1
