"""What of a text decoder decides how its rows may lie: states."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import seecal
from seecal import CALOptions
from seecal.families.table import FAMILIES, family_of
from tests.support.builders import MIXED, batch_of, build


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
