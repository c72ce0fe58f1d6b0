"""An original checkpoint's config.json and transformers' config of the same model."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ..assembly import grid_pinpoints
from ..trusted_files import json_object

# The original's model_type: the language model's in transformers
_TEXT = {
    "llava_llama": "llama",
    "llava": "llama",
    "llama": "llama",
    "llava_mistral": "mistral",
    "mistral": "mistral",
    "llava_qwen": "qwen2",
    "qwen2": "qwen2",
}
_ORIGINAL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
CLIP_336 = "openai/clip-vit-large-patch14-336"
# Where a config of ours keeps what only the original's has
KEPT = "original_llava"
IMAGES = ("square", "pad", "anyres")
# What a text config has under other names in the transformers of the original code
_RENAMED = ("rope_scaling", "rope_theta", "torch_dtype")
# What says how a model is used or was saved, and not what it is
_OTHER = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "rope_parameters"),
        *("id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions", "return_dict"),
        *("is_encoder_decoder", "chunk_size_feed_forward"),
    )
)


def read_json(path: Path) -> dict[str, Any]:
    """A config.json. ValueError in one line if there is none, or it is no JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give the folder that holds the model's config.json.")
    return json_object(path)


def check_original(original: dict[str, Any], where: Any) -> None:
    """ValueError where transformers' Llava cannot compute what the original's config says."""
    if "mm_projector_type" not in original and "mm_vision_tower" not in original:
        raise ValueError(
            f"{where}: its config.json has no mm_projector_type, so this is no original LLaVA or CAL checkpoint. A "
            "transformers model goes the other way: --to original."
        )
    wanted = {
        "mm_projector_type": ("mlp2x_gelu", ("mlp2x_gelu",)),
        "mm_vision_select_feature": ("patch", ("patch", "cls_patch")),
        "mm_use_im_start_end": (False, (False, None)),
        "mm_use_im_patch_token": (False, (False, None)),
    }
    for name, (default, known) in wanted.items():
        if (value := original.get(name, default)) not in known:
            raise ValueError(
                f"{where}: its config.json says {name}: {value}, which transformers' Llava has not (it has {known[0]})."
            )
    if original.get("model_type") not in _TEXT:
        raise ValueError(
            f"{where}: its config.json says model_type: {original.get('model_type')}. Known are {', '.join(_TEXT)}."
        )
    merge = original.get("mm_patch_merge_type", "flat")
    if images_of(original) == "anyres" and merge != "spatial_unpad":
        raise ValueError(
            f"{where}: image_aspect_ratio: anyres with mm_patch_merge_type: {merge}, where transformers' LlavaNext has "
            "spatial_unpad alone."
        )


def images_of(original: dict[str, Any]) -> str:
    """ "square", "pad" or "anyres": what the original does with an image. ValueError for anything else."""
    found = original.get("image_aspect_ratio") or "square"
    if found not in IMAGES:
        raise ValueError(f"image_aspect_ratio: {found}: known are {', '.join(IMAGES)}")
    return found


def vision_config_of(folder: str | None, original: dict[str, Any], where: Any) -> Any:
    """The tower's config: of its folder, or what is known of the CLIP that the paper uses."""
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

    named = str(original.get("mm_vision_tower"))
    if folder is None and Path(named).is_dir():
        folder = named
    if folder is not None:
        found = AutoConfig.from_pretrained(folder, local_files_only=Path(folder).is_dir(), trust_remote_code=False)
        found = getattr(found, "vision_config", found)
        if not isinstance(found, CLIPVisionConfig):
            raise ValueError(
                f"{folder}: a {found.model_type}, where the original LLaVA has a CLIP tower. Give its folder."
            )
        return found
    if named.rstrip("/").endswith(CLIP_336.rpartition("/")[2]):
        return LlavaConfig().vision_config
    raise ValueError(
        f"{where}: its vision tower is {named}, whose sizes are not known here. Give its folder or hub id: vision_tower "
        "(--vision-tower)."
    )


