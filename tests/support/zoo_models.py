"""One tiny random model per family of FAMILIES, with the layout of one image in its text and the tensors it takes.

Widths are the smallest that each family's own rules allow; an image is 4 to 88 tokens. Windows of 12 and chunks of 16 slots
are shorter than the rows, so that distance in slots and distance in positions differ.
"""

import transformers as T

from seecal.models.mgm import MGMConfig, MGMForConditionalGeneration
from tests.support import zoo_parts as take
from tests.support.zoo_parts import (
    BREAK,
    CROSS_ID,
    END,
    FINE_TOWER,
    IMAGE,
    OTHER,
    PATCH_ID,
    PINPOINTS,
    SMALL,
    START,
    TEXT,
    VIDEO,
    VOCABULARY,
    WIDTH,
    Kind,
    clip,
    convnext,
    llama,
    mistral,
    pixtral,
    qwen2,
    siglip,
)

ZOO: dict[str, Kind] = {}

# ---------------------------------------------------------------- LLaVA and its kin


def _llava(family, tower=None, text=None, **options):
    config = getattr(T, f"{family}Config")(
        vision_config=tower or clip(), text_config=text or llama(), image_token_index=IMAGE, **options
    )
    return getattr(T, f"{family}ForConditionalGeneration")(config)


_WRAPPED = lambda count: [START, *[IMAGE] * count, END]  # noqa: E731
_ROWS = ([IMAGE] * 4 + [BREAK]) * 3 + [IMAGE] * 4 + [END]  # Pixtral: text ids end every row of features
_TILED = [IMAGE] * (16 + 8 * 8 + 8)  # the whole picture, 8 × 8 of its four tiles, one newline for each of their 8 rows
_WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_GRID = {"image_grid_pinpoints": PINPOINTS}


def _vipllava():
    return _llava("VipLlava", clip(num_hidden_layers=3), vision_feature_layers=[-1, -2])


def _next_video():
    return _llava("LlavaNextVideo", video_token_index=VIDEO, **_GRID)


def _onevision():
    options = {"video_token_index": VIDEO, "vision_feature_layer": -1, **_GRID}
    return _llava("LlavaOnevision", siglip(), qwen2(), **options)


def _mistral3(window=None):
    return _llava("Mistral3", pixtral(4), mistral(window), spatial_merge_size=2, vision_feature_layer=-1)


ZOO["llava"] = Kind(lambda: _llava("Llava"), [IMAGE] * 16, take.picture)
ZOO["llava, Pixtral"] = Kind(lambda: _llava("Llava", pixtral(8), mistral(), **_WHOLE), _ROWS, take.sized_picture)
ZOO["vipllava"] = Kind(_vipllava, [IMAGE] * 16, take.picture)
ZOO["mistral3"] = Kind(_mistral3, _ROWS, take.sized_picture)
ZOO["mistral3, window"] = Kind(lambda: _mistral3(12), _ROWS, take.sized_picture)
ZOO["llava_next"] = Kind(lambda: _llava("LlavaNext", **_GRID), _TILED, take.tiles)
ZOO["llava_next_video"] = Kind(_next_video, _TILED, take.tiles)
ZOO["llava_next_video, videos"] = Kind(_next_video, [VIDEO] * 8, take.clips, placeholder=VIDEO)
ZOO["llava_onevision"] = Kind(_onevision, _TILED, take.counted_tiles)


# ---------------------------------------------------------------- Qwen-VL and GLM-4V: M-RoPE

_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_INTERLEAVED = {**_ROPE, "mrope_interleaved": True}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
_QWEN3_TOWER = {**_QWEN_TOWER, "out_hidden_size": WIDTH, "num_position_embeddings": 64}
_DEEP = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _qwen(family, vision, rope=_ROPE, ids=_QWEN_IDS, **text):
    text_config = {**TEXT, "rope_parameters": rope, **text}
    config = getattr(T, f"{family}Config")(text_config=text_config, vision_config=vision, **ids)
    return getattr(T, f"{family}ForConditionalGeneration")(config)


def _qwen2_vl():
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return _qwen("Qwen2VL", tower)


