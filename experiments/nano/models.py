"""The four kinds of model, from transformers' own classes, with random weights.

Widths and patches are such that a step of 32 rows takes a fifth of a second of one core. An image of 64 pixels is 16 tokens
(LLaVA, Qwen2-VL, PaliGemma) or 4 of the whole, 16 of its four tiles and 4 newlines (LLaVA-NeXT).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers as hf

from .cell import Cell
from .words import BOS, END, IMAGE, PAD, tokenizer_of

_PATCH = 16
_MERGED = 2  # × 2 patches of Qwen2-VL are one token
_HEADS = 4
# transformers' 0.02 is for wide models: with it Δ of visual tokens came out as 1.4, not 2.6
_INITIALIZER_RANGE = 0.07
# (width, inner width, layers of the language model, layers of the tower)
SIZES = {"s": (128, 384, 4, 2), "m": (192, 512, 4, 3)}
_QWEN = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>", "video_token": "<|video_pad|>"}

_IMAGE_PART = "{% for part in m.content if part.type == 'image' %}SHOWN{% endfor %}"
_TEXT_PART = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    + _TEXT_PART
    + END
    + "{% endgeneration %}{% else %}"
    + _IMAGE_PART
    + _TEXT_PART
    + "\n{% endif %}{% endfor %}"
)


def built(cell: Cell, texts: list[str], seed: int) -> tuple[hf.PreTrainedModel, hf.ProcessorMixin]:
    """(model in float32 with random weights, its processor).

    Args:
        texts: all that the task can ask or answer, for the vocabulary.
        seed: of the weights.
    """
    processor = _PROCESSORS[cell.model](cell, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[cell.model](cell, processor)
    return model, processor


def parts(model: Any) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(parameters of the tower, of the projector, of the language model), each once."""
    tower, projector, language = [], [], []
    for name, value in model.named_parameters():
        if "merger" in name or "projector" in name or "image_newline" in name:
            projector.append(value)
        elif "vision_tower" in name or "visual" in name:
            tower.append(value)
        else:
            language.append(value)
    return tower, projector, language


def _text(cell: Cell, processor: Any, **more: Any) -> dict[str, Any]:
    width, inner, layers, _ = SIZES[cell.size]
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "initializer_range": _INITIALIZER_RANGE,
        **more,
    }


def _tower(cell: Cell, side: int, **more: Any) -> dict[str, Any]:
    width, inner, _, layers = SIZES[cell.size]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "image_size": side,
        "patch_size": _PATCH,
        **more,
    }


def _image_id(processor: Any, token: str = IMAGE) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(token))


# ---- LLaVA and LLaVA-NeXT ----

_LAYER = {"vision_feature_layer": -1}  # the last: a tower of two layers has none to spare
_COUNTED = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": _PATCH}
_PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _square(side: int) -> dict[str, Any]:
    size = {"height": side, "width": side}
    return {"size": size, "crop_size": size, "do_center_crop": False, **_PLAIN}


def _llava_processor(cell: Cell, texts: list[str]) -> hf.ProcessorMixin:
    images = hf.CLIPImageProcessor(**_square(cell.side))
    return hf.LlavaProcessor(images, tokenizer_of(texts), chat_template=_TEMPLATE.replace("SHOWN", IMAGE), **_COUNTED)


def _llava(cell: Cell, processor: Any) -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_tower(cell, cell.side)),
        text_config=hf.LlamaConfig(**_text(cell, processor)),
        image_token_index=_image_id(processor),
        image_seq_length=(cell.side // _PATCH) ** 2,
        **_LAYER,
    )
    return hf.LlavaForConditionalGeneration(config)


def _pinpoints(cell: Cell) -> list[list[int]]:
    """Tiles of half a side: the whole picture once, and up to four tiles of it at their full resolution."""
    half = cell.side // 2
    return [[half, cell.side], [cell.side, half], [cell.side, cell.side]]


