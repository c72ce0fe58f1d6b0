"""Names of MGM's original checkpoints ↔ those of :class:`MGMForConditionalGeneration`: tensors and config.json.

    to_original(to_transformers(state, config), config) == state        bit for bit

No tensor is changed on the way but the projector's second layer, and that only where the config does not hold Gemma's
factor (:func:`_fold`). The original's names follow from its modules (``mgm/model/mgm_arch.py``, ``multimodal_encoder``) and
timm's ConvNeXt.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from .configuration import CLIP_L_336, CONVNEXT_L, MGMConfig, scale_of_embeddings

# The original's name, ours. {i} and {j} are numbers, {end} is weight or bias, {rest} anything that our module has.
_OTHER_NAMES = (
    ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ("model.norm.weight", "model.language_model.norm.weight"),
    ("model.layers.{i}.{rest}", "model.language_model.layers.{i}.{rest}"),
    ("model.mm_projector.0.{end}", "model.multi_modal_projector.linear_1.{end}"),
    ("model.mm_projector.2.{end}", "model.multi_modal_projector.linear_2.{end}"),
    ("model.vlm_uni_query_projector.{i}.{end}", "model.mining.query.{i}.{end}"),
    ("model.vlm_uni_aux_projector.{i}.{end}", "model.mining.key.{i}.{end}"),
    ("model.vlm_uni_val_projector.{i}.{end}", "model.mining.value.{i}.{end}"),
    ("model.vision_tower.vision_tower.vision_model.{rest}", "model.vision_tower.{rest}"),
)
_AUX = "model.vision_tower_aux."
_CONVNEXT_NAMES = (
    ("stem.0.{end}", "embeddings.patch_embeddings.{end}"),
    ("stem.1.{end}", "embeddings.layernorm.{end}"),
    ("stages.{i}.downsample.{j}.{end}", "encoder.stages.{i}.downsampling_layer.{j}.{end}"),
    ("stages.{i}.blocks.{j}.conv_dw.{end}", "encoder.stages.{i}.layers.{j}.dwconv.{end}"),
    ("stages.{i}.blocks.{j}.norm.{end}", "encoder.stages.{i}.layers.{j}.layernorm.{end}"),
    ("stages.{i}.blocks.{j}.mlp.fc1.{end}", "encoder.stages.{i}.layers.{j}.pwconv1.{end}"),
    ("stages.{i}.blocks.{j}.mlp.fc2.{end}", "encoder.stages.{i}.layers.{j}.pwconv2.{end}"),
    ("stages.{i}.blocks.{j}.gamma", "encoder.stages.{i}.layers.{j}.layer_scale_parameter"),
)
_NAMES = (*_OTHER_NAMES, *((f"{_AUX}vision_{theirs}", f"{_AUX}{ours}") for theirs, ours in _CONVNEXT_NAMES))
# Buffers that older versions saved: they follow from the config
_DROPPED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|.*\.embeddings\.position_ids")
# transformers' ConvNextModel ends in a norm whose result MGM does not use, and the original does not have
_UNUSED_NORM = {f"{_AUX}layernorm.weight": torch.ones, f"{_AUX}layernorm.bias": torch.zeros}
_SCALED = ("model.multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.bias")


def to_transformers(state: dict[str, Tensor], config: MGMConfig) -> dict[str, Tensor]:
    """The tensors of an original checkpoint, or of a part of one (a shard, a stage-1 ``mm_projector.bin``), with our names.

    Args:
        state: name → tensor, as the original saves them.
        config: of the model; :func:`config_from_original` makes it.

    Raises:
        ValueError: names that this model does not have.
    """
    kept = {name: tensor for name, tensor in state.items() if not _DROPPED.fullmatch(name)}
    made = _renamed(kept, _renaming(0), config, "the original")
    if any(name.startswith(_AUX) for name in made):
        like = next(tensor for name, tensor in made.items() if name.startswith(_AUX))
        width = config.vision_aux_config.hidden_sizes[-1]  # type: ignore[union-attr]
        made |= {name: fill(width, dtype=like.dtype) for name, fill in _UNUSED_NORM.items()}
    return _fold(made, _factor(config))


def to_original(state: dict[str, Tensor], config: MGMConfig) -> dict[str, Tensor]:
    """The tensors of :class:`MGMForConditionalGeneration`, or of a part of it, with the original's names.

    Raises:
        ValueError: names that the model does not have.
    """
    kept = {name: tensor for name, tensor in state.items() if name not in _UNUSED_NORM}
    _check(kept, config, "this model")
    return _renamed(_fold(kept, 1 / _factor(config)), _renaming(1), None, "this model")


def convnext_from_timm(name: str) -> str | None:
    """timm's name of a ConvNeXt's tensor (``stem.…``, ``stages.…``) as transformers' ConvNextModel calls it; None for its
    norm and head, which MGM does not use. OpenCLIP's checkpoints have ``visual.trunk.`` before it."""
    found = _renaming(0)(f"{_AUX}vision_{name}")
    return None if found is None else found.removeprefix(_AUX)


