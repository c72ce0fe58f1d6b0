"""A model's configuration at small width, for a run that only tries whether all fits together: the same classes, the same
image and patch sizes, grids and numbers of image tokens; few layers, few heads, random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, TOWER_WIDTH, HEAD = 64, 32, 16
_LAYERS, _EXPERTS = 2, 4
_LAYER_KEYS = ("num_hidden_layers", "depth", "num_layers")
_HEAD_KEYS = ("num_attention_heads", "num_heads", "attention_heads")
_WIDTH_KEYS = ("hidden_size", "embed_dim", "d_model")
_INNER_KEYS = ("intermediate_size", "mlp_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
_HEAD_DIM_KEYS = ("head_dim", "global_head_dim", "query_pre_attn_scalar")
# How wide another part is, by the name under which a part says it
_OTHER_WIDTHS = ("out_hidden_size", "projection_dim", "text_hidden_size", "vision_output_dim", "mm_hidden_size")


def shrunk(config: Any, *, vocabulary: int | None = None, ids: Mapping[str, int] | None = None) -> Any:
    """A configuration of the same class at small width; ``config`` stays as it is.

    Args:
        config: of a vision-language model in transformers.
        vocabulary: how many tokens the small model knows; None: as many as ``config`` says, for its own tokenizer.
        ids: ids of special tokens, by the names that the configuration has for them, where the tokenizer is another.

    Raises:
        ValueError: its class does not take the smaller sizes, naming what it dislikes.
    """
    whole = copy.deepcopy(config).to_dict()
    text = config.get_text_config().to_dict()
    parts = {name: value for name, value in whole.items() if isinstance(value, dict) and "model_type" in value}
    its = next((name for name, value in parts.items() if value.get("model_type") == text.get("model_type")), None)
    deep = max((len(part.get("deepstack_visual_indexes") or ()) for part in parts.values()), default=0)
    widths = {text.get("hidden_size"): WIDTH}
    for name, part in parts.items():
        layers = max(_LAYERS, deep) if name == its else max(_LAYERS, deep, _deepest(whole) + 1)
        whole[name] = _small(part, WIDTH if name == its else TOWER_WIDTH, layers, widths)
    if its is None:  # the language model's settings stand at the top
        whole = _small(whole, WIDTH, _LAYERS, widths)
    for name in (*_WIDTH_KEYS, *_OTHER_WIDTHS):
        if whole.get(name) in widths:
            whole[name] = widths[whole[name]]
    try:
        small = type(config).from_dict(whole)
        _set_vocabulary(small, text.get("vocab_size"), vocabulary)
        for name, value in (ids or {}).items():
            setattr(small, name, value)
            if hasattr(small.get_text_config(), name):
                setattr(small.get_text_config(), name, value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{type(config).__name__} (model_type {config.model_type!r}) cannot be made small ({error}): --dry-run "
            "does not know this family's sizes"
        ) from error
    return small


def random_model(config: Any, seed: int = 0) -> Any:
    """The model of ``config`` in float32 with random weights, as its class initialises them."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.isfinite().all()):  # memory that the class left as it was
                parameter.normal_(std=0.02)
    return model.eval()


def on_meta(config: Any) -> Any:
    """The model of ``config`` in its real size, without memory for its weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _deepest(whole: Mapping[str, Any]) -> int:
    """How many layers from a tower's end, or start, the layer lies that the projector reads."""
    read = whole.get("vision_feature_layer", whole.get("vision_feature_layers", -1))
    return max(
        (abs(one) for one in (read if isinstance(read, (list, tuple)) else [read]) if one is not None), default=1
    )


def _small(part: dict[str, Any], width: int, layers: int, widths: Mapping[Any, int]) -> dict[str, Any]:
    """The settings of one part, a few layers deep and ``width`` wide."""
    new = dict(part)
    old_layers = next((part[name] for name in _LAYER_KEYS if isinstance(part.get(name), int)), None)
    kept = list(range(layers)) if old_layers is None else _kept(part, old_layers, layers)
    for name, value in part.items():
        if name in _LAYER_KEYS:
            new[name] = len(kept)
        elif name in _INNER_KEYS and isinstance(value, int):
            new[name] = 2 * width
        elif name in _WIDTH_KEYS and isinstance(value, int):
            new[name] = width
        elif name in _OTHER_WIDTHS and isinstance(value, int):
            new[name] = widths.get(value, WIDTH if name == "out_hidden_size" else TOWER_WIDTH)
        elif name in _HEAD_DIM_KEYS and value is not None:
            new[name] = HEAD
        elif name == "num_key_value_heads" and value is not None:
            new[name] = _fewer_heads(part, width)
        elif name in _HEAD_KEYS:
            new[name] = width // HEAD
        elif name in ("num_experts", "num_local_experts", "n_routed_experts") and value:
            new[name] = min(value, _EXPERTS)
        elif name == "num_experts_per_tok" and value:
            new[name] = min(value, 2)
        elif name in ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes") and value:
            new[name] = list(range(min(len(value), len(kept))))
        elif name == "depths":
            new[name] = [1] * len(value)
        elif name in ("hidden_sizes", "embed_dims"):
            new[name] = [8 * (place + 1) for place in range(len(value))]
        elif isinstance(value, list) and old_layers is not None and len(value) == old_layers:
            new[name] = [value[place] for place in kept]
        elif isinstance(value, dict):
            new[name] = _rope(value) if "rope" in name else value
    if isinstance(part.get("embed_dim"), int) and part.get("hidden_size") in widths:
        new["hidden_size"] = widths[part["hidden_size"]]  # Qwen2-VL's tower: what it hands on
    return new


def _kept(part: Mapping[str, Any], old: int, layers: int) -> list[int]:
    """Which of the layers stay: the first of each kind, and as many more as are wanted."""
    kinds: Sequence[Any] = part.get("layer_types") or []
    chosen = {kinds.index(kind) for kind in dict.fromkeys(kinds)} if len(kinds) == old else set()
    for place in range(old):
        if len(chosen) >= layers:
            break
        chosen.add(place)
    return sorted(chosen)


def _fewer_heads(part: Mapping[str, Any], width: int) -> int:
    """Key and value heads in the same kind of relation to the others: as many, one, or fewer."""
    heads, kv = next((part[name] for name in _HEAD_KEYS if name in part), 1), part["num_key_value_heads"]
    return width // HEAD if kv == heads else 1 if kv == 1 else max(1, width // HEAD // 2)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """M-RoPE's sections share out half a head."""
    sections = value.get("mrope_section")
    if not sections:
        return value
    total, half = sum(sections), HEAD // 2
    scaled = [one * half // total for one in sections]
    return {**value, "mrope_section": [half - sum(scaled[1:]), *scaled[1:]]}


def _set_vocabulary(config: Any, old: int | None, new: int | None) -> None:
    """Wherever the configuration, or a part of it, says how many tokens the language model knows."""
    parts = [config, config.get_text_config(), *(getattr(config, name) for name in config.sub_configs)]
    for part in parts:
        if new is not None and getattr(part, "vocab_size", None) == old:
            part.vocab_size = new