def _qwen2_5_vl():
    windows = {"out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", {**_QWEN_TOWER, **windows})


def _qwen3_vl():
    return _qwen("Qwen3VL", {**_QWEN3_TOWER, **_DEEP}, _INTERLEAVED, head_dim=16)


def _qwen3_vl_moe():
    return _qwen("Qwen3VLMoe", {**_QWEN3_TOWER, **_DEEP}, _INTERLEAVED, head_dim=16, **_EXPERTS)


def _qwen3_5():
    rope = {**_INTERLEAVED, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    return _qwen("Qwen3_5", _QWEN3_TOWER, rope, head_dim=16, **_LINEAR)


def _glm4v():
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
    videos = {"video_start_token_id": BREAK, "video_end_token_id": OTHER}
    tower = {**_QWEN_TOWER, "out_hidden_size": WIDTH, "image_size": 32}
    return _qwen("Glm4v", tower, {**_ROPE, "partial_rotary_factor": 1.0}, {**ids, **videos})


_TYPED = take.is_image("mm_token_type_ids")
ZOO["qwen2_vl"] = Kind(_qwen2_vl, _WRAPPED(6), take.patches, _TYPED)
ZOO["qwen2_5_vl"] = Kind(_qwen2_5_vl, _WRAPPED(6), take.patches, _TYPED)
_CLIP_IDS = [START, *[VIDEO] * 8, END]  # two steps in time of 2 × 2 merged patches
ZOO["qwen2_5_vl, videos"] = Kind(_qwen2_5_vl, _CLIP_IDS, take.video_patches, _TYPED, placeholder=VIDEO)
ZOO["qwen3_vl"] = Kind(_qwen3_vl, _WRAPPED(6), take.patches, _TYPED)
ZOO["qwen3_vl_moe"] = Kind(_qwen3_vl_moe, _WRAPPED(6), take.patches, _TYPED)
ZOO["qwen3_5"] = Kind(_qwen3_5, _WRAPPED(6), take.patches, _TYPED)
ZOO["glm4v"] = Kind(_glm4v, _WRAPPED(6), take.patches, _TYPED)


# ---------------------------------------------------------------- Idefics, InternVL and readers of pages


def _idefics2():
    heads = {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    resampler = {"hidden_size": WIDTH, "resampler_n_latents": 8, "resampler_depth": 1, **heads}
    config = T.Idefics2Config(
        vision_config=FINE_TOWER, perceiver_config=resampler, text_config=mistral(), image_token_id=IMAGE
    )
    return T.Idefics2ForConditionalGeneration(config)


def _idefics3(family="Idefics3"):
    config = getattr(T, f"{family}Config")(
        vision_config=FINE_TOWER, text_config=llama(), image_token_id=IMAGE, scale_factor=2
    )
    return getattr(T, f"{family}ForConditionalGeneration")(config)


def _internvl():
    tower = {**SMALL, "image_size": [32, 32], "patch_size": [4, 4]}
    config = T.InternVLConfig(vision_config=tower, text_config=qwen2(), image_token_id=IMAGE, image_seq_length=16)
    return T.InternVLForConditionalGeneration(config)


def _got_ocr2():
    windows = {"window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48}
    tower = {**SMALL, "output_channels": 16, "image_size": 64, "patch_size": 4, **windows}
    return _llava("GotOcr2", tower, qwen2(), image_seq_length=16)


def _lighton_ocr():
    text = T.Qwen3Config(**TEXT, head_dim=16)
    config = T.LightOnOcrConfig(vision_config=pixtral(4), text_config=text, image_token_id=IMAGE)
    return T.LightOnOcrForConditionalGeneration(config)


def _ovis2():
    tower = {**FINE_TOWER, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
    config = T.Ovis2Config(
        vision_config=tower,
        text_config=qwen2(),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[120, 121, 122, 123, 124],
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
    )
    return T.Ovis2ForConditionalGeneration(config)


ZOO["internvl"] = Kind(_internvl, _WRAPPED(16), take.picture)
ZOO["got_ocr2"] = Kind(_got_ocr2, _WRAPPED(16), take.large_picture)
ZOO["lighton_ocr"] = Kind(_lighton_ocr, _WRAPPED(16), take.sized_picture)
ZOO["idefics2"] = Kind(_idefics2, _WRAPPED(8), take.grouped)
ZOO["idefics3"] = Kind(_idefics3, _WRAPPED(16), take.grouped)
ZOO["smolvlm"] = Kind(lambda: _idefics3("SmolVLM"), _WRAPPED(16), take.grouped)
ZOO["ovis2"] = Kind(_ovis2, [120, *[IMAGE] * 16, 124], take.picture)


# ---------------------------------------------------------------- Gemma: tied embeddings times sqrt(width)

_GEMMA = {**TEXT, "head_dim": 16}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_BLOCK = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
_GENTLE = 0.1  # × sqrt(64): embeddings as large as what the layers add to them


def _paligemma(text):
    return _llava("PaliGemma", siglip(projection_dim=WIDTH), text, projection_dim=WIDTH, hidden_size=WIDTH)


def _paligemma2():
    caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
    return _paligemma(T.Gemma2Config(**_GEMMA, sliding_window=512, query_pre_attn_scalar=16, **caps))


def _gemma3(window=4096):
    text = T.Gemma3TextConfig(
        **_GEMMA,
        sliding_window=window,
        layer_types=_LAYERS,
        query_pre_attn_scalar=16,
        final_logit_softcapping=3.0,  # its VLM class does not apply it
    )
    config = T.Gemma3Config(vision_config=siglip(), text_config=text, mm_tokens_per_image=16, **_BLOCK)
    return T.Gemma3ForConditionalGeneration(config)


def _gemma4():
    text = {
        **_GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 4096,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "final_logit_softcapping": 3.0,
        "use_bidirectional_attention": "vision",
        "global_head_dim": 16,
    }
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    tower = {**SMALL, **heads, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": BREAK, "boi_token_id": START}
    config = T.Gemma4Config(vision_config=tower, text_config=text, audio_config=None, eoi_token_id=END, **ids)
    return T.Gemma4ForConditionalGeneration(config)


_BLOCKS = take.is_image("token_type_ids")
ZOO["paligemma"] = Kind(
    lambda: _paligemma(T.GemmaConfig(**_GEMMA)), [IMAGE] * 16, take.picture, take.is_answer, embed=_GENTLE
)
ZOO["paligemma, version 2"] = Kind(
    _paligemma2, [IMAGE] * 16, take.picture, take.is_answer, embed=_GENTLE, attentions=("eager",)
)
ZOO["gemma3"] = Kind(_gemma3, _WRAPPED(16), take.picture, _BLOCKS, embed=_GENTLE)
ZOO["gemma3, window"] = Kind(lambda: _gemma3(12), _WRAPPED(16), take.picture, _BLOCKS, embed=_GENTLE)
ZOO["gemma4"] = Kind(_gemma4, _WRAPPED(4), take.positioned, _TYPED, embed=_GENTLE)


# ---------------------------------------------------------------- Mini-Gemini: two towers, tiles, either language model

_HD = {"image_grid": 2, "image_global": True, "image_size_aux": 128}


def mgm(text=None, **options):
    towers = {"vision_config": clip(), "vision_aux_config": convnext()}
    config = MGMConfig(text_config=text or llama(), image_token_id=IMAGE, **{**towers, "image_size_aux": 64, **options})
    return MGMForConditionalGeneration(config)


ZOO["mgm"] = Kind(mgm, [IMAGE] * 16, take.two_resolutions)
ZOO["mgm, HD"] = Kind(lambda: mgm(**_HD), [IMAGE] * 80, take.tiles_and_large)
ZOO["mgm, Gemma"] = Kind(lambda: mgm(T.GemmaConfig(**_GEMMA)), [IMAGE] * 16, take.two_resolutions, embed=_GENTLE)
ZOO["mgm, HD, Gemma"] = Kind(
    lambda: mgm(T.GemmaConfig(**_GEMMA), **_HD), [IMAGE] * 80, take.tiles_and_large, embed=_GENTLE
)


# ---------------------------------------------------------------- Cohere, Granite, Molmo, Llama 4


def _cohere(window=4096):
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    # logit_scale: the VLM classes do not apply it
    return T.Cohere2Config(**{**TEXT, **layers}, logit_scale=0.25, sliding_window=window)


def _cohere2_vision(window=4096):
    config = T.Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=_cohere(window),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=48,
    )
    return T.Cohere2VisionForConditionalGeneration(config)


def _granite4_vision():
    multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.25}
    querying = {"model_type": "blip_2_qformer", "hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    attention = {"num_attention_heads": 1, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
    attention["attention_probs_dropout_prob"] = 0.0  # applied as a function: no module to set to 0
    return _llava(
        "Granite4Vision",
        siglip(hidden_size=WIDTH),
        {**TEXT, **multipliers, "logits_scaling": 4.0},
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2],
        qformer_config={**querying, **attention, "intermediate_size": 48},
        projector_dropout=0.0,
        **_WHOLE,
    )


def _molmo2():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    tower = {"hidden_size": 32, **heads, "num_hidden_layers": 3, "image_size": [16, 16], "patch_size": 4}
    adapter = {"hidden_size": 32, **heads, "vision_feature_layer": [-1, -2], "text_hidden_size": WIDTH}
    text = {name: value for name, value in TEXT.items() if not name.endswith("token_id")}
    config = T.Molmo2Config(
        vision_config={**tower, "num_position_embeddings": 16},
        adapter_config=adapter,
        text_config={**text, "head_dim": 16, "additional_vocab_size": 8},
        image_patch_id=PATCH_ID,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    return T.Molmo2ForConditionalGeneration(config)


def _llama4(chunk):
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96}
    text = {
        **TEXT,
        **experts,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "attention_chunk_size": chunk,
        "no_rope_layer_interval": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    projector = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    tower = {**FINE_TOWER, **projector, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5}
    tower["vision_feature_select_strategy"] = "default"
    return T.Llama4ForConditionalGeneration(T.Llama4Config(vision_config=tower, text_config=text, **_BLOCK))


ZOO["aya_vision"] = Kind(
    lambda: _llava("AyaVision", siglip(), _cohere(), downsample_factor=2), _WRAPPED(4), take.picture
)
ZOO["cohere2_vision"] = Kind(_cohere2_vision, _WRAPPED(4), take.picture)
ZOO["cohere2_vision, window"] = Kind(lambda: _cohere2_vision(12), _WRAPPED(4), take.picture)
ZOO["granite4_vision"] = Kind(_granite4_vision, [IMAGE] * (4 + 4 * 4 + 4), take.tiles, head=24.0)
_PATCH_TOKENS = [START, *[PATCH_ID] * 8, END]
_PATCH_TYPES = take.is_image("mm_token_type_ids", image=PATCH_ID)
if hasattr(T, "Molmo2Config"):  # transformers after 5.17
    ZOO["molmo2"] = Kind(_molmo2, _PATCH_TOKENS, take.pooled, _PATCH_TYPES, placeholder=PATCH_ID)
ZOO["llama4"] = Kind(lambda: _llama4(512), _WRAPPED(16), take.picture)
ZOO["llama4, chunk"] = Kind(lambda: _llama4(16), _WRAPPED(16), take.picture)


# ---------------------------------------------------------------- without the image is something else than masked


def _lfm2_vl():
    layers = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    text = T.Lfm2Config(**{**TEXT, **layers}, conv_L_cache=3, block_multiple_of=16)
    tower = T.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=4, vision_use_head=False)
    config = T.Lfm2VlConfig(
        vision_config=tower, text_config=text, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=48
    )
    return T.Lfm2VlForConditionalGeneration(config)


def _mllama():
    layers = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    depth = {
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }
    tower = {
        "hidden_size": 32,
        "attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        **depth,
    }
    ratios = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    config = T.MllamaConfig(
        vision_config={**tower, **ratios}, text_config={**TEXT, **layers, **rope}, image_token_index=CROSS_ID
    )
    return T.MllamaForConditionalGeneration(config)


ZOO["lfm2_vl"] = Kind(_lfm2_vl, _WRAPPED(4), take.shaped)
ZOO["mllama"] = Kind(_mllama, [CROSS_ID], take.crossed, placeholder=CROSS_ID)