def _renamed(
    state: dict[str, Tensor], rename: Callable[[str], str | None], config: MGMConfig | None, whose: str
) -> dict[str, Tensor]:
    names = {name: rename(name) for name in state}
    if unknown := [name for name, new in names.items() if new is None]:
        raise _unknown(unknown, whose)
    made = {str(new): state[name] for name, new in names.items()}
    if config is not None:
        _check(made, config, whose, {str(new): name for name, new in names.items()})
    return made


def _check(made: dict[str, Tensor], config: MGMConfig, whose: str, called: dict[str, str] | None = None) -> None:
    known = _own_names(json.dumps(config.to_dict(), default=str, sort_keys=True))
    if unknown := [(called or {}).get(name, name) for name in made if name not in known]:
        raise _unknown(unknown, whose)


def _unknown(names: list[str], whose: str) -> ValueError:
    return ValueError(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: no tensor of {whose} with this config. Give "
        "the config.json that belongs to these weights; other language models than Llama and Gemma are not converted."
    )


@functools.lru_cache(maxsize=4)
def _own_names(config: str) -> frozenset[str]:
    """The names of our model's tensors."""
    from .modeling import MGMForConditionalGeneration

    with torch.device("meta"):
        return frozenset(MGMForConditionalGeneration(MGMConfig(**json.loads(config))).state_dict())


@functools.cache
def _renaming(side: int) -> Callable[[str], str | None]:
    """From the names of one side of the table to the other's; None for a name that is not there."""
    kinds = {"i": r"\d+", "j": r"\d+", "end": "weight|bias", "rest": r".+"}
    rows = []
    for pair in _NAMES:
        escaped = re.escape(pair[side]).replace(r"\{", "{").replace(r"\}", "}")
        pattern = re.compile(re.sub(r"{(\w+)}", lambda found: f"(?P<{found[1]}>{kinds[found[1]]})", escaped))
        rows.append((pattern, pair[1 - side]))

    def rename(name: str) -> str | None:
        found = ((pattern.fullmatch(name), new) for pattern, new in rows)
        return next((new.format(**match.groupdict()) for match, new in found if match), None)

    return rename


def _factor(config: MGMConfig) -> float:
    """What of the original's factor on image features the config does not hold: then it goes into the projector."""
    return scale_of_embeddings(config.text_config) / float(config.image_feature_scale or 1.0)


