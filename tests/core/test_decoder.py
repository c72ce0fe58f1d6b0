"""What of a text decoder decides how its rows may lie: states, places in the row, frequencies, kinds of attention."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import flex_attention

import seecal
from seecal import CALOptions
from seecal.core.decoder import TextDecoder
from seecal.families.table import FAMILIES, decoder_of, family_of
from tests.core.test_exactness import reference, tolerance
from tests.support import zoo
from tests.support.builders import MIXED, Row, batch_of, build


def trained(model, batch, padding_free):
    """The output of a training forward; the model is left as it came."""
    seecal.enable_cal(model.train(), CALOptions(padding_free=padding_free))
    try:
        return model(**batch)
    finally:
        seecal.disable_cal(model.eval())


# ---------------------------------------------------------------- language models that carry a state

HYBRIDS = {
    "lfm2": {"decoder": transformers.Lfm2Config, "layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {
        "decoder": transformers.GraniteMoeHybridConfig,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "qwen3_next": {
        "decoder": transformers.Qwen3NextConfig,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "num_experts": 0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_state_does_not_run_on_into_the_next_sample(name):
    """A family that packs, with a language model of another kind."""
    model, image_tokens, pixels = build("llava", **HYBRIDS[name])
    batch = batch_of(MIXED, image_tokens, pixels)
    with torch.no_grad():
        own = model(**batch).loss
    auto, padded = trained(model, batch, "auto"), trained(model, batch, False)
    for output in (auto, padded):
        torch.testing.assert_close(output.cal.cross_entropy.detach(), own, atol=1e-5, rtol=1e-5)
        assert output.cal.main_tokens == batch["input_ids"].numel()
    torch.testing.assert_close(auto.loss, padded.loss, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="carries a state"):
        trained(model, batch, True)
    masked = seecal.visual_delta(model, batch, contrast="mask")
    assert float((masked.delta - auto.cal.visual_delta.delta).abs().max()) > 0.01
    assert not family_of(model).exact
    assert "dropping removes the image from the recurrent state too" in family_of(model).note


class OwnNames(transformers.PretrainedConfig):
    """A text config of somebody's own, as older and remote ones are."""

    model_type = "own_names"
    num_hidden_layers = 2


@pytest.mark.parametrize(
    ("text", "packs"),
    [
        ({}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["chunked_attention", "attention"]}, True),
        ({"layer_types": ["full_attention", "full_attention"], "mamba_d_state": 16}, True),  # none of its layers is one
        ({"layers_block_type": ["attention", "mamba"]}, False),
        ({"block_types": ["recurrent", "attention"]}, False),
        ({"attn_layer_indices": [1]}, False),
        ({"mamba_d_state": 16}, False),
        ({"conv_L_cache": 3}, False),
        ({"linear_attn_config": {"kda_layers": [1]}}, False),
    ],
)
@pytest.mark.parametrize("family", ["llava", "internvl", "mllama"])
def test_a_state_is_read_off_the_text_config(family, text, packs):
    config = OwnNames()
    for name, value in text.items():
        setattr(config, name, value)
    model = SimpleNamespace(config=SimpleNamespace(model_type=family, get_text_config=lambda: config))
    row = family_of(model)
    assert row.packs is packs
    assert (row is FAMILIES[family]) is packs
    assert row.exact is (packs and FAMILIES[family].exact)


# ---------------------------------------------------------------- queries that are scaled by their place in the row


def llama4(floor):
    """Its layers without rotary embeddings scale queries by what stands ``floor`` tokens into the row, and strongly."""
    model = copy.deepcopy(zoo.model_of("llama4", "sdpa"))
    model.config.text_config.floor_scale = floor
    layers = [module for module in model.modules() if hasattr(module, "floor_scale")]
    for module in layers:
        module.floor_scale, module.attn_scale, module.attn_temperature_tuning = floor, 2.0, True
    assert any(not module.use_rope for module in layers)
    return model


@pytest.mark.parametrize(
    ("over", "padding"), [("far over", "left"), ("padded rows", "right"), ("packed row", "right"), ("none", "left")]
)
def test_queries_scaled_by_their_place_in_the_row(over, padding):
    batch = zoo.batch_of("llama4", zoo.MIXED, padding)
    length, tokens = batch["input_ids"].shape[1], int(batch["attention_mask"].sum())
    floor = {"far over": 8, "padded rows": length, "packed row": length + 1, "none": tokens + 1}[over]
    model = llama4(floor)
    own = zoo.truth("llama4", model, batch)
    for contrast in ("drop", "mask"):
        options = CALOptions(contrast=contrast)
        got = seecal.visual_delta(model, batch, contrast=contrast, options=options)
        torch.testing.assert_close(got.logit_with, own.with_image, atol=own.tolerance, rtol=0)
        torch.testing.assert_close(got.delta, own.delta, atol=own.tolerance, rtol=0)
    packs = over == "none"
    assert trained(model, batch, "auto").cal.main_tokens == (tokens if packs else batch["input_ids"].numel())
    if packs:
        assert trained(model, batch, True).cal.main_tokens == tokens
        return
    with pytest.raises(ValueError, match=rf"padding_free=True.*floor_scale={floor}"):
        trained(model, batch, True)


