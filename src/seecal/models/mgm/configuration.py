"""MGMConfig: a CLIP tower, a ConvNeXt tower, a language model, and how they are put together."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

# CLIP ViT-L/14-336 and OpenCLIP's ConvNeXt-L d-320: the towers of every released MGM
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
}
CONVNEXT_L = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "image_size": 768}
_DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vision_config": ("clip_vision_model", CLIP_L_336),
    "vision_aux_config": ("convnext", CONVNEXT_L),
    "text_config": ("llama", {}),
}
# Language models that multiply the embeddings of words by sqrt(width), and once whatever embeddings they were given
_SCALED = ("gemma", "gemma2", "gemma3_text")


def scale_of_embeddings(text: Any) -> float:
    """The factor that a language model put on all its inputs when MGM was trained with it, by its config."""
    return math.sqrt(text.hidden_size) if text.model_type in _SCALED else 1.0


class MGMConfig(PreTrainedConfig):
    """Configuration of :class:`MGMForConditionalGeneration`. The defaults are MGM-7B's.

    Args:
        vision_config: of the low-resolution tower, whose tokens the language model reads. With its ``image_size`` 336 and
            patches of 14 pixels these are 24 × 24.
        vision_aux_config: of the ConvNeXt that is mined for details. ``drop_path_rate`` is 0 here; the original trains with
            0.1, and never puts the tower in eval mode. Both passes of CAL share one pass through the towers, so Δ has
            no noise from it.
        text_config: of the language model, any that AutoModel knows.
        image_token_id: what stands for an image token in ``input_ids``; None: the first id after the vocabulary. It needs
            no row among the embeddings.
        image_grid: tiles a side; 2 in MGM-HD.
        image_global: whether the whole picture is read too, before the tiles. Only with tiles.
        image_size_aux: side of the high-resolution picture in pixels: 768, 1536 in MGM-HD.
        image_feature_scale: factor on projected image features; None: sqrt(width) for Gemma, else 1. Gemma used to
            multiply all its inputs, images included, and MGM-2B was trained so; today it multiplies words alone.
        original_config: the config.json of the checkpoint in the original's layout that this one was converted from.
        projector_hidden_act, multimodal_projector_bias, vision_feature_layer, vision_feature_select_strategy: as in LLaVA.

    Raises:
        ValueError: the config of a checkpoint in the original's layout, or sizes that do not fit each other.

    Source: MGM's ``mgm/model/mgm_arch.py`` and its scripts (``MGM-7B``: ``scripts/llama/train``).
    """

    model_type = "mgm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": AutoConfig,
        "vision_aux_config": AutoConfig,
        "text_config": AutoConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    vision_aux_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    image_grid: int = 1
    image_global: bool = False
    image_size_aux: int = 768
    image_feature_scale: float | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = False
    original_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "mm_vision_tower" in kwargs:
            raise ValueError(
                "this config.json is one of MGM's original code (it has mm_vision_tower). Run `seecal convert` on the "
                "folder and load what it writes."
            )
        for name, (kind, options) in _DEFAULTS.items():
            given = getattr(self, name)
            if given is None:
                given = {"model_type": kind, **options}
            if isinstance(given, dict):
                made = dict(given)
                setattr(self, name, CONFIG_MAPPING[made.pop("model_type", kind)](**made))
        text: Any = self.text_config
        if self.image_token_id is None:
            self.image_token_id = text.vocab_size
        if self.image_feature_scale is None:
            self.image_feature_scale = scale_of_embeddings(text)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(text.tie_word_embeddings)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.image_grid < 1 or (self.image_global and self.image_grid == 1):
            raise ValueError(
                f"image_grid={self.image_grid}, image_global={self.image_global}: one tile is the whole picture. Set "
                "image_global to false, or image_grid to 2 as in MGM-HD."
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}: 'default' leaves out the class "
                "token; 'full' is for a tower without one."
            )
        step = 4 * self.image_grid * self.tokens_per_side
        if self.image_size_aux % step:
            raise ValueError(
                f"image_size_aux={self.image_size_aux}: the ConvNeXt makes a cell of 4 pixels, and each of "
                f"{self.image_grid} × {self.tokens_per_side} low-resolution tokens a side mines a whole number of cells. "
                f"Set a multiple of {step}."
            )

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side of one picture of the low-resolution tower: 24."""
        vision: Any = self.vision_config
        return vision.image_size // vision.patch_size

    @property
    def pictures(self) -> int:
        """Low-resolution pictures of one image: its tiles, and the whole where that is read too."""
        return self.image_grid**2 + self.image_global

    @property
    def image_seq_length(self) -> int:
        """Tokens of one image: 576, and 2,880 in MGM-HD."""
        return self.pictures * self.tokens_per_side**2
