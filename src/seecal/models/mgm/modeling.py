"""MGMModel, MGMForConditionalGeneration: CLIP's tokens mine ConvNeXt's cells, LLaVA's projector, any causal language model.

Shapes: n images in a batch, N tokens of an image (576; MGM-HD 2,880), P pictures of one (1; MGM-HD its four tiles, then the
whole), s and S sides of the low- and the high-resolution picture in pixels, D width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration import MGMConfig
from .mining import MGMMining, resized, stacked_stages, tiled


@dataclass
class MGMModelOutputWithPast(BaseModelOutputWithPast):
    """``image_hidden_states`` [n, N, D]: the projected image features that went into the text."""

    image_hidden_states: Tensor | None = None


@dataclass
class MGMCausalLMOutputWithPast(ModelOutput):
    """``loss`` in nats, mean over labels; ``logits`` [B, L, V]; ``image_hidden_states`` [n, N, D]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class MGMMultiModalProjector(nn.Module):
    """[..., C] → [..., D]: two linear layers with an activation between, LLaVA's."""

    def __init__(self, config: MGMConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(vision.hidden_size, text.hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text.hidden_size, text.hidden_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class MGMPreTrainedModel(PreTrainedModel):
    config: MGMConfig
    config_class = MGMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as transformers' own models have it
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As in transformers. The ConvNeXt, which has no attention and would refuse, is left out."""
        given = attn_implementation
        if isinstance(given, str):
            given = dict.fromkeys(("", *self.config.sub_configs), given)
        super().set_attn_implementation({**given, "vision_aux_config": "eager"}, *args, **kwargs)


class MGMModel(MGMPreTrainedModel):
    """Both towers, the mining, the projector and the language model without its head."""

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        aux: Any = config.vision_aux_config
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # It has no attention, and refuses to be asked for another than this
        self.vision_tower_aux = AutoModel.from_config(config.vision_aux_config, attn_implementation="eager")
        self.mining = MGMMining(vision.hidden_size, sum(aux.hidden_sizes))
        self.multi_modal_projector = MGMMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, pixel_values_aux: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The features of n images: ``pooler_output``, a tuple of n tensors [N, D] in the order of the text's tokens.

        In MGM-HD the whole picture's tokens come first, then those of tile 0, 1, 2, 3, each row by row in itself.

        Args:
            pixel_values: [n, 3, s, s]; with tiles [n, P, 3, s, s], the tiles row by row, then the whole picture.
            pixel_values_aux: [n, 3, S, S], normalised as they are.

        Raises:
            ValueError: one of the two is missing or not as the config says.
        """
        pixels = self._pictures(pixel_values, pixel_values_aux)
        assert pixel_values_aux is not None
        count, pictures = pixels.shape[:2]
        tokens = self._low_resolution(pixels.flatten(0, 1))  # [n·P, S², C]
        mined = tokens + self.mining(tokens, self._cells(pixel_values_aux).flatten(0, 1))
        features = self.multi_modal_projector(mined)
        if self.config.image_feature_scale != 1.0:
            # Rounded to the features' precision first, as Gemma rounds the one for words: 45.25 in bfloat16
            scale = torch.tensor(self.config.image_feature_scale, dtype=features.dtype, device="cpu")
            features = features * float(scale)
        features = features.unflatten(0, (count, pictures))
        if self.config.image_global:
            features = features.roll(1, dims=1)  # the whole picture to the front
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tuple(features.flatten(1, 2)),  # type: ignore[arg-type]
        )

    def _pictures(self, pixel_values: Tensor, pixel_values_aux: Tensor | None) -> Tensor:
        """``pixel_values`` as [n, P, 3, s, s]."""
        wanted = self.config.pictures
        if pixel_values_aux is None:
            raise ValueError("pixel_values without pixel_values_aux: MGMProcessor makes both of an image. Pass both.")
        pixels = pixel_values[:, None] if pixel_values.ndim == 4 else pixel_values
        if pixels.ndim != 5 or pixels.shape[1] != wanted or len(pixels) != len(pixel_values_aux):
            raise ValueError(
                f"pixel_values {list(pixel_values.shape)} and pixel_values_aux {list(pixel_values_aux.shape)} do not fit "
                f"a model that reads {wanted} pictures of each image (image_grid={self.config.image_grid}, image_global="
                f"{self.config.image_global}). Set the processor's image_grid and image_global to the config's."
            )
        return pixels

    def _low_resolution(self, pixels: Tensor) -> Tensor:
        """[n·P, S², C] of CLIP's last layer but one, without the class token and without a norm after it."""
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        tokens: Tensor = states[self.config.vision_feature_layer]
        return tokens[:, 1:] if self.config.vision_feature_select_strategy == "default" else tokens

    def _cells(self, pixels: Tensor) -> Tensor:
        """[n, P, A, H, H]: each picture's own part of what all of ConvNeXt's stages see, in the order of the pictures."""
        # Entry 0 is the stem; no norm after the stages, which is why this is no backbone class
        stages = self.vision_tower_aux(pixels.to(self.vision_tower_aux.dtype), output_hidden_states=True).hidden_states
        whole = stacked_stages(stages[1:])
        grid = self.config.image_grid
        if grid == 1:
            return whole[:, None]
        parts = tiled(whole, grid)
        if not self.config.image_global:
            return parts
        smaller = resized(whole, parts.shape[-2:])
        return torch.cat([parts, smaller[:, None]], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MGMModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is None and pixel_values_aux is not None:
            raise ValueError("pixel_values_aux without pixel_values: MGMProcessor makes both of an image. Pass both.")
        if pixel_values is not None and input_ids is None:
            raise ValueError("pixel_values with inputs_embeds: where images go is read off input_ids. Pass those.")
        features = None
        if inputs_embeds is None:
            assert input_ids is not None
            is_image = input_ids.eq(self.config.image_token_id)  # type: ignore[arg-type]
            # The image's id may lie beyond the vocabulary
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                found = self.get_image_features(pixel_values, pixel_values_aux, return_dict=True).pooler_output
                features = torch.stack(list(found))
                inputs_embeds = self._merged(inputs_embeds, is_image, features)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MGMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def _merged(self, embeds: Tensor, is_image: Tensor, features: Tensor) -> Tensor:
        """The text's embeddings [B, L, D] with the features [n, N, D] in the places of images, row after row."""
        count = int(is_image.sum())
        if count != features.shape[0] * features.shape[1]:
            raise ValueError(
                f"{count} image tokens in input_ids, but {features.shape[0]} images of {features.shape[1]} features. Make "
                "both with this model's MGMProcessor, and cut no row inside an image."
            )
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.device, embeds.dtype))


