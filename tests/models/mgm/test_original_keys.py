"""Every key of an original checkpoint, both ways, bit for bit."""

import math

import pytest
import torch
import transformers as T

from seecal.models.mgm import MGMConfig, MGMForConditionalGeneration
from seecal.models.mgm.original_keys import (
    config_from_original,
    config_to_original,
    convnext_from_timm,
    to_original,
    to_transformers,
)

V, D, C, INNER, LAYERS, CLIP_LAYERS = 40, 48, 32, 56, 2, 3
CHANNELS, DEPTHS = [8, 12, 16, 24], [1, 2, 3, 1]
A = sum(CHANNELS)
CLIP = {"hidden_size": C, "intermediate_size": 48, "num_hidden_layers": CLIP_LAYERS, "num_attention_heads": 2}
TOWERS = {
    "vision_config": {**CLIP, "image_size": 32, "patch_size": 8},
    "vision_aux_config": {"hidden_sizes": CHANNELS, "depths": DEPTHS},
}
ORIGINAL = {
    "_name_or_path": "work_dirs/MGM/MGM-7B",
    "architectures": ["MGMLlamaForCausalLM"],
    "model_type": "mgm",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "use_cache": True,
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    "mm_hidden_size": C,
    "mm_hidden_size_aux": A,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_size_aux": 64,
    "image_grid": 1,
    "image_global": False,
    "image_aspect_ratio": "pad",
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 2048,
    "tune_mm_mlp_adapter": False,
}
GEMMA = {
    **ORIGINAL,
    "model_type": "mgm_gemma",
    "architectures": ["MGMGemmaForCausalLM"],
    "head_dim": 12,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}


def named(prefix, **shapes):
    """weight and bias of each; a name that ends in _ has a weight alone."""
    found = {}
    for name, (weight, *bias) in shapes.items():
        found[f"{prefix}.{name.replace('__', '.')}.weight"] = weight
        if bias:
            found[f"{prefix}.{name.replace('__', '.')}.bias"] = bias[0]
    return found


