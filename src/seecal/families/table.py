"""What makes each model family special. One row a family; everything a row does not say is read off the model.

A family is looked up by ``config.model_type``. One that has no row goes by ``GENERIC``: the decoder's inputs are read by a
forward pre-hook during the main pass, so no family's position code is written again here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import dummy_images, image_grids

# Where configurations keep the ids whose embeddings are replaced by vision features.
_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "image_patch_id")
_VIDEO_ID_FIELDS = ("video_token_id", "video_token_index")
# Layers that carry something from token to token by attention alone, as configs name them.
_ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
_LAYER_FIELDS = ("layer_types", "layers_block_type", "block_types")
# What only the configs of other decoders have; asked where a config does not name its layers.
_STATE_FIELDS = re.compile(
    r"mamba|ssm_|state_size|time_step|conv_L_cache|linear_conv|linear_attn|lru_width|attn_layer_indices"
)
_STATE_MODELS = ("rwkv", "xlstm")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: ``config.model_type``; empty for the generic row.
        head: config → (scale, softcap) that the VLM class applies to its logits. Read the class, not the config: Gemma 3
            has a soft-cap in its config that its VLM class does not apply.
        dummy_image: model → the vision arguments of one dummy image, so that a rank without images runs the same modules as
            the others. None: not known.
        omit: decoder inputs that belong to images, so the pass without them leaves them out.
        cross_attention: the image enters by cross-attention only: nothing is dropped from the text, the decoder is just
            not given the image.
        exact: whether dropping the image gives what masking it gives; where it does not, ``note`` says what it gives.
        packs: whether several samples may stand in one row. Not where a state is carried from token to token: a mask keeps
            attention apart, not a recurrence or a convolution. A model whose text config tells of such layers is neither
            packed nor exact, whatever its family's row says (:func:`family_of`).
        needs: what its processor or its batches need, for the table.
        grid: which part of an image each of its tokens is, one of ``image_grids.py``. None: not known.
    """

    name: str = ""
    head: Callable[[Any], tuple[float, float | None]] = lambda config: (1.0, None)
    dummy_image: Callable[[Any], dict[str, Tensor]] | None = None
    omit: tuple[str, ...] = ("visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features")
    cross_attention: bool = False
    exact: bool = True
    packs: bool = True
    note: str = ""
    needs: str = ""
    grid: Callable[[Any, Mapping[str, Any], Sequence[int], int], list[image_grids.ImageGrid]] | None = None

    @property
    def packs_main(self) -> bool:
        """Whether the pass with the image too may run on one row: with cross-attention, images belong to rows."""
        return self.packs and not self.cross_attention


def _softcap(config: Any) -> tuple[float, float | None]:
    return 1.0, getattr(config.get_text_config(), "final_logit_softcapping", None)


def _paligemma(config: Any) -> tuple[float, float | None]:
    """PaliGemma 2's soft-cap, where this transformers' class applies it (5.17 does not, 5.23 does)."""
    from transformers import PaliGemmaForConditionalGeneration

    applied = inspect.unwrap(PaliGemmaForConditionalGeneration.forward).__code__.co_consts
    return _softcap(config) if "final_logit_softcapping" in applied else (1.0, None)


def _divided(config: Any) -> tuple[float, float | None]:
    return 1.0 / config.get_text_config().logits_scaling, None


GENERIC = Family(packs=False)  # nobody has said that its decoder carries no state
_CROSS = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")
_STATE = "dropping removes the image from the recurrent state too, masking leaves its trace there"
_VISION = "torchvision"
_TYPES = "torchvision; mm_token_type_ids"
_PREFIX = "token_type_ids; a chat template for several turns"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", dummy_image=dummy_images.picture, grid=image_grids.square),
        Family("vipllava", dummy_image=dummy_images.picture, grid=image_grids.square),
        Family("mgm", dummy_image=dummy_images.two_resolutions, needs="pixel_values_aux", grid=image_grids.mined),
        Family("mistral3", dummy_image=dummy_images.sized_picture, needs=_VISION, grid=image_grids.sized),
        Family("llava_next", dummy_image=dummy_images.tiles, grid=image_grids.whole_first),
        Family("llava_next_video", dummy_image=dummy_images.tiles, grid=image_grids.whole_first),
        Family("llava_onevision", dummy_image=dummy_images.tiles, grid=image_grids.whole_first),
        Family("qwen2_vl", dummy_image=dummy_images.patches, needs=_TYPES, grid=image_grids.merged),
        Family("qwen2_5_vl", dummy_image=dummy_images.patches, needs=_TYPES, grid=image_grids.merged),
        Family("qwen3_vl", dummy_image=dummy_images.patches, needs=_TYPES, grid=image_grids.merged),
        Family("qwen3_vl_moe", dummy_image=dummy_images.patches, needs=_TYPES, grid=image_grids.merged),
        Family(
            "qwen3_5",
            dummy_image=dummy_images.patches,
            exact=False,
            packs=False,
            note=f"linear attention: {_STATE}",
            needs=_TYPES,
            grid=image_grids.merged,
        ),
        Family("glm4v", dummy_image=dummy_images.patches, needs=_TYPES, grid=image_grids.merged),
        Family("internvl", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.whole_last),
        Family("got_ocr2", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.square),
        Family("lighton_ocr", dummy_image=dummy_images.sized_picture, needs=_VISION, grid=image_grids.sized),
        Family("idefics2", dummy_image=dummy_images.grouped_picture, needs=_VISION),
        Family("idefics3", dummy_image=dummy_images.grouped_picture, needs=_VISION, grid=image_grids.whole_last),
        Family(
            "smolvlm",
            dummy_image=dummy_images.grouped_picture,
            needs=f"{_VISION}, num2words",
            grid=image_grids.whole_last,
        ),
        Family("paligemma", head=_paligemma, dummy_image=dummy_images.picture, needs=_PREFIX, grid=image_grids.square),
        Family("gemma3", dummy_image=dummy_images.picture, needs="token_type_ids", grid=image_grids.square),
        Family("gemma4", head=_softcap, dummy_image=dummy_images.positioned_patches, needs=_TYPES),
        Family("aya_vision", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.whole_last),
        Family("cohere2_vision", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.whole_last),
        Family("granite4_vision", head=_divided, dummy_image=dummy_images.tiles, needs=_VISION),
        Family("molmo2", dummy_image=dummy_images.pooled_patches, needs=f"{_TYPES}; transformers after 5.17"),
        Family("ovis2", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.square),
        Family("llama4", dummy_image=dummy_images.picture, needs=_VISION, grid=image_grids.whole_last),
        Family(
            "lfm2_vl",
            dummy_image=dummy_images.shaped_patches,
            exact=False,
            packs=False,
            note=f"short convolutions: {_STATE}",
            needs=_VISION,
        ),
        Family(
            "mllama",
            dummy_image=dummy_images.crossed_picture,
            omit=_CROSS,
            cross_attention=True,
            exact=False,
            note="cross-attention: the decoder runs without the image; a fully masked one would still be seen",
            needs="cross_attention_mask",
        ),
    )
}