def to_transformers(
    original: dict[str, Any], vision: Any, *, rows: int, image_token: int, pad_token: int | None
) -> Any:
    """LlavaConfig, or LlavaNextConfig for "anyres", of an original checkpoint.

    Args:
        original: its config.json.
        vision: the tower's config.
        rows: of the vocabulary in transformers.
        image_token: id of the image token in it.
        pad_token: id of the padding token.
    """
    from transformers import CONFIG_MAPPING, LlavaConfig, LlavaNextConfig

    kind = CONFIG_MAPPING[_TEXT[original["model_type"]]]
    known = {*kind().to_dict(), *_RENAMED}
    fields = {name: value for name, value in original.items() if name in known - _OTHER}
    text = kind.from_dict({**fields, "vocab_size": rows, "pad_token_id": pad_token})
    text.dtype = None
    kept = {name: value for name, value in original.items() if name not in fields and name not in _OTHER}
    kept = {**kept, "model_type": original["model_type"], "vocab_size": original["vocab_size"]}
    options: dict[str, Any] = {}
    if images_of(original) == "anyres":
        pinpoints = original.get("image_grid_pinpoints")
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        own = grid_pinpoints(vision.image_size)  # the original has (width, height)
        options["image_grid_pinpoints"] = [[high, wide] for wide, high in pinpoints] if pinpoints else own
    feature = original.get("mm_vision_select_feature", "patch")
    patches = (vision.image_size // vision.patch_size) ** 2
    make: Any = LlavaNextConfig if options else LlavaConfig
    return make(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=patches + (feature == "cls_patch"),
        vision_feature_layer=original.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if feature == "patch" else "full",
        pad_token_id=pad_token,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=original.get("torch_dtype") or original.get("dtype"),
        **{KEPT: kept},
        **options,
    )


def to_original(config: Any, *, rows: int, images: str, tower: str | None, max_length: int) -> dict[str, Any]:
    """config.json of the original code, for a LlavaConfig or LlavaNextConfig.

    Args:
        config: of the model in transformers.
        rows: of the vocabulary in the original.
        images: "square", "pad" or "anyres".
        tower: what ``mm_vision_tower`` is to say; None: what it said, or the CLIP of the paper.
        max_length: in tokens, for ``tokenizer_model_max_length``.

    Raises:
        ValueError: a model that the original code has no place for.
    """
    text, vision, kept = config.text_config, config.vision_config, dict(getattr(config, KEPT, None) or {})
    if text.model_type not in _ORIGINAL:
        raise ValueError(f"its language model is a {text.model_type}; the original code has {', '.join(_ORIGINAL)}.")
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"its vision tower is a {vision.model_type}; the original code has CLIP's alone.")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError("its projector is no mlp2x_gelu (an activation other than gelu, or no bias).")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer is {config.vision_feature_layer}; the original code takes one layer.")
    tower = tower or kept.get("mm_vision_tower") or _known_tower(vision)
    model_type, architecture = _ORIGINAL[text.model_type]
    anyres = images == "anyres"
    found = {name: value for name, value in text.to_dict().items() if name not in _OTHER}
    if found.get("head_dim") == text.hidden_size // text.num_attention_heads:
        found.pop("head_dim")  # the original's transformers computes it
    found |= {
        **_rope(text),
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": max_length,
        "model_type": model_type,
        **kept,
        "architectures": [architecture],
        "vocab_size": rows,
        "pad_token_id": kept.get("pad_token_id", 0),
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "image_aspect_ratio": images,
        # Without it LLaVA reads its tower from CLIP's own folder again, and what was trained of it is lost
        "unfreeze_mm_vision_tower": True,
    }
    if anyres:
        found["image_grid_pinpoints"] = [[wide, high] for high, wide in config.image_grid_pinpoints]
    return found


def _known_tower(vision: Any) -> str:
    from transformers import LlavaConfig

    known = LlavaConfig().vision_config
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        if getattr(vision, name) != getattr(known, name):
            raise ValueError(
                f"its vision tower is not {CLIP_336}. Name the folder or hub id that the original code is to build it "
                "from: vision_tower (--vision-tower)."
            )
    return CLIP_336


def _rope(text: Any) -> dict[str, Any]:
    """Rotary positions as the transformers of the original code reads them."""
    given = dict(getattr(text, "rope_parameters", None) or {})
    theta, kind = given.pop("rope_theta", 10000.0), given.pop("rope_type", "default")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"type": kind, **given}}