def shapes_of_original(head_dim=12, tied=False):
    """Name → shape of all that MGM's own code saves, its sizes shrunk."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for one, rows in (("q", 4), ("k", 2), ("v", 2)):
            shapes[f"{at}.self_attn.{one}_proj.weight"] = (rows * head_dim, D)
        shapes[f"{at}.self_attn.o_proj.weight"] = (D, 4 * head_dim)
        shapes |= {f"{at}.mlp.{one}_proj.weight": (INNER, D) for one in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (D, INNER)
        shapes |= {f"{at}.{one}_layernorm.weight": (D,) for one in ("input", "post_attention")}
    shapes |= named("model.mm_projector", **{"0": ((D, C), (D,)), "2": ((D, D), (D,))})
    for name, width in (("query", C), ("aux", A), ("val", A)):
        at = f"model.vlm_uni_{name}_projector"
        shapes |= named(at, **{"0": ((width,), (width,)), "1": ((C, width), (C,))})
    at = "model.vision_tower.vision_tower.vision_model"
    shapes |= {f"{at}.embeddings.class_embedding": (C,), f"{at}.embeddings.patch_embedding.weight": (C, 3, 8, 8)}
    shapes[f"{at}.embeddings.position_embedding.weight"] = (17, C)
    shapes |= named(at, pre_layrnorm=((C,), (C,)), post_layernorm=((C,), (C,)))
    for layer in range(CLIP_LAYERS):
        one = f"{at}.encoder.layers.{layer}"
        shapes |= named(one, **{f"self_attn__{part}_proj": ((C, C), (C,)) for part in ("q", "k", "v", "out")})
        shapes |= named(one, layer_norm1=((C,), (C,)), layer_norm2=((C,), (C,)))
        shapes |= named(one, mlp__fc1=((48, C), (48,)), mlp__fc2=((C, 48), (C,)))
    at = "model.vision_tower_aux"
    shapes |= named(f"{at}.vision_stem", **{"0": ((8, 3, 4, 4), (8,)), "1": ((8,), (8,))})
    for stage, (width, depth) in enumerate(zip(CHANNELS, DEPTHS, strict=True)):
        of_stage = f"{at}.vision_stages.{stage}"
        if stage:
            before = CHANNELS[stage - 1]
            shapes |= named(
                f"{of_stage}.downsample", **{"0": ((before,), (before,)), "1": ((width, before, 2, 2), (width,))}
            )
        for block in range(depth):
            one = f"{of_stage}.blocks.{block}"
            shapes[f"{one}.gamma"] = (width,)
            shapes |= named(one, conv_dw=((width, 1, 7, 7), (width,)), norm=((width,), (width,)))
            shapes |= named(one, mlp__fc1=((4 * width, width), (4 * width,)), mlp__fc2=((width, 4 * width), (width,)))
    return shapes


def made_up(dtype=torch.float32, tied=False):
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of_original(tied=tied)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def same(first, second):
    return set(first) == set(second) and all(torch.equal(one, second[name]) for name, one in first.items())


CASES = [(ORIGINAL, False), (GEMMA, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("original", "tied"), CASES, ids=["Llama", "Gemma"])
def test_every_key_both_ways_bit_for_bit(original, tied, dtype):
    state = made_up(dtype, tied)
    config = config_from_original(original, **TOWERS)
    ours = to_transformers(state, config)
    assert same(to_original(ours, config), state)
    model = MGMForConditionalGeneration(config).to(dtype)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert missing == (["lm_head.weight"] if tied else [])
    assert not unexpected
    model.tie_weights()
    again = to_original(model.state_dict(), config)
    assert same({name: again[name] for name in state}, state)
    assert set(again) - set(state) == ({"lm_head.weight"} if tied else set())


def test_each_key_goes_where_it_belongs():
    """A tensor of ones more than the name: what each is called on the other side."""
    state = made_up()
    ours = to_transformers(state, config_from_original(ORIGINAL, **TOWERS))
    for theirs, new in {
        "model.layers.1.self_attn.q_proj.weight": "model.language_model.layers.1.self_attn.q_proj.weight",
        "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
        "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
        "model.vlm_uni_query_projector.0.weight": "model.mining.query.0.weight",
        "model.vlm_uni_aux_projector.1.weight": "model.mining.key.1.weight",
        "model.vlm_uni_val_projector.1.bias": "model.mining.value.1.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
        "model.vision_tower_aux.vision_stem.1.weight": "model.vision_tower_aux.embeddings.layernorm.weight",
        "model.vision_tower_aux.vision_stages.2.downsample.1.weight": (
            "model.vision_tower_aux.encoder.stages.2.downsampling_layer.1.weight"
        ),
        "model.vision_tower_aux.vision_stages.2.blocks.2.gamma": (
            "model.vision_tower_aux.encoder.stages.2.layers.2.layer_scale_parameter"
        ),
    }.items():
        assert ours[new] is state[theirs]
    assert len(ours) == len(state) + 2  # and the norm that only transformers' class has


# ---- Gemma's factor ----


def test_gemmas_factor_is_in_the_config_or_folded_into_the_projector():
    """Either way the image features are sqrt(48) times what the checkpoint's projector gives."""
    state = made_up(tied=True)
    held = config_from_original(GEMMA, **TOWERS)
    assert held.image_feature_scale == math.sqrt(D)
    folded = MGMConfig(**{**held.to_dict(), "image_feature_scale": 1.0})
    weights = to_transformers(state, folded)
    for part in ("weight", "bias"):
        expected = (state[f"model.mm_projector.2.{part}"].double() * math.sqrt(D)).float()
        assert torch.equal(weights[f"model.multi_modal_projector.linear_2.{part}"], expected)
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32), "pixel_values_aux": torch.randn(1, 3, 64, 64)}
    pixels = {name: one.double() for name, one in pixels.items()}
    found = []
    for config, tensors in ((held, to_transformers(state, held)), (folded, weights)):
        model = MGMForConditionalGeneration(config).eval()
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            found.append(model.double().get_image_features(**pixels).pooler_output[0])
    # The weights were rounded to float32 when they were multiplied
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6 * float(found[0].abs().max()))
    back = to_original(weights, folded)
    for name, one in state.items():
        torch.testing.assert_close(back[name], one, rtol=2e-7 if "mm_projector.2" in name else 0, atol=0)


def test_a_factor_that_is_a_power_of_two_is_folded_bit_for_bit():
    config = MGMConfig(
        **TOWERS,
        text_config=T.GemmaConfig(hidden_size=64, num_hidden_layers=1),
        image_feature_scale=1.0,
        image_size_aux=64,
    )
    state = {"model.mm_projector.2.weight": torch.randn(64, 64), "model.mm_projector.2.bias": torch.randn(64)}
    ours = to_transformers(state, config)
    assert torch.equal(ours["model.multi_modal_projector.linear_2.weight"], state["model.mm_projector.2.weight"] * 8)
    assert same(to_original(ours, config), state)


# ---- parts, buffers, unknown names ----


@pytest.mark.parametrize("part", ["projector", "towers", "one shard"])
def test_a_part_of_a_checkpoint_is_converted_alone(part):
    """Stage 1 saves projector, mining and, by its names, both towers; a checkpoint may lack the towers."""
    state = made_up()
    wanted = {
        "projector": lambda name: "mm_projector" in name or "vlm_uni" in name,
        "towers": lambda name: "vision_tower" in name,
        "one shard": lambda name: "layers.1" in name,
    }[part]
    some = {name: one for name, one in state.items() if wanted(name)}
    config = config_from_original(ORIGINAL, **TOWERS)
    ours = to_transformers(some, config)
    assert ours.keys() <= MGMForConditionalGeneration(config).state_dict().keys()
    assert same(to_original(ours, config), some)