def _llava_next_processor(cell: Cell, texts: list[str]) -> hf.ProcessorMixin:
    half = cell.side // 2
    settings = {**_square(half), "size": {"height": half, "width": half}, "image_grid_pinpoints": _pinpoints(cell)}
    images = hf.LlavaNextImageProcessor(**settings)
    template = _TEMPLATE.replace("SHOWN", IMAGE)
    return hf.LlavaNextProcessor(images, tokenizer_of(texts), chat_template=template, **_COUNTED)


def _llava_next(cell: Cell, processor: Any) -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_tower(cell, cell.side // 2)),
        text_config=hf.LlamaConfig(**_text(cell, processor)),
        image_token_index=_image_id(processor),
        image_grid_pinpoints=_pinpoints(cell),
        image_seq_length=(cell.side // 2 // _PATCH) ** 2,
        **_LAYER,
    )
    return hf.LlavaNextForConditionalGeneration(config)


# ---- Qwen2-VL ----


def _qwen2_vl_processor(cell: Cell, texts: list[str]) -> hf.ProcessorMixin:
    names = list(_QWEN.values())
    tokenizer = tokenizer_of(texts, "<|image_pad|>", *names, begins=False)
    pixels = cell.side**2
    sizes = {"patch_size": _PATCH // _MERGED, "merge_size": _MERGED}
    sizes |= {"size": {"shortest_edge": pixels, "longest_edge": pixels}}
    template = _TEMPLATE.replace("SHOWN", "<|vision_start|><|image_pad|><|vision_end|>")
    images, videos = hf.Qwen2VLImageProcessor(**sizes, **_PLAIN), hf.Qwen2VLVideoProcessor(**sizes)
    return hf.Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)


def _qwen2_vl(cell: Cell, processor: Any) -> hf.PreTrainedModel:
    width, _, _, layers = SIZES[cell.size]
    # A head's frequencies are dealt out to time, height and width
    half = width // _HEADS // 2
    height = half * 3 // 8
    rope = {"rope_type": "default", "mrope_section": [half - 2 * height, height, height], "rope_theta": 10000.0}
    tower = {"depth": layers, "embed_dim": width, "hidden_size": width, "num_heads": _HEADS, "mlp_ratio": 3}
    tower |= {"initializer_range": _INITIALIZER_RANGE}
    ids = {f"{name}_id": _image_id(processor, token) for name, token in _QWEN.items()}
    config = hf.Qwen2VLConfig(
        text_config=_text(cell, processor, rope_parameters=rope),
        vision_config={**tower, "patch_size": _PATCH // _MERGED, "spatial_merge_size": _MERGED},
        image_token_id=_image_id(processor, "<|image_pad|>"),
        **ids,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


# ---- PaliGemma ----


def _paligemma_processor(cell: Cell, texts: list[str]) -> hf.ProcessorMixin:
    images = hf.SiglipImageProcessor(size={"height": cell.side, "width": cell.side}, **_PLAIN)
    images.image_seq_length = (cell.side // _PATCH) ** 2
    return hf.PaliGemmaProcessor(images, tokenizer_of(texts))


def _paligemma(cell: Cell, processor: Any) -> hf.PreTrainedModel:
    width = SIZES[cell.size][0]
    text = _text(cell, processor, head_dim=width // _HEADS, hidden_activation="gelu_pytorch_tanh")
    tower = _tower(cell, cell.side, projection_dim=width, vision_use_head=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**tower),
            text_config=hf.GemmaConfig(**text),
            image_token_index=_image_id(processor),
            projection_dim=width,
        )
    return hf.PaliGemmaForConditionalGeneration(config)


_PROCESSORS = {
    "llava": _llava_processor,
    "llava_next": _llava_next_processor,
    "qwen2_vl": _qwen2_vl_processor,
    "paligemma": _paligemma_processor,
}
_BUILDERS = {"llava": _llava, "llava_next": _llava_next, "qwen2_vl": _qwen2_vl, "paligemma": _paligemma}