class MGMForConditionalGeneration(MGMPreTrainedModel, GenerationMixin):
    """MGM or MGM-HD with its language-model head.

    ``model(**batch)`` takes what :class:`MGMProcessor` makes of texts and images, and ``labels`` [B, L]. Rows may have any
    number of images, also none; a batch without images has no pixels.

    Source: arXiv 2403.18814; ``encode_images`` in MGM's ``mgm/model/mgm_arch.py``.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.model = MGMModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor, pixel_values_aux: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As :meth:`MGMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, pixel_values_aux, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MGMCausalLMOutputWithPast:
        """Logits [B, L, V] and, with ``labels``, the loss.

        Args:
            input_ids: [B, L]; an image is ``config.image_seq_length`` times ``config.image_token_id``.
            pixel_values, pixel_values_aux: as :meth:`MGMModel.get_image_features` takes them, the images in the order of
                the rows.
            logits_to_keep: of the last so many positions, or of these; 0: of all.

        Raises:
            ValueError: image tokens and features that differ in number, or pixels that do not fit the config.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_aux=pixel_values_aux,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            text: Any = self.config.text_config
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        return MGMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if made.get("pixel_values") is None:  # transformers leaves it out after the first step, but knows no second one
            made.pop("pixel_values_aux", None)
        return made