def family_of(model: Any) -> Family:
    """The row of the model's family, or the generic one.

    Some families take any language model: where the model's carries a state, the row says so, as that of a family does.
    """
    row = FAMILIES.get(model.config.model_type, GENERIC)
    if row is GENERIC or not (row.packs or row.exact):
        return row
    layers = _layers_with_state(model.config.get_text_config())
    return replace(row, packs=False, exact=False, note=f"{', '.join(layers)}: {_STATE}") if layers else row


def _layers_with_state(config: Any) -> list[str]:
    """What the text config says of layers that are no attention: their kinds, or else the field that gives them away."""
    for name in _LAYER_FIELDS:
        if kinds := getattr(config, name, None):
            return sorted({str(kind) for kind in kinds} - _ATTENTION_LAYERS)
    if config.model_type in _STATE_MODELS:
        return [config.model_type]
    return [name for name in vars(config) if _STATE_FIELDS.search(name)][:1]


def decoder_of(model: Any) -> Any:
    """The text decoder without its head (``get_decoder()`` of Llama 4 returns one that carries an lm_head)."""
    decoder = model.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def image_ids(config: Any) -> set[int]:
    """Ids of the placeholder tokens, images and videos alike."""
    return set(_ids(config, (*_IMAGE_ID_FIELDS, *_VIDEO_ID_FIELDS)))


def image_id(config: Any) -> int:
    """The id of an image's placeholder token; the config must have one."""
    return _ids(config, _IMAGE_ID_FIELDS)[0]


def _ids(config: Any, fields: tuple[str, ...]) -> list[int]:
    found = (getattr(config, name, None) for name in fields)
    return [value for value in found if isinstance(value, int)]


def check_vlm(model: Any) -> None:
    """ValueError unless ``model`` is a transformers vision-language model with a language-model head."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(f"{name} is not a transformers model; pass a vision-language model such as LLaVA")
    if not image_ids(config):
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) is not a vision-language model: its config names no image token. "
            "CAL compares the same text with and without its image, so it needs one."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head; load it with AutoModelForImageTextToText")


def head_of(model: Any) -> Any:
    """The module that holds the head's weight, or ValueError where that weight is not all there is to it."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT trains a whole copy: take that
        active = (
            []
            if getattr(head, "disable_adapters", False)
            else [name for name in head.active_adapters if name in head.modules_to_save]
        )
        head = head.modules_to_save[active[0]] if active else head.original_module
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the head ({type(head).__name__}) carries an adapter. CAL reads the head's weight directly, so the adapter "
            "would be left out. Take lm_head out of target_modules; to train it whole, set modules_to_save=['lm_head']."
        )
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        raise ValueError(
            f"the head ({type(head).__name__}) has no floating-point weight, which CAL reads. Add lm_head to "
            "quantization_config's llm_int8_skip_modules."
        )
    if weight.numel() == 0 and not is_partitioned(head):
        raise ValueError(
            f"the head's weight has shape {tuple(weight.shape)}: whatever shares it out hands it out nowhere that seecal "
            "knows. Use DDP, FSDP2 or DeepSpeed."
        )
    return head


def is_partitioned(head: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 shares out the head's weight: it is whole inside the head's own forward, else empty."""
    return hasattr(head.weight, "ds_id")


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers. ValueError for nn.DataParallel."""
    if isinstance(model, nn.parallel.DataParallel):
        raise ValueError("nn.DataParallel copies the model in every step; launch one process a GPU (accelerate launch)")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