def _fold(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The projector's last layer times ``factor``. 1 for Llama, and for Gemma as long as the config has its factor, so that
    the weights stay as they are: √2048 rounds, and multiplying and dividing again would not always give the same bits."""
    if factor == 1.0:
        return state

    def scaled(tensor: Any) -> Any:
        return (tensor.double() * factor).to(tensor.dtype)

    # Files are converted a tensor at a time: their tensors are read later, and changed then
    return {n: (t.then(scaled) if hasattr(t, "then") else scaled(t)) if n in _SCALED else t for n, t in state.items()}


# ---- config.json ----

_TEXT_KINDS = {"mgm": "llama", "mgm_gemma": "gemma"}
_ARCHITECTURES = {"mgm": "MGMLlamaForCausalLM", "mgm_gemma": "MGMGemmaForCausalLM"}
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id",
    "bos_token_id", "eos_token_id", "attention_bias", "attention_dropout", "tie_word_embeddings",
)  # fmt: skip
_ROPE_FIELDS = ("rope_theta", "rope_scaling")
_PROJECTOR = "mlp2x_gelu"
# What every released model has, and the folders that its code looks for by these names
_FIXED = {
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    "mm_projector_type": _PROJECTOR,
    "mm_vision_select_feature": "patch",
    "use_mm_proj": True,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "optimize_vision_tower": False,
    "optimize_vision_tower_aux": False,
    "image_aspect_ratio": "pad",
    "tokenizer_padding_side": "right",
}


def config_from_original(
    original: dict[str, Any],
    *,
    vision_config: dict[str, Any] | None = None,
    vision_aux_config: dict[str, Any] | None = None,
) -> MGMConfig:
    """The config of a model from the original's ``config.json``, which is kept in ``original_config``.

    Args:
        original: that file.
        vision_config, vision_aux_config: of the towers, about which the file says no more than their widths; None: CLIP
            ViT-L/14-336 and ConvNeXt-L, which every released model has.

    Raises:
        ValueError: another language model than Llama or Gemma, another projector than a two-layer MLP, or towers of other
            widths than the file says.
    """
    kind = _TEXT_KINDS.get(original.get("model_type", ""))
    if kind is None:
        raise ValueError(
            f"model_type {original.get('model_type')!r}: converted are {' and '.join(_TEXT_KINDS)} (Llama and Gemma)."
        )
    for field in ("mm_projector_type", "mm_vision_select_feature"):
        if original.get(field, _FIXED[field]) != _FIXED[field]:
            raise ValueError(
                f"{field} is {original[field]!r}: converted is {_FIXED[field]!r}, as all released models have it."
            )
    text = {name: original[name] for name in (*_TEXT_FIELDS, *_ROPE_FIELDS) if name in original}
    if kind == "gemma" and original.get("hidden_activation"):
        text["hidden_act"] = original["hidden_activation"]
    config = MGMConfig(
        vision_config=vision_config or dict(CLIP_L_336),
        vision_aux_config=vision_aux_config or dict(CONVNEXT_L),
        text_config=CONFIG_MAPPING[kind](**text),
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        image_grid=original.get("image_grid", 1),
        image_global=original.get("image_global", False),
        image_size_aux=original.get("image_size_aux", 768),
        original_config=dict(original),
    )
    now = _fields(config)
    for field in ("mm_hidden_size", "mm_hidden_size_aux"):
        if original.get(field, now[field]) != now[field]:
            raise ValueError(
                f"{field} is {original[field]}, but the tower that was given has {now[field]} channels. Give that tower's "
                "config."
            )
    return config


def config_to_original(config: MGMConfig) -> dict[str, Any]:
    """The original's ``config.json`` of a model: the one that it was converted from with what has changed since.

    Raises:
        ValueError: a language model, or a layer of the tower's features, that the original does not know.
    """
    now = _fields(config)
    if config.original_config is None:
        length = 4096 if config.image_grid > 1 else 2048
        return {**_FIXED, "tokenizer_model_max_length": length, **now}
    towers = {"vision_config": config.vision_config, "vision_aux_config": config.vision_aux_config}
    before = _fields(config_from_original(config.original_config, **towers))  # type: ignore[arg-type]
    return {**config.original_config, **{name: value for name, value in now.items() if before[name] != value}}


def _fields(config: MGMConfig) -> dict[str, Any]:
    """The fields of the original's file that follow from ours."""
    vision: Any = config.vision_config
    aux: Any = config.vision_aux_config
    text: Any = config.text_config
    kind = next((name for name, kind in _TEXT_KINDS.items() if kind == text.model_type), None)
    if kind is None or config.vision_feature_select_strategy != "default" or config.projector_hidden_act != "gelu":
        raise ValueError(
            f"the original has no {text.model_type} language model, or no vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r} with projector_hidden_act={config.projector_hidden_act!r}: it "
            "has Llama or Gemma, 'default' and 'gelu'."
        )
    rope = dict(text.rope_parameters or {})
    theta, rope_kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(text, name) for name in _TEXT_FIELDS},
        "rope_theta": theta,
        "rope_scaling": None if rope_kind == "default" else {"type": rope_kind, **rope},
        "mm_hidden_size": vision.hidden_size,
        "mm_hidden_size_aux": sum(aux.hidden_sizes),
        "mm_vision_select_layer": config.vision_feature_layer,
        "image_grid": config.image_grid,
        "image_global": config.image_global,
        "image_size_aux": config.image_size_aux,
    }