# ---------------------------------------------------------------- frequencies chosen by the largest position

SHORT = 40  # rows that go beyond have other frequencies
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": SHORT}
ROPES = {
    "longrope": {
        "decoder": transformers.Phi3Config,
        "original_max_position_embeddings": SHORT,
        "max_position_embeddings": 4 * SHORT,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONGROPE},
    },
    "dynamic": {
        "max_position_embeddings": SHORT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "by kind of layer": {
        "decoder": transformers.Gemma3TextConfig,
        "head_dim": 16,
        "sliding_window": 512,
        "max_position_embeddings": SHORT,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}
LONG_ROWS = {
    "a neighbour is long": [Row([6, "image", 3, -8]), Row([30, -30])],
    "the row goes on after its last label": [Row([6, "image", 3, -8, 30])],
    "the image is at the end": [Row([6, "image", 2, -4, "image", 2]), Row([3, -2])],
    "the padding is long": [Row([6, "image", 3, -8]), Row([3, -2])],
    "none is long": [Row([6, "image", 3, -8]), Row([3, -2])],
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("rows", LONG_ROWS)
@pytest.mark.parametrize("rope", ROPES)
def test_both_passes_have_the_frequencies_of_the_whole_batch(rope, rows, padding):
    model, image_tokens, pixels = build("llava", **ROPES[rope])
    more = SHORT if rows == "the padding is long" else 0
    batch = batch_of(LONG_ROWS[rows], image_tokens, pixels, padding, extra_padding=more)
    delta, contrast, with_image, _ = reference(model, batch)
    assert float(delta[contrast].abs().mean()) >= 0.1
    for options in (*(CALOptions(padding_free=packed) for packed in (True, False)), CALOptions(contrast="mask")):
        got = seecal.visual_delta(model, batch, contrast=options.contrast, options=options)
        torch.testing.assert_close(got.logit_with, with_image, atol=tolerance(with_image), rtol=0)
        torch.testing.assert_close(got.delta, delta, atol=tolerance(with_image), rtol=0)
    rotary = [module for module in model.modules() if "rope_type" in vars(module)]
    assert rotary
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in rotary)


# ---------------------------------------------------------------- attention implementations and masks of pairs


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn3"])
@pytest.mark.parametrize("name", ["mistral3, window", "gemma3", "paligemma"])
def test_flash_attention_is_given_no_mask_of_pairs(monkeypatch, name, attention):
    """A window shorter than the rows, a dict of masks, a prefix: refused before the decoder runs without the image."""
    model, batch = zoo.model_of(name, "sdpa"), zoo.batch_of(name, zoo.MIXED)
    calls = []
    handle = decoder_of(model).register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(TextDecoder, "attention", property(lambda self: attention))
    try:
        for contrast in ("drop", "mask"):
            with pytest.raises(ValueError, match=rf"{attention}.*windows shorter.*sdpa' or 'eager"):
                seecal.visual_delta(model, batch, contrast=contrast)
    finally:
        handle.remove()
    assert len(calls) == 2, "the pass with the image alone"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "text",
    [
        {"sliding_window": 12},
        {
            "decoder": transformers.Qwen2Config,
            "sliding_window": 12,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {},
    ],
    ids=["windows", "windows in some layers", "none"],
)
def test_flex_attention_takes_the_same_from_a_mask(monkeypatch, text):
    """It adds a mask of pairs to its scores; compiled it wants a GPU."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *args, training=False, kernel_options=None, **options: flex_attention(*args, **options),
    )
    model, image_tokens, pixels = build("llava", **text)
    batch = batch_of(MIXED, image_tokens, pixels)
    expected = seecal.visual_delta(model, batch)
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert TextDecoder.of(model).attention == "flex_attention"
    for contrast in ("drop", "mask"):
        got = seecal.visual_delta(model, batch, contrast=contrast)
        torch.testing.assert_close(got.delta, expected.delta, atol=1e-4, rtol=1e-4)