def test_buffers_of_older_versions_are_left_out():
    config = config_from_original(ORIGINAL, **TOWERS)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.inv_freq": torch.ones(6),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    assert not to_transformers(buffers, config)


UNKNOWN = [
    "model.layers.2.mlp.up_proj.weight",  # one layer too many
    "model.layers.0.block_sparse_moe.gate.weight",  # Mixtral's
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.mm_projector.4.weight",
    "model.vlm_uni_query_projector.2.weight",
    "model.vision_fpn.0.weight",
    "model.vision_tower.vision_tower.vision_model.head.weight",
    "model.vision_tower_aux.vision_stages.3.blocks.1.gamma",
    "model.vision_tower_aux.vision_stages.0.downsample.0.weight",
    "model.language_model.norm.weight",  # ours already
    "model.vision_tower_aux.layernorm.weight",
    "modelXnorm.weight",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_key_is_an_error_that_names_it(name):
    config = config_from_original(ORIGINAL, **TOWERS)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": no tensor of the original"):
        to_transformers({**made_up(), name: torch.ones(1)}, config)


@pytest.mark.parametrize(
    "name", ["model.mm_projector.0.weight", "model.language_model.layers.9.mlp.up_proj.weight", "x"]
)
def test_an_unknown_key_of_ours_too(name):
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": no tensor of this model"):
        to_original({name: torch.ones(1)}, config_from_original(ORIGINAL, **TOWERS))


def test_several_unknown_keys_are_counted():
    with pytest.raises(ValueError, match="a and 1 more: no tensor"):
        to_transformers({"a": torch.ones(1), "b": torch.ones(1)}, config_from_original(ORIGINAL, **TOWERS))


def test_timms_names_are_transformers():
    assert convnext_from_timm("stages.1.blocks.0.conv_dw.bias") == "encoder.stages.1.layers.0.dwconv.bias"
    assert convnext_from_timm("stem.0.weight") == "embeddings.patch_embeddings.weight"
    assert convnext_from_timm("head.norm.weight") is convnext_from_timm("norm_pre.weight") is None


# ---- config.json ----


@pytest.mark.parametrize(
    "original", [ORIGINAL, GEMMA, {**ORIGINAL, "image_grid": 2, "image_global": True, "image_size_aux": 128}]
)
def test_a_config_comes_back_as_it_was(original, tmp_path):
    config = config_from_original(original, **TOWERS)
    assert config.image_grid == original["image_grid"]
    assert config.image_token_id == V
    assert config.text_config.num_key_value_heads == 2
    assert config_to_original(config) == original
    config.save_pretrained(tmp_path)
    assert config_to_original(MGMConfig.from_pretrained(tmp_path)) == original


def test_what_changed_since_is_written():
    config = config_from_original(ORIGINAL, **TOWERS)
    config.text_config.vocab_size = V + 8
    assert config_to_original(config) == {**ORIGINAL, "vocab_size": V + 8}


def test_a_model_that_was_never_the_originals_gets_a_whole_config():
    large = MGMConfig(image_grid=2, image_global=True, image_size_aux=1536)
    written = config_to_original(large)
    assert written["tokenizer_model_max_length"] == 4096
    assert (written["mm_hidden_size"], written["mm_hidden_size_aux"]) == (1024, 2880)
    again = config_from_original(written)
    for field in ("image_grid", "image_global", "image_size_aux", "image_token_id", "vision_feature_layer"):
        assert getattr(again, field) == getattr(large, field)
    assert again.text_config.to_dict() == large.text_config.to_dict()


def test_longer_positions_are_kept():
    original = {**ORIGINAL, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = config_from_original(original, **TOWERS)
    assert config.text_config.rope_parameters["rope_theta"] == 5e5
    assert config.text_config.rope_parameters["factor"] == 2.0
    assert config_to_original(config) == original


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mgm_mixtral"}, "'mgm_mixtral': converted are mgm and mgm_gemma"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but the tower that was given has 32"),
        ({"mm_hidden_size_aux": 2880}, "mm_hidden_size_aux is 2880"),
        ({"image_size_aux": 60}, "image_size_aux=60"),
    ],
)
def test_what_is_not_converted_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        config_from_original({**ORIGINAL, **changed}, **TOWERS)


def test_what_the_original_has_not_is_refused():
    other = MGMConfig(**TOWERS, text_config=T.Qwen2Config(hidden_size=32, num_attention_heads=2), image_size_aux=64)
    with pytest.raises(ValueError, match="no qwen2 language model"):
        config_to_original(other)
