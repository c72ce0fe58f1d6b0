"""MGMProcessor: LLaVA's image processor at the high resolution; the low-resolution pictures are made of what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from ...data.image_placement import PLACEHOLDER
from .mining import resized, tiled


class MGMProcessor(ProcessorMixin):
    """Texts and images as :class:`MGMForConditionalGeneration` takes them.

    ``processor(text=..., images=...)`` gives ``input_ids``, ``attention_mask`` and of n images ``pixel_values_aux``
    [n, 3, S, S] and ``pixel_values`` [n, 3, s, s]; with tiles [n, P, 3, s, s], the tiles row by row, then the whole
    picture. The low-resolution picture is the normalised high-resolution one, interpolated (bilinear, no antialiasing), and
    the whole picture of MGM-HD is interpolated from that once more: the original does no other resizing of the image.

    Args:
        image_processor: a LlavaImageProcessor for S × S (LlavaImageProcessorPil resizes with Pillow, as the original did).
            ``do_pad=False``: the image's short side becomes S and its middle is taken ("square", the original's stage 1).
            ``do_pad=True``: it is first padded to a square in the mean colour ("pad", its stage 2 and inference).
        tokenizer: with ``image_token`` among its tokens.
        image_size: s, the side of the low-resolution tower's pictures in pixels.
        patch_size: of that tower, in pixels.
        image_grid, image_global: as in :class:`MGMConfig`.
        chat_template: how conversations are written.
        image_token: what stands for an image in texts.

    Raises:
        ValueError: an image processor without a size S × S, or a tokenizer without the image token.

    Source: ``_sample_item`` of MGM's ``mgm/train/train.py``; ``mgm/eval/model_vqa_loader.py``.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_size: int = 336,
        patch_size: int = 14,
        image_grid: int = 1,
        image_global: bool = False,
        chat_template: str | None = None,
        image_token: str = PLACEHOLDER,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.patch_size = image_size, patch_size
        self.image_grid, self.image_global = image_grid, image_global
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no token {image_token!r}. Add it: tokenizer.add_special_tokens("
                f"{{'additional_special_tokens': [{image_token!r}]}})."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_seq_length(self) -> int:
        """Tokens of one image: 576, and 2,880 in MGM-HD."""
        return (self.image_grid**2 + self.image_global) * (self.image_size // self.patch_size) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_aux"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        made, replacements = super()._process_images(images, **{**kwargs, "return_tensors": "pt"})
        aux: Tensor = made["pixel_values"]
        made["pixel_values"], made["pixel_values_aux"] = self.low_resolution(aux), aux
        return made, replacements

    def low_resolution(self, aux: Tensor) -> Tensor:
        """The pictures of the low-resolution tower, of normalised high-resolution ones [n, 3, S, S]."""
        size, grid = self.image_size, self.image_grid
        large = resized(aux, (size * grid, size * grid))
        if grid == 1:
            return large
        tiles = tiled(large, grid)
        if not self.image_global:
            return tiles
        return torch.cat([tiles, resized(large, (size, size))[:, None]], dim=1)
